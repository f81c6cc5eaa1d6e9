"""Casting: a mould plus a part's weights gives the part's binary, without the compiler."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.bmodel import Span, hash_span, read_bmodel
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


def cast_region(target: Path, region: Span, coefficients: CoefficientMap, read_weight: WeightReader) -> bytes:
    """Write a part's coefficients straight into their region of a file.

    Several threads may cast into regions of one file at once.

    Args:
        target: a file that `shell.lay_out` wrote.
        region: the net's region in it.

    Returns:
        sha256 of the region as written: the net's check code.

    Raises:
        CompileError: the region has another size than the mould's, or a weight another shape than the probe's.
    """
    file = os.open(target, os.O_RDWR)
    try:
        for placement, made in _made(coefficients, coefficients.binary, read_weight):
            if placement.offset + made.nbytes > region.size:
                raise CompileError(
                    f"slot {placement.form.slot} ends at byte {placement.offset + made.nbytes} of the coefficients, "
                    f"their region has {region.size}; lay the file out with the mould's own size"
                )
            os.pwrite(file, made.reshape(-1).view(np.uint8).data, region.start + placement.offset)
    finally:
        os.close(file)
    return hash_span(target, region)


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


def compare_stored(
    bmodel: Path, net: str, coefficients: CoefficientMap, read_weight: WeightReader
) -> dict[str, NDArray[np.float32]]:
    """Read the weights of one net back and compare them with what casting makes of the checkpoint's.

    Args:
        bmodel: a single or combined file.
        net: which of its nets.

    Returns:
        Slot -> for each of its stored ranges the share of bytes that differ: 0 everywhere in a sound file.

    Raises:
        CompileError: no such net, or its weights have another size than the mould's.
    """
    nets = {one.name: one for one in read_bmodel(bmodel).nets}
    if net not in nets:
        raise CompileError(f"{bmodel} has no net {net!r}; it has {', '.join(nets)}")
    differing: dict[str, list[float]] = defaultdict(list)
    with bmodel.open("rb") as file:
        for placement, made in _made(coefficients, coefficients.binary, read_weight):
            file.seek(nets[net].coefficients.start + placement.offset)
            stored = np.frombuffer(file.read(made.nbytes), np.uint8)
            if stored.size != made.nbytes:
                raise CompileError(f"{bmodel} ends inside the weights of net {net}; combine it again")
            differing[placement.form.slot].append(float(np.mean(stored != made.reshape(-1).view(np.uint8))))
    return {slot: np.array(shares, np.float32) for slot, shares in differing.items()}


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
