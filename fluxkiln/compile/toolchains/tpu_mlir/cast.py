"""Casting: a shell's place in a file plus a part's weights gives the part's binary, without the compiler."""

from __future__ import annotations

import errno
import hashlib
import os
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from fluxkiln.compile.toolchains.tpu_mlir.bmodel import Span, read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap, Placement
from fluxkiln.compile.toolchains.tpu_mlir.forms import FormMaker, SlotRows
from fluxkiln.errors import CompileError
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounders import as_compiler
from fluxkiln.types import WeightReader

Blocks = Iterator[NDArray[np.uint8]]


def cast_region(
    target: Path,
    region: Span,
    coefficients: CoefficientMap,
    read_weight: WeightReader,
    rounder_of: RounderOf = as_compiler,
) -> bytes:
    """Write a part's coefficients straight into their region of a file.

    Several threads may cast into regions of one file at once. A thread needs the memory of the largest weight that is
    stored transposed, of others a few rows.

    Args:
        target: a file that `shell.lay_out` wrote.
        region: the net's region in it.
        read_weight: slot -> weight in torch's layout. Where it has a method `read_rows(slot, start, stop)`, weights
            are read with that, some rows at a time.
        rounder_of: slot -> what makes its codes, scales and zero points; those of the compiler by default.

    Returns:
        sha256 of the region as written: the net's check code.

    Raises:
        CompileError: the region has another size than the mould's, or a weight another shape than the probe's.
    """
    if region.size != coefficients.size:
        raise CompileError(
            f"the region has {region.size} bytes, the mould's coefficients {coefficients.size}; lay the file out with "
            "the mould's own size"
        )
    digest = hashlib.sha256()
    position = 0
    file = os.open(target, os.O_WRONLY)
    try:
        _reserve(file, region)

        def write(block: NDArray[np.uint8]) -> None:
            nonlocal position
            digest.update(block.data)
            left = block
            while left.size:
                count = os.pwrite(file, left.data, region.start + position)
                position += count
                left = left[count:]

        for placement, blocks in _made(coefficients, coefficients.binary, read_weight, rounder_of):
            write(np.zeros(placement.offset - position, np.uint8))
            for block in blocks:
                write(block)
        write(np.zeros(region.size - position, np.uint8))
    finally:
        os.close(file)
    return digest.digest()


def _reserve(file: int, region: Span) -> None:
    """Have the region's disk blocks now: one by one they cost more than copying does, and a full disk shows early."""
    try:
        os.posix_fallocate(file, region.start, region.size)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise  # others: a file system that cannot
    except AttributeError:
        pass  # a system that cannot


def cast_weight_file(
    coefficients: CoefficientMap, read_weight: WeightReader, target: Path, rounder_of: RounderOf = as_compiler
) -> None:
    """Write the weight file (npz) that the compiler's interpreter reads beside the mould's `*_tpu.mlir`."""
    with zipfile.ZipFile(target, "w") as archive:
        for placement, blocks in _made(coefficients, coefficients.interpreter, read_weight, rounder_of):
            header = {"descr": placement.dtype, "fortran_order": False, "shape": placement.shape}
            with archive.open(f"{placement.array}.npy", "w", force_zip64=True) as file:
                npy.write_array_header_1_0(file, header)
                for block in blocks:
                    file.write(block.data)


def compare_stored(
    bmodel: Path,
    net: str,
    coefficients: CoefficientMap,
    read_weight: WeightReader,
    rounder_of: RounderOf = as_compiler,
) -> dict[str, NDArray[np.float32]]:
    """Read the weights of one net back and compare them with what casting makes of the checkpoint's.

    Args:
        bmodel: a single or combined file.
        net: which of its nets.

    Returns:
        Slot, or key of a constant -> for each of its stored ranges the share of bytes that differ: 0 everywhere in a
        sound file.

    Raises:
        CompileError: no such net, or its weights have another size than the mould's.
    """
    nets = {one.name: one for one in read_bmodel(bmodel).nets}
    if net not in nets:
        raise CompileError(f"{bmodel} has no net {net!r}; it has {', '.join(nets)}")
    if nets[net].coefficients.size != coefficients.size:
        raise CompileError(
            f"{bmodel} has {nets[net].coefficients.size} bytes of weights for net {net}, its mould has "
            f"{coefficients.size}; combine it again"
        )
    differing: dict[str, list[float]] = defaultdict(list)
    with bmodel.open("rb") as file:
        for placement, blocks in _made(coefficients, coefficients.binary, read_weight, rounder_of):
            file.seek(nets[net].coefficients.start + placement.offset)
            wrong = size = 0
            for block in blocks:
                stored = np.frombuffer(file.read(block.size), np.uint8)
                wrong += int(np.count_nonzero(stored != block))
                size += block.size
            differing[placement.form.slot].append(wrong / max(size, 1))
    return {slot: np.array(shares, np.float32) for slot, shares in differing.items()}


def _made(
    coefficients: CoefficientMap,
    placements: tuple[Placement, ...],
    read_weight: WeightReader,
    rounder_of: RounderOf,
) -> Iterator[tuple[Placement, Blocks]]:
    """Every placement with its bytes, in blocks that are good until the next."""
    maker = FormMaker(coefficients.group_size, coefficients.bits, rounder_of)
    rows_of = _row_reader(coefficients, read_weight)
    for placement in placements:
        form = placement.form
        if form.name == "constant":
            yield placement, iter([np.array(bytearray(coefficients.constants[form.slot]), np.uint8)])
        else:
            blocks = maker.blocks(form, rows_of(form.slot))
            yield placement, (block.reshape(-1).view(np.uint8) for block in blocks)


def _row_reader(coefficients: CoefficientMap, read_weight: WeightReader) -> Callable[[str], SlotRows]:
    """Slot -> its rows, from a reader that has `read_rows`, or cut from a whole weight, of which one is kept."""
    read_rows = getattr(read_weight, "read_rows", None)
    kept: dict[str, NDArray[Any]] = {}

    def check(slot: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise CompileError(
                f"slot {slot} gets a weight of shape {list(shape)}, its mould was compiled with {list(expected)}; "
                "make the mould for this checkpoint's config"
            )

    def rows_of(slot: str) -> SlotRows:
        shape = coefficients.shapes[slot]

        def read(start: int, stop: int) -> NDArray[Any]:
            if read_rows is not None:
                block: NDArray[Any] = read_rows(slot, start, stop)
                check(slot, block.shape, (stop - start, *shape[1:]))
                return block
            if slot not in kept:
                kept.clear()
                kept[slot] = read_weight(slot)
                check(slot, kept[slot].shape, shape)
            return kept[slot][start:stop]

        return SlotRows(shape, read)

    return rows_of
