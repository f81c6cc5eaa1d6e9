"""Kernels that bring weights into the number formats and orders of the chip, a block of rows at a time.

All arrays are little-endian; `[O, I]` is torch's layout of a linear weight, `[O, I, H, W]` of a convolution's.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

Storage = Literal["bf16", "f16", "f32"]
# Which sides of a convolution's kernel are counted as input channels, where these alone would not fill a group
Merged = Literal["", "kh", "kw", "khw"]

# lanes of a BM1684X: scales and zero points are dealt out to them row by row
LANES = 64
# input channels of a 16-bit convolution that a lane multiplies at once: 64 bytes
GROUPED_CHANNELS = 32
# rows that are turned at once, and input channels of a strip: the first that divides the matrix, by bytes of a number
TILE = 64
_STRIPS: Mapping[int, tuple[int, ...]] = {2: (256, 128, 64), 4: (64,)}
_WORDS = {2: np.uint16, 4: np.uint32}


def store_as(values: NDArray[Any], storage: Storage) -> NDArray[Any]:
    """Weights in the format in which the compiler stores them, contiguous; bfloat16 as its bits.

    bfloat16 and float16 are to nearest, ties to even. What would be subnormal in bfloat16 becomes a zero of its sign;
    float16 keeps subnormals, and what lies beyond its range becomes infinite.

    Args:
        values: float32, float16 or bfloat16 (ml_dtypes).
    """
    values = np.ascontiguousarray(values)
    narrow = values.dtype == ml_dtypes.bfloat16
    if storage == "bf16":
        bits = np.empty(values.shape, np.uint16)
        _flush(values.astype(ml_dtypes.bfloat16, copy=False).view(np.uint16).reshape(-1), bits.reshape(-1))
        return bits
    if narrow and storage == "f16":
        halves = np.empty(values.shape, np.uint16)
        _look_up(values.view(np.uint16).reshape(-1), _float16_of_bfloat16(), halves.reshape(-1))
        return halves.view(np.float16)
    if narrow:
        wide = np.empty(values.shape, np.uint32)
        _widen(values.view(np.uint16).reshape(-1), wide.reshape(-1))
        values = wide.view(np.float32)
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if storage == "f16" else np.float32, copy=False)


@functools.cache
def _float16_of_bfloat16() -> NDArray[np.uint16]:
    """The float16 of each of the 65536 bfloat16 numbers."""
    wide = (np.arange(1 << 16, dtype=np.uint32) << 16).view(np.float32)
    with np.errstate(all="ignore"):
        return wide.astype(np.float16).view(np.uint16)


class Transposed:
    """A matrix [I, O] of 16 or 32 bits, given as blocks of rows of [O, I] and taken as blocks of its own rows.

    It goes through strips of some input channels: written and read in long runs, and turned in the cache. Straight from
    rows to columns every store is to another page of memory.

    Args:
        shape: [I, O].
        space: memory for the whole matrix.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any], space: NDArray[np.uint8]) -> None:
        self.shape, self.dtype = shape, dtype
        columns, rows = shape
        self._width = next((width for width in _STRIPS[dtype.itemsize] if columns % width == 0), 0)
        if rows % TILE:
            self._width = 0
        word = np.uint64 if self._width else _WORDS[dtype.itemsize]
        in_word = 8 // dtype.itemsize
        strips = (columns // self._width, rows, self._width // in_word) if self._width else (1, columns, rows)
        self._whole: NDArray[Any] = space.view(word).reshape(strips)

    def put(self, block_RI: NDArray[Any], row: int) -> None:
        """Take a block of rows of [O, I], the first of which is `row`."""
        if self._width:
            _to_strips(np.ascontiguousarray(block_RI).view(np.uint64), self._whole, row)
        else:
            _to_columns(block_RI.view(self._whole.dtype), self._whole[0], row)

    def blocks(self, most_bytes: int) -> Iterator[NDArray[Any]]:
        """The rows of [I, O], some at a time; each block is good until the next."""
        columns, rows = self.shape
        if self._width:
            in_word = 8 // self.dtype.itemsize
            turned = np.empty((self._width, rows // in_word), np.uint64)
            tile = np.empty((self._width, TILE // in_word), np.uint64)
            for strip in self._whole:
                (_turn_fours if in_word == 4 else _turn_pairs)(strip, turned, tile)
                yield turned.view(self.dtype)
        else:
            step = max(1, most_bytes // (rows * self.dtype.itemsize))
            for start in range(0, columns, step):
                yield self._whole[0, start : start + step].view(self.dtype)


def deal_lanes(rows_OG: NDArray[Any]) -> NDArray[Any]:
    """[O, G] to [lanes, O / lanes, G]: row r of lane l is row r * 64 + l.

    Raises:
        ValueError: the rows do not divide into the lanes.
    """
    return np.ascontiguousarray(rows_OG.reshape(-1, LANES, rows_OG.shape[1]).transpose(1, 0, 2))


def group_channels(filter_OIHW: NDArray[Any], merged: Merged = "") -> NDArray[Any]:
    """[O, I, H, W] to [O, groups, H * W, 32]: 32 input channels side by side, padded with zeros to whole groups.

    Where a kernel's height, width or both are merged into the input channels, channel i at (h, w) becomes channel
    i * H + h of a kernel of W, i * W + w of a kernel of H, or (i * H + h) * W + w of a kernel of 1.

    Source: found by matching the compiler's output byte for byte.
    """
    out_channels, channels, height, width = filter_OIHW.shape
    if merged == "kw":
        filter_OIHW = filter_OIHW.transpose(0, 1, 3, 2)
    inner = {"": height * width, "kh": width, "kw": height, "khw": 1}[merged]
    taps_OCK = filter_OIHW.reshape(out_channels, channels * height * width // inner, inner)
    groups = -(-taps_OCK.shape[1] // GROUPED_CHANNELS)
    padded = np.zeros((out_channels, groups * GROUPED_CHANNELS, inner), filter_OIHW.dtype)
    padded[:, : taps_OCK.shape[1]] = taps_OCK
    return np.ascontiguousarray(padded.reshape(out_channels, groups, GROUPED_CHANNELS, inner).swapaxes(2, 3))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _flush(source: Any, bits: Any) -> None:
    for i in range(source.size):
        word = source[i]
        bits[i] = word if word & np.uint16(0x7F80) else word & np.uint16(0x8000)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _widen(source: Any, words: Any) -> None:
    for i in range(source.size):
        words[i] = np.uint32(source[i]) << np.uint32(16)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _look_up(source: Any, table: Any, found: Any) -> None:
    for i in range(source.size):
        found[i] = table[source[i]]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _to_columns(block: Any, whole: Any, column: Any) -> None:
    rows, columns = block.shape
    for first in range(0, columns, 32):
        for i in range(first, min(first + 32, columns)):
            for row in range(rows):
                whole[i, column + row] = block[row, i]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _to_strips(block: Any, strips: Any, at: Any) -> None:
    width = strips.shape[2]
    for row in range(block.shape[0]):
        for strip in range(strips.shape[0]):
            for i in range(width):
                strips[strip, at + row, i] = block[row, strip * width + i]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _turn_fours(strip: Any, turned: Any, tile: Any) -> None:
    """Transpose [rows, columns / 4] words of four 16-bit numbers to [columns, rows / 4], 64 rows at a time."""
    low, high = np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFF0000FFFF0000)
    lower, upper = np.uint64(0x00000000FFFFFFFF), np.uint64(0xFFFFFFFF00000000)
    one, two = np.uint64(16), np.uint64(32)
    rows, words = strip.shape
    quads = tile.shape[1]
    for first in range(0, rows, 4 * quads):
        for quad in range(quads):
            row = first + 4 * quad
            row0, row1, row2, row3 = strip[row], strip[row + 1], strip[row + 2], strip[row + 3]
            for i in range(words):
                a, b, c, d = row0[i], row1[i], row2[i], row3[i]
                even01 = (a & low) | ((b & low) << one)
                odd01 = ((a & high) >> one) | (b & high)
                even23 = (c & low) | ((d & low) << one)
                odd23 = ((c & high) >> one) | (d & high)
                tile[4 * i, quad] = (even01 & lower) | (even23 << two)
                tile[4 * i + 1, quad] = (odd01 & lower) | (odd23 << two)
                tile[4 * i + 2, quad] = (even01 >> two) | (even23 & upper)
                tile[4 * i + 3, quad] = (odd01 >> two) | (odd23 & upper)
        for i in range(4 * words):
            target, source = turned[i], tile[i]
            for quad in range(quads):
                target[first // 4 + quad] = source[quad]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _turn_pairs(strip: Any, turned: Any, tile: Any) -> None:
    """Transpose [rows, columns / 2] words of two 32-bit numbers to [columns, rows / 2], 64 rows at a time."""
    lower, upper = np.uint64(0x00000000FFFFFFFF), np.uint64(0xFFFFFFFF00000000)
    one = np.uint64(32)
    rows, words = strip.shape
    pairs = tile.shape[1]
    for first in range(0, rows, 2 * pairs):
        for pair in range(pairs):
            row0, row1 = strip[first + 2 * pair], strip[first + 2 * pair + 1]
            for i in range(words):
                a, b = row0[i], row1[i]
                tile[2 * i, pair] = (a & lower) | (b << one)
                tile[2 * i + 1, pair] = (a >> one) | (b & upper)
        for i in range(2 * words):
            target, source = turned[i], tile[i]
            for pair in range(pairs):
                target[first // 2 + pair] = source[pair]
