"""The forms in which TPU-MLIR stores a weight, and how each is made from the weight as the checkpoint has it.

A weight is given in torch's layout: [O, I] for a matrix, [O, I, H, W] for a convolution. Forms are row-major and
little-endian:

- `codes`, `scale`, `zero`: quantized, see `fluxkiln.quantize.pack`; `_lanes`: rows dealt out to 64 lanes, a BM1684X's;
  `_lanes32`: to 32, a BM1688's; `pairs`: both as bfloat16, the zero point first, a BM1684X2's;
- `bf16`, `f16`, `f32`: as it stands, biases and F32 convolutions; `_t`: [I, O], matrices;
- `bf16_grouped`, `f16_grouped`: convolutions, input channels in groups of 32, see `group_channels`; `grouped16`,
  `grouped8`: of as many, other chips'; `_kh`, `_kw`, `_khw`: with these sides of the kernel merged into few of them;
- `bf16_diagonal`, `f16_diagonal`: a scale per channel, as the 1 x 1 convolution of all channels that multiplies by it;
- `integer_codes`: int8 [I, O]; `integer_multiplier`, `integer_bias`: int32 [O], see `fluxkiln.quantize.integer`;
- `constant`: bytes that no weight has a part in (tables, masks, the frequencies of a time embedding).

The compiler cuts some weights into equal chunks: wide AdaLN projections along the output channels, matrices of 16 bits
along the input channels. A product by a constant is merged into the convolution before it: `factor`.

Source: found by matching the compiler's output byte for byte (`fluxkiln.compile.toolchains.tpu_mlir.coefficients`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.toolchains.tpu_mlir.transposed import TILE, WORDS, Transposed
from fluxkiln.quantize.integer import (
    INPUT_SCALE,
    LARGEST_MULTIPLIER,
    OUTPUT_SCALE,
    integer_bias,
    integer_multipliers,
    pack_integer,
)
from fluxkiln.quantize.pack import RounderOf, to_bf16_bits
from fluxkiln.quantize.rounders import as_compiler

# how many equal slices the compiler has been seen to cut a weight into
CHUNKS = (1, 2, 3, 4, 6)
# the tiny VAE ends in x * 2 - 1
FACTORS = (1.0, 2.0)
# bytes of a weight that are read at once: what is made of them is still in the cache when it is written and hashed
BLOCK_BYTES = 1 << 20

CODES, BIAS, MULTIPLIER = "integer_codes", "integer_bias", "integer_multiplier"
Storage = Literal["bf16", "f16", "f32"]
# which sides of a convolution's kernel are counted as input channels, where these alone would not fill a group
_MERGED = ("", "kh", "kw", "khw")
# to whose lanes scales and zero points are dealt out row by row: ends of names, and how many there are
LANES: Mapping[str, int] = {"lanes": 64, "lanes32": 32}
# input channels of a 16-bit convolution that a lane multiplies at once: ends of names, and how many there are
GROUPED: Mapping[str, int] = {"": 32, "16": 16, "8": 8}
# of a group
_SIDE_BYTES: Mapping[str, int] = {"scale": 2, "zero": 1, "pairs": 4}
_DTYPES: Mapping[str, Any] = {"bf16": np.dtype(np.uint16), "f16": np.dtype(np.float16), "f32": np.dtype(np.float32)}


@dataclass(frozen=True, slots=True)
class Form:
    """One stored form of one slot.

    Attributes:
        slot: its name; of a constant, the key of its bytes.
        chunk, chunks: which of how many equal slices along `axis`, 0 for output and 1 for input channels.
        factor: what the weight is multiplied by, in float32, before it is stored.
        shift: of a multiplier, how many bits its products are shifted by.
        weight: of a bias in integers, the slot that it is added to the products of.
    """

    slot: str
    name: str
    chunk: int = 0
    chunks: int = 1
    axis: int = 0
    factor: float = 1.0
    shift: int = 0
    weight: str = ""


@dataclass(frozen=True, slots=True)
class SlotRows:
    """A slot's weight, to be read some rows at a time: `read(start, stop)` gives [stop - start, ...]."""

    shape: tuple[int, ...]
    read: Callable[[int, int], NDArray[Any]]


def candidates(slot: str, shape: tuple[int, ...], group_size: int) -> Iterator[Form]:
    """Every form that a slot of this shape can have; `group_size` is 0 when the scheme does not quantize."""
    matrix = len(shape) == 2
    names: list[str] = []
    if matrix and group_size and shape[1] % group_size == 0:
        names += ["codes", "pairs", *("_".join([side, *dealt]) for dealt in ((), *((one,) for one in LANES))
                             for side in ("scale", "zero"))]  # fmt: skip
    names += [storage + suffix for storage in _DTYPES for suffix in (("_t", "") if matrix else ("",))]
    if len(shape) == 1:
        names += [f"{storage}_diagonal{own}" for storage in ("bf16", "f16") for own, width in GROUPED.items()
                  if shape[0] <= width]  # fmt: skip
    if len(shape) == 4:
        names += [f"{storage}_grouped{own}{'_' if sides else ''}{sides}"
                  for storage in ("bf16", "f16") for own in GROUPED for sides in _MERGED]  # fmt: skip
    for name in names:
        for axis in (0, 1) if name.endswith("_t") else (0,):
            for chunks in CHUNKS if len(shape) <= 2 and "diagonal" not in name else (1,):
                if shape[axis] % chunks or (axis and chunks == 1):
                    continue
                for chunk in range(chunks):
                    for factor in (1.0,) if matrix else FACTORS:
                        yield Form(slot, name, chunk, chunks, axis, factor)


def integer_candidates(slot: str, shape: tuple[int, ...], scales: Mapping[str, NDArray[np.float64]]) -> Iterator[Form]:
    """Every form that a slot can have as a weight in integers, or beside one; `scales`: those of all their rows."""
    if slot in scales:
        yield Form(slot, CODES)
        yield from (Form(slot, MULTIPLIER, shift=shift) for shift in likely_shifts(scales[slot]))
    elif len(shape) == 1:
        yield from (Form(slot, BIAS, weight=weight) for weight, own in scales.items() if own.shape == shape)


def likely_shifts(scales_O: NDArray[np.float64]) -> range:
    """Shifts that the multipliers of a weight can have: the largest has 12 to 31 bits."""
    most = math.floor(math.log2(LARGEST_MULTIPLIER / float(scales_O.max()) / (INPUT_SCALE / OUTPUT_SCALE)))
    return range(max(most - 20, 0), most + 1)


def whole_rows(weight: NDArray[Any]) -> SlotRows:
    """The rows of a weight that is in memory."""
    return SlotRows(weight.shape, lambda start, stop: weight[start:stop])


def form_bytes(form: Form, shape: tuple[int, ...], group_size: int, bits: int) -> int:
    """How many bytes the form of a slot of this shape has."""
    elements = math.prod(shape) // form.chunks
    kind, *rest = form.name.split("_")
    if kind == "codes":
        return elements * bits // 8
    if kind == "integer":
        return elements if form.name == CODES else 4 * shape[0]
    if kind in _SIDE_BYTES:
        return elements // group_size * _SIDE_BYTES[kind]
    if rest and rest[0].startswith("diagonal"):
        elements = shape[0] * group_width(rest[0])
    if rest and rest[0].startswith("grouped"):
        inner, width = _unmerged(shape, "".join(rest[1:])), group_width(rest[0])
        elements = shape[0] * -(-math.prod(shape[1:]) // inner // width) * width * inner
    return elements * int(_DTYPES[kind].itemsize)


class FormMaker:
    """Makes forms in blocks that are to be stored one after the other.

    What scales and zero points need of the codes is kept from making those. Not for several threads. `group_size` and
    `bits` are those of the scheme's codes, 0 when it does not quantize; `rounder_of`: slot -> what makes its codes;
    `rows_of`: slot -> its rows, for forms that are made of two.
    """

    def __init__(
        self,
        group_size: int,
        bits: int,
        rounder_of: RounderOf = as_compiler,
        rows_of: Callable[[str], SlotRows] | None = None,
    ) -> None:
        self.group_size, self.bits, self.rounder_of, self.rows_of = group_size, bits, rounder_of, rows_of
        self._row_scales: dict[str, NDArray[np.float64]] = {}
        self._sides: dict[tuple[str, int, int], tuple[NDArray[np.uint16], NDArray[np.uint8]]] = {}
        self._scratch = np.empty(0, np.uint8)

    def blocks(self, form: Form, rows: SlotRows) -> Iterator[NDArray[Any]]:
        """The form as contiguous arrays, each good until the next is asked for; ValueError as `deal_lanes`."""
        kind, *rest = form.name.split("_")
        if kind == "codes":
            yield from self._codes(form, rows)
        elif kind in _SIDE_BYTES:
            scales, zeros = self._sides_of(form, rows)
            side: NDArray[Any] = zeros if kind == "zero" else scales
            if kind == "pairs":
                side = np.stack([to_bf16_bits(zeros.astype(np.float32)), scales], axis=-1)
            yield deal_lanes(side, LANES[rest[0]]) if rest else side
        elif form.name == BIAS:
            yield integer_bias(rows.read(0, rows.shape[0]), self.row_scales(form.weight))
        elif form.name == MULTIPLIER:
            yield integer_multipliers(self.row_scales(form.slot, rows), form.shift, form.slot)
        elif form.name == CODES:
            yield from self._integers(form, rows)
        elif rest == ["t"]:
            yield from self._transposed(form, rows)
        else:
            for start, stop in _row_blocks(form, rows):
                weight = rows.read(start, stop)
                weight = weight if form.factor == 1.0 else weight.astype(np.float32) * np.float32(form.factor)
                stored = store_as(weight, cast("Storage", kind))
                if rest and rest[0].startswith("diagonal"):
                    yield group_channels(np.diag(stored)[:, :, None, None], width=group_width(rest[0]))
                elif rest:
                    yield group_channels(stored, "".join(rest[1:]), group_width(rest[0]))
                else:
                    yield stored

    def make(self, form: Form, rows: SlotRows) -> NDArray[np.uint8]:
        """The whole form as bytes."""
        return np.frombuffer(b"".join(block.tobytes() for block in self.blocks(form, rows)), np.uint8)

    def _codes(self, form: Form, rows: SlotRows) -> Iterator[NDArray[np.uint8]]:
        own, columns = _own_rows(form, rows), rows.shape[1]
        scales = np.empty((len(own), columns // self.group_size), np.uint16)
        zeros = np.empty(scales.shape, np.uint8)
        pack_into = self.rounder_of(form.slot, None)
        for start, stop in _row_blocks(form, rows):
            codes = np.empty((stop - start, columns * self.bits // 8), np.uint8)
            place = slice(start - own.start, stop - own.start)
            pack_into(rows.read(start, stop), self.bits, codes, scales[place], zeros[place])
            yield codes
        self._sides[form.slot, form.chunk, form.chunks] = scales, zeros

    def _sides_of(self, form: Form, rows: SlotRows) -> tuple[NDArray[np.uint16], NDArray[np.uint8]]:
        key = (form.slot, form.chunk, form.chunks)
        if key not in self._sides:
            for _ in self._codes(form, rows):
                pass
        return self._sides[key]

    def _transposed(self, form: Form, rows: SlotRows) -> Iterator[NDArray[Any]]:
        storage = cast("Storage", form.name.removesuffix("_t"))
        dtype, own = _DTYPES[storage], _own_rows(form, rows)
        columns = rows.shape[1] // (form.chunks if form.axis else 1)
        left = form.chunk * columns if form.axis else 0
        whole = Transposed((columns, len(own)), dtype, self._space(columns * len(own) * dtype.itemsize))
        for start, stop in _row_blocks(form, rows):
            whole.put(store_as(rows.read(start, stop)[:, left : left + columns], storage), start - own.start)
        yield from whole.blocks(BLOCK_BYTES)

    def _integers(self, form: Form, rows: SlotRows) -> Iterator[NDArray[Any]]:
        count, columns = rows.shape
        whole = Transposed((columns, count), np.dtype(np.int8), self._space(columns * count))
        scales = np.empty(count)
        for start, stop in _row_blocks(form, rows):
            packed = pack_integer(rows.read(start, stop))
            scales[start:stop] = packed.scales_O
            whole.put(packed.codes_OI, start)
        self._row_scales[form.slot] = scales
        yield from whole.blocks(BLOCK_BYTES)

    def row_scales(self, slot: str, rows: SlotRows | None = None) -> NDArray[np.float64]:
        """Of the rows of a weight in integers, float64 [O]; kept from making its codes, or made now."""
        if slot not in self._row_scales:
            if rows is None:
                assert self.rows_of is not None
                rows = self.rows_of(slot)
            blocks = _row_blocks(Form(slot, CODES), rows)
            self._row_scales[slot] = np.concatenate([pack_integer(rows.read(*block)).scales_O for block in blocks])
        return self._row_scales[slot]

    def _space(self, size: int) -> NDArray[np.uint8]:
        """Memory for one whole form, used again for the next: fresh pages cost as much as the reordering."""
        if self._scratch.size < size:
            self._scratch = np.empty(0, np.uint8)  # first let go of the old
            self._scratch = np.empty(size, np.uint8)
        return self._scratch[:size]


def _own_rows(form: Form, rows: SlotRows) -> range:
    """The rows of the weight that are in the form."""
    count = rows.shape[0] if form.axis else rows.shape[0] // form.chunks
    first = 0 if form.axis else form.chunk * count
    return range(first, first + count)


def _row_blocks(form: Form, rows: SlotRows) -> Iterator[tuple[int, int]]:
    """First and last row of each block of a form's rows; a convolution is one."""
    own, row_bytes = _own_rows(form, rows), 2 * math.prod(rows.shape[1:])
    step = len(own) if len(rows.shape) == 4 else max(TILE, BLOCK_BYTES // row_bytes // TILE * TILE)
    for start in own[::step]:
        yield start, min(start + step, own.stop)


def store_as(values: NDArray[Any], storage: Storage) -> NDArray[Any]:
    """Weights in the format in which the compiler stores them, contiguous; bfloat16 as its bits.

    bfloat16 and float16 are to nearest, ties to even. What would be subnormal in bfloat16 becomes a zero of its sign;
    float16 keeps subnormals, and what lies beyond its range becomes infinite.

    Args:
        values: float32, float16 or bfloat16 (ml_dtypes).
    """
    values = np.ascontiguousarray(values)
    if storage == "bf16":
        bits = np.empty(values.shape, np.uint16)
        _flush(values.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16).reshape(-1), bits.reshape(-1))
        return bits
    dtype = _DTYPES[storage]
    if values.dtype == ml_dtypes.bfloat16:
        words = np.empty(values.shape, WORDS[dtype.itemsize])
        _look_up(values.view(np.uint16).reshape(-1), _bfloat16_as(dtype), words.reshape(-1))
        return words.view(dtype)
    with np.errstate(over="ignore"):
        return values.astype(dtype, copy=False)


@functools.cache
def _bfloat16_as(dtype: np.dtype[Any]) -> NDArray[Any]:
    """The bits in another format of each of the 65536 bfloat16 numbers."""
    wide = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return wide.astype(dtype).view(WORDS[dtype.itemsize])


def deal_lanes(rows_OG: NDArray[Any], lanes: int) -> NDArray[Any]:
    """[O, G] to [lanes, O / lanes, G]: row r of lane l is row r * lanes + l; ValueError where lanes do not divide O."""
    return np.ascontiguousarray(rows_OG.reshape(-1, lanes, rows_OG.shape[1]).transpose(1, 0, 2))


def group_width(name: str) -> int:
    """How many channels a group of `grouped`, `diagonal16` and so on has."""
    return GROUPED[name.removeprefix("grouped").removeprefix("diagonal")]


def group_channels(filter_OIHW: NDArray[Any], merged: str = "", width: int = GROUPED[""]) -> NDArray[Any]:
    """[O, I, H, W] to [O, groups, H * W, width]: input channels side by side, padded with zeros to whole groups.

    Where a kernel's height, width or both are merged into the input channels, channel i at (h, w) becomes channel
    i * H + h of a kernel of W, i * W + w of a kernel of H, or (i * H + h) * W + w of a kernel of 1.
    """
    out_channels, inner = filter_OIHW.shape[0], _unmerged(filter_OIHW.shape, merged)
    if merged == "kw":
        filter_OIHW = filter_OIHW.transpose(0, 1, 3, 2)
    taps_OCK = filter_OIHW.reshape(out_channels, -1, inner)
    groups = -(-taps_OCK.shape[1] // width)
    padded = np.zeros((out_channels, groups * width, inner), filter_OIHW.dtype)
    padded[:, : taps_OCK.shape[1]] = taps_OCK
    return np.ascontiguousarray(padded.reshape(out_channels, groups, width, inner).swapaxes(2, 3))


def _unmerged(shape: tuple[int, ...], merged: str) -> int:
    """How many taps of a kernel [O, I, H, W] are not merged into its input channels."""
    return {"": shape[2] * shape[3], "kh": shape[3], "kw": shape[2], "khw": 1}[merged]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _flush(source: Any, bits: Any) -> None:
    for i in range(source.size):
        word = source[i]
        bits[i] = word if word & np.uint16(0x7F80) else word & np.uint16(0x8000)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _look_up(source: Any, table: Any, found: Any) -> None:
    for i in range(source.size):
        found[i] = table[source[i]]
