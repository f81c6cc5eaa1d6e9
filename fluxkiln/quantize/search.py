"""Searched scales and zero points: where a group's 16 or 256 levels lie, chosen by the error they leave.

A level is (code - zero point) * scale, so all levels are multiples of the scale. For each of some scales the zero point
puts the levels in the middle of the group's range, the codes are the nearest ones, and two sums over them say all that
is needed: with q = code - zero point, the least-squares scale of these codes is sum(q w) / sum(q q), and it leaves
sum(w w) - sum(q w)^2 / sum(q q). With `refit` the codes that leave least get their least-squares scale; without, the
tried ones are compared as they are. Either way the codes are then made once more, with the
scale as it is stored: in bfloat16. Twelve scales come within 0.1 % of trying 60 scales with all 16 zero points
(`tests/quantize/test_search.py`).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.quantize.pack import kernel_input, round_word, store_codes, widen_row

# scales that are tried, in units of the one that spans the whole range
SHRINKS = tuple(round(0.84 + 0.24 * step / 11, 4) for step in range(12))
# symmetric levels reach one step further down than up, and fit fewer tails
SYMMETRIC_SHRINKS = tuple(round(0.72 + 0.4 * step / 15, 4) for step in range(16))
# below this a group is stored as zeros
LEAST_RANGE = 1e-30

# float32 sums may be reordered: what is chosen by them is exact all the same
_FAST = {"nnan", "ninf", "nsz", "reassoc", "contract", "arcp"}


def search_into(
    weight_OI: NDArray[Any],
    bits: int,
    codes_OI: NDArray[np.uint8],
    scales_OG: NDArray[np.uint16],
    zeros_OG: NDArray[np.uint8],
    refit: bool = True,
    symmetric: bool = False,
) -> None:
    """As `pack.pack_into`, with searched scales.

    Args:
        weight_OI: finite, float32 or bfloat16 (ml_dtypes).
        refit: codes get the least-squares scale.
        symmetric: every zero point is the middle level, 8 or 128.
    """
    shrinks = np.array(SYMMETRIC_SHRINKS if symmetric else SHRINKS, np.float32)
    _search_rows(*kernel_input(weight_OI), bits, shrinks, refit, symmetric, codes_OI, (scales_OG, zeros_OG))


@numba.njit(cache=True, nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _sums(values: Any, inverse: Any, zero: Any, top: Any) -> Any:
    """sum(q q) and sum(q w) of the nearest codes."""
    squares, products = np.float32(0.0), np.float32(0.0)
    shift, most = zero + np.float32(0.5), top + np.float32(0.5)
    for i in range(values.size):
        # what is left of 0.5 and more after the shift is never negative, so truncating rounds
        q = np.float32(np.int32(min(max(values[i] * inverse + shift, np.float32(0.0)), most))) - zero
        squares += q * q
        products += q * values[i]
    return squares, products


@numba.njit(cache=True, nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _weighted_sums(values: Any, importance: Any, inverse: Any, zero: Any, top: Any) -> Any:
    squares, products = np.float32(0.0), np.float32(0.0)
    shift, most = zero + np.float32(0.5), top + np.float32(0.5)
    for i in range(values.size):
        q = np.float32(np.int32(min(max(values[i] * inverse + shift, np.float32(0.0)), most))) - zero
        squares += importance[i] * q * q
        products += importance[i] * q * values[i]
    return squares, products


@numba.njit(cache=True, nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _spread(values: Any) -> Any:
    low, high = np.float32(0.0), np.float32(0.0)
    for i in range(values.size):
        low = min(low, values[i])
        high = max(high, values[i])
    return low, high


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def middle_zero(low: Any, high: Any, scale: Any, top: Any) -> Any:
    """The zero point that clips both ends of a range alike."""
    zero = np.float32(0.5) * (top - (low + high) / scale) + np.float32(0.5)
    return np.float32(np.int32(min(max(zero, np.float32(0.0)), top + np.float32(0.5))))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def fit_group(values: Any, importance: Any, shrinks: Any, top: Any) -> Any:
    """Scale and zero point of one group that leave the least weighted squared error."""
    low, high = _spread(values)
    span = max(high - low, np.float32(LEAST_RANGE)) / top
    best, scale, zero = np.float32(0.0), span, middle_zero(low, high, span, top)
    for step in range(shrinks.size):
        tried = span * shrinks[step]
        middle = middle_zero(low, high, tried, top)
        squares, products = _weighted_sums(values, importance, np.float32(1.0) / tried, middle, top)
        if squares > np.float32(0.0) and products > np.float32(0.0) and products * (products / squares) > best:
            best, scale, zero = products * (products / squares), products / squares, middle
    return scale, zero


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _search(values: Any, shrinks: Any, top: Any, refit: Any, symmetric: Any) -> Any:
    low, high = _spread(values)
    if symmetric:
        high = max(high, -low)
        low = -high
    span = max(high - low, np.float32(LEAST_RANGE)) / top
    centre = (top + np.float32(1.0)) * np.float32(0.5)
    best, scale = np.float32(0.0), span
    zero = centre if symmetric else middle_zero(low, high, span, top)
    for step in range(shrinks.size):
        tried = span * shrinks[step]
        middle = centre if symmetric else middle_zero(low, high, tried, top)
        squares, products = _sums(values, np.float32(1.0) / tried, middle, top)
        if squares <= np.float32(0.0) or products <= np.float32(0.0):
            continue
        fitted = products / squares if refit else tried
        # how much less than sum(w w) is left
        gain = fitted * (np.float32(2.0) * products - fitted * squares)
        if gain > best:
            best, scale, zero = gain, fitted, middle
    return scale, zero


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _search_rows(
    source: Any, narrow: Any, bits: Any, shrinks: Any, refit: Any, symmetric: Any, codes: Any, grids: Any
) -> None:
    scales, zeros = grids
    rows, columns = source.shape
    groups = scales.shape[1]
    words, bytes_I = np.empty(columns, np.uint32), np.empty(columns, np.uint8)
    values_GI = words.view(np.float32).reshape(groups, columns // groups)
    codes_GI = bytes_I.reshape(groups, columns // groups)
    stored = np.empty(1, np.float32)
    stored_word = stored.view(np.uint32)
    top = np.float32((1 << bits) - 1)
    most = top + np.float32(0.5)
    for row in range(rows):
        widen_row(source[row], narrow, words)
        for group in range(groups):
            scale, zero = _search(values_GI[group], shrinks, top, refit, symmetric)
            stored[0] = scale
            high = round_word(stored_word[0])
            scales[row, group] = np.uint16(high)
            stored_word[0] = high << np.uint32(16)
            zeros[row, group] = np.uint8(zero)
            inverse, shift = np.float32(1.0) / stored[0], zero + np.float32(0.5)
            for i in range(codes_GI.shape[1]):
                place = min(max(values_GI[group, i] * inverse + shift, np.float32(0.0)), most)
                codes_GI[group, i] = np.uint8(np.int32(place))
        store_codes(bytes_I, bits, codes[row])
