"""The forms in which TPU-MLIR stores a weight, and how each is made from the weight as the checkpoint has it.

A weight is given in torch's layout: [O, I] for a matrix, [O, I, H, W] for a convolution. Forms are row-major and
little-endian:

- `codes`, `scale`, `zero`: quantized, see `fluxkiln.quantize.pack`; `_lanes`: rows dealt out to the chip's lanes;
- `bf16`, `f16`, `f32`: as it stands, biases and F32 convolutions; `_t`: [I, O], matrices;
- `bf16_grouped`, `f16_grouped`: convolutions, input channels in groups, see `reorder.group_channels`; `_kh`, `_kw`,
  `_khw`: with these sides of the kernel merged into few input channels;
- `bf16_diagonal`, `f16_diagonal`: a scale per channel, as the 1 x 1 convolution of all channels that multiplies by it;
- `constant`: bytes that no weight has a part in (tables, masks, the frequencies of a time embedding).

The compiler cuts some weights into equal chunks: wide AdaLN projections along the output channels, matrices of 16 bits
along the input channels. A product by a constant is merged into the convolution before it: `factor`.

Source: found by matching the compiler's output byte for byte (`fluxkiln.compile.toolchains.tpu_mlir.coefficients`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.toolchains.tpu_mlir.reorder import (
    GROUPED_CHANNELS,
    TILE,
    Merged,
    Storage,
    Transposed,
    deal_lanes,
    group_channels,
    store_as,
)
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounders import as_compiler

# how many equal slices the compiler has been seen to cut a weight into
CHUNKS = (1, 2, 3, 4, 6)
# the tiny VAE ends in x * 2 - 1
FACTORS = (1.0, 2.0)
# bytes of a weight that are read at once: what is made of them is still in the cache when it is written and hashed
BLOCK_BYTES = 1 << 20

FormName = Literal[
    "codes", "scale", "zero", "scale_lanes", "zero_lanes",
    "bf16", "f16", "f32", "bf16_t", "f16_t", "f32_t",
    "bf16_grouped", "bf16_grouped_kh", "bf16_grouped_kw", "bf16_grouped_khw",
    "f16_grouped", "f16_grouped_kh", "f16_grouped_kw", "f16_grouped_khw",
    "bf16_diagonal", "f16_diagonal",
    "constant",
]  # fmt: skip
_MERGED: tuple[Merged, ...] = ("", "kh", "kw", "khw")
_ITEM_BYTES = {"bf16": 2, "f16": 2, "f32": 4}


@dataclass(frozen=True, slots=True)
class Form:
    """One stored form of one slot.

    Attributes:
        slot: its name; of a constant, the key of its bytes.
        chunk, chunks: which of how many equal slices along `axis`, 0 for output and 1 for input channels.
        factor: what the weight is multiplied by, in float32, before it is stored.
    """

    slot: str
    name: FormName
    chunk: int = 0
    chunks: int = 1
    axis: int = 0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class SlotRows:
    """A slot's weight, to be read some rows at a time: `read(start, stop)` gives [stop - start, ...]."""

    shape: tuple[int, ...]
    read: Callable[[int, int], NDArray[Any]]


def candidates(slot: str, shape: tuple[int, ...], group_size: int) -> Iterator[Form]:
    """Every form that a slot of this shape can have.

    Args:
        group_size: of the scheme's codes; 0 when it does not quantize.
    """
    matrix = len(shape) == 2
    names: list[str] = []
    if matrix and group_size and shape[1] % group_size == 0:
        names += ["codes", "scale", "zero", "scale_lanes", "zero_lanes"]
    names += [storage + suffix for storage in _ITEM_BYTES for suffix in (("_t", "") if matrix else ("",))]
    if len(shape) == 1 and shape[0] <= GROUPED_CHANNELS:
        names += ["bf16_diagonal", "f16_diagonal"]
    if len(shape) == 4:
        names += [f"{storage}_grouped{'_' if sides else ''}{sides}" for storage in ("bf16", "f16") for sides in _MERGED]
    for name in names:
        for axis in (0, 1) if name.endswith("_t") else (0,):
            for chunks in CHUNKS if len(shape) <= 2 and "diagonal" not in name else (1,):
                if shape[axis] % chunks or (axis and chunks == 1):
                    continue
                for chunk in range(chunks):
                    for factor in (1.0,) if matrix else FACTORS:
                        yield Form(slot, cast("FormName", name), chunk, chunks, axis, factor)


def form_bytes(form: Form, shape: tuple[int, ...], group_size: int, bits: int) -> int:
    """How many bytes the form of a slot of this shape has."""
    elements = math.prod(shape) // form.chunks
    kind, *rest = form.name.split("_")
    if kind == "codes":
        return elements * bits // 8
    if kind in ("scale", "zero"):
        return elements // group_size * (2 if kind == "scale" else 1)
    if rest == ["diagonal"]:
        elements = shape[0] * GROUPED_CHANNELS
    if rest[:1] == ["grouped"]:
        out_channels, channels, height, width = shape
        inner = {"": height * width, "kh": width, "kw": height, "khw": 1}["".join(rest[1:])]
        groups = -(-(channels * height * width // inner) // GROUPED_CHANNELS)
        elements = out_channels * groups * GROUPED_CHANNELS * inner
    return elements * _ITEM_BYTES[kind]


class FormMaker:
    """Makes forms in blocks that are to be stored one after the other.

    What scales and zero points need of the codes is kept from making those. Not for several threads.

    Args:
        group_size, bits: of the scheme's codes; 0 when it does not quantize.
        rounder_of: slot -> what makes its codes.
    """

    def __init__(self, group_size: int, bits: int, rounder_of: RounderOf = as_compiler) -> None:
        self.group_size = group_size
        self.bits = bits
        self.rounder_of = rounder_of
        self._sides: dict[tuple[str, int, int], tuple[NDArray[np.uint16], NDArray[np.uint8]]] = {}
        self._scratch = np.empty(0, np.uint8)

    def blocks(self, form: Form, rows: SlotRows) -> Iterator[NDArray[Any]]:
        """The form as contiguous arrays; each is good until the next is asked for.

        Raises:
            ValueError: the rows do not divide into the lanes.
        """
        kind, *rest = form.name.split("_")
        if kind == "codes":
            yield from self._codes(form, rows)
        elif kind in ("scale", "zero"):
            side = self._side(form, rows)
            yield deal_lanes(side) if rest else side
        elif rest == ["t"]:
            yield from self._transposed(form, rows)
        else:
            storage = cast("Storage", kind)
            for start, stop in _row_blocks(form, rows):
                stored = store_as(_multiplied(rows.read(start, stop), form.factor), storage)
                if rest == ["diagonal"]:
                    yield group_channels(np.diag(stored)[:, :, None, None])
                elif rest:
                    yield group_channels(stored, cast("Merged", "".join(rest[1:])))
                else:
                    yield stored

    def make(self, form: Form, rows: SlotRows) -> NDArray[np.uint8]:
        """The whole form as bytes."""
        return np.frombuffer(b"".join(block.tobytes() for block in self.blocks(form, rows)), np.uint8)

    def _codes(self, form: Form, rows: SlotRows) -> Iterator[NDArray[np.uint8]]:
        count, columns = rows.shape[0] // form.chunks, rows.shape[1]
        scales = np.empty((count, columns // self.group_size), np.uint16)
        zeros = np.empty(scales.shape, np.uint8)
        first = form.chunk * count
        pack_into = self.rounder_of(form.slot, None)
        for start, stop in _row_blocks(form, rows):
            codes = np.empty((stop - start, columns * self.bits // 8), np.uint8)
            own = slice(start - first, stop - first)
            pack_into(rows.read(start, stop), self.bits, codes, scales[own], zeros[own])
            yield codes
        self._sides[form.slot, form.chunk, form.chunks] = scales, zeros

    def _side(self, form: Form, rows: SlotRows) -> NDArray[Any]:
        key = (form.slot, form.chunk, form.chunks)
        if key not in self._sides:
            for _ in self._codes(form, rows):
                pass
        return self._sides[key][0 if form.name.startswith("scale") else 1]

    def _transposed(self, form: Form, rows: SlotRows) -> Iterator[NDArray[Any]]:
        storage = cast("Storage", form.name.removesuffix("_t"))
        count, columns = (size // (form.chunks if form.axis == axis else 1) for axis, size in enumerate(rows.shape))
        first = 0 if form.axis else form.chunk * count
        left = form.chunk * columns if form.axis else 0
        dtype = np.dtype({"bf16": np.uint16, "f16": np.float16}.get(storage, np.float32))
        whole = Transposed((columns, count), dtype, self._space(columns * count * dtype.itemsize))
        for start, stop in _row_blocks(form, rows):
            whole.put(store_as(rows.read(start, stop)[:, left : left + columns], storage), start - first)
        yield from whole.blocks(BLOCK_BYTES)

    def _space(self, size: int) -> NDArray[np.uint8]:
        """Memory for one whole form, used again for the next: fresh pages cost as much as the reordering."""
        if self._scratch.size < size:
            self._scratch = np.empty(0, np.uint8)  # first let go of the old
            self._scratch = np.empty(size, np.uint8)
        return self._scratch[:size]


def _row_blocks(form: Form, rows: SlotRows) -> Iterator[tuple[int, int]]:
    """First and last row of each block of a form's rows; a convolution is one."""
    count = rows.shape[0] if form.axis else rows.shape[0] // form.chunks
    first = 0 if form.axis else form.chunk * count
    row_bytes = 2 * math.prod(rows.shape[1:])
    step = count if len(rows.shape) == 4 else max(TILE, BLOCK_BYTES // row_bytes // TILE * TILE)
    for start in range(first, first + count, step):
        yield start, min(start + step, first + count)


def _multiplied(weight: NDArray[Any], factor: float) -> NDArray[Any]:
    return weight if factor == 1.0 else weight.astype(np.float32) * np.float32(factor)
