"""Kernels of changed weights. A number is a sum in a fixed order without fused multiply-adds: the same bits for whoever
reads a row, with which other rows, and on which machine. numba is imported by whoever needs it only."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# columns of the factors that stay in the nearest cache, and terms that are added in one go
_COLUMNS, _TERMS = 1024, 4


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def add_product(values_OI: Any, up_OR: Any, down_RI: Any, factor: Any) -> None:
    """values += factor * (up @ down), all float32."""
    rows, width = values_OI.shape
    rank = down_RI.shape[0]
    whole = rank - rank % _TERMS
    total = np.empty(_COLUMNS, np.float32)
    for left in range(0, width, _COLUMNS):
        stop = min(left + _COLUMNS, width)
        size = stop - left
        for row in range(rows):
            total[:size] = 0
            for r in range(0, whole, _TERMS):
                a, b, c, d = up_OR[row, r], up_OR[row, r + 1], up_OR[row, r + 2], up_OR[row, r + 3]
                one, two = down_RI[r][left:stop], down_RI[r + 1][left:stop]
                three, four = down_RI[r + 2][left:stop], down_RI[r + 3][left:stop]
                for i in range(size):
                    total[i] = (((total[i] + a * one[i]) + b * two[i]) + c * three[i]) + d * four[i]
            for r in range(whole, rank):
                a, one = up_OR[row, r], down_RI[r][left:stop]
                for i in range(size):
                    total[i] += a * one[i]
            line = values_OI[row][left:stop]
            for i in range(size):
                line[i] += factor * total[i]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def widen_bits(bits: Any, wide: Any) -> None:
    """bfloat16 bits -> float32 bits."""
    for i in range(bits.size):
        wide[i] = np.uint32(bits[i]) << np.uint32(16)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_bits(wide: Any, bits: Any) -> Any:
    """float32 bits -> bfloat16 bits, to nearest, ties to even. Returns whether all of these are finite."""
    highest = np.uint32(0)
    for i in range(bits.size):
        value = wide[i]
        bits[i] = np.uint16(np.uint32(value + np.uint32(0x7FFF + ((value >> np.uint32(16)) & np.uint32(1)))) >> 16)
        highest = max(highest, np.uint32(value & np.uint32(0x7FFFFFFF)))
    return highest < np.uint32(0x7F7F8000)  # from here on it is rounded to Inf


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def scale_rows(values_OI: Any, magnitude_O: Any) -> None:
    """Give every row the length that `magnitude_O` says; sums of squares in float64."""
    for row in range(values_OI.shape[0]):
        total = 0.0
        for i in range(values_OI.shape[1]):
            total += np.float64(values_OI[row, i]) ** 2
        factor = np.float32(magnitude_O[row] / np.sqrt(total))
        for i in range(values_OI.shape[1]):
            values_OI[row, i] *= factor
