"""Matrices turned from rows to columns while they are made, some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

# rows that are turned at once, and input channels of a strip: the first that divides the matrix, by bytes of a number
TILE = 64
_STRIPS: Mapping[int, tuple[int, ...]] = {2: (256, 128, 64), 4: (64,)}
WORDS: Mapping[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32}


class Transposed:
    """A matrix [I, O] of 8, 16 or 32 bits, given as blocks of rows of [O, I] and taken as blocks of its own rows.

    It goes through strips of some input channels: written and read in long runs, and turned in the cache. Straight from
    rows to columns every store is to another page of memory.

    Args:
        shape: [I, O].
        space: memory for the whole matrix.
    """

    def __init__(self, shape: tuple[int, int], dtype: np.dtype[Any], space: NDArray[np.uint8]) -> None:
        self.shape, self.dtype = shape, dtype
        columns, rows = shape
        widths = () if rows % TILE else _STRIPS.get(dtype.itemsize, ())
        self._width = next((width for width in widths if columns % width == 0), 0)
        self._in_word = 8 // dtype.itemsize
        strips = (columns // self._width, rows, self._width // self._in_word) if self._width else (1, columns, rows)
        self._whole: NDArray[Any] = space.view(np.uint64 if self._width else WORDS[dtype.itemsize]).reshape(strips)

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
            turned = np.empty((self._width, rows // self._in_word), np.uint64)
            tile = np.empty((self._width, TILE // self._in_word), np.uint64)
            for strip in self._whole:
                (_turn_fours if self._in_word == 4 else _turn_pairs)(strip, turned, tile)
                yield turned.view(self.dtype)
        else:
            step = max(1, most_bytes // (rows * self.dtype.itemsize))
            for start in range(0, columns, step):
                yield self._whole[0, start : start + step].view(self.dtype)


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
