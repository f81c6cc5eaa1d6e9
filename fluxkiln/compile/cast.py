"""Casting: a mould plus a part's weights gives the part's binary, without the compiler."""

from __future__ import annotations

import hashlib
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.bmodel import read_bmodel
from fluxkiln.compile.forms import SlotForms
from fluxkiln.compile.mould import CoefficientMap, Placement, WeightReader
from fluxkiln.errors import CompileError


def cast_bmodel(mould: Path, coefficients: CoefficientMap, read_weight: WeightReader, net: str, target: Path) -> None:
    """Write `target`: the mould's bmodel with the weights that `read_weight` gives, its net called `net`.

    The result equals what the compiler makes of these weights, build time aside.

    Raises:
        CompileError: the net's name has another length than the mould's; a weight has another shape than the probe.
    """
    shutil.copyfile(mould, target)
    (shell,) = read_bmodel(target).nets
    if len(net.encode()) != shell.name_span.size:
        raise CompileError(f"net name {net!r}: the mould's name {shell.name!r} can only be replaced by one as long")
    with target.open("r+b") as file:
        for placement, made in _made(coefficients, coefficients.binary, read_weight):
            file.seek(shell.coefficients.start + placement.offset)
            file.write(made.data)
        file.seek(shell.coefficients.start)
        digest, left = hashlib.sha256(), shell.coefficients.size
        while left:
            block = file.read(min(left, 1 << 22))
            digest.update(block)
            left -= len(block)
        # the runtime shares coefficients between nets by this code
        file.seek(shell.check_code.start)
        file.write(digest.digest())
        file.seek(shell.name_span.start)
        file.write(net.encode())


def cast_interpreter_weights(
    coefficients: CoefficientMap, read_weight: WeightReader, arrays: Any, target: Path
) -> None:
    """Write the weight file (npz) that the compiler's interpreter reads beside the mould's `*_tpu.mlir`.

    Args:
        arrays: the mould's own weight file, for names, shapes and dtypes.
    """
    filled = {}
    for placement, made in _made(coefficients, coefficients.interpreter, read_weight):
        like = arrays[placement.array]
        filled[placement.array] = made.view(np.uint8).reshape(-1).view(like.dtype).reshape(like.shape)
    np.savez(target, **filled)


def _made(
    coefficients: CoefficientMap, placements: tuple[Placement, ...], read_weight: WeightReader
) -> Iterator[tuple[Placement, NDArray[Any]]]:
    """Every placement with its bytes; one slot's weight is read once and dropped before the next."""
    by_slot = defaultdict(list)
    for placement in placements:
        by_slot[placement.form.slot].append(placement)
    for slot, group in by_slot.items():
        forms = SlotForms(read_weight(slot), coefficients.group_size, coefficients.bits)
        for placement in group:
            yield placement, np.ascontiguousarray(forms.make(placement.form))
