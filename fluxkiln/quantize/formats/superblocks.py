"""Q4_K, Q5_K and Q6_K of GGML: 256 weights, whose 8 or 16 groups have scales in codes of their own.

Q4_K, Q5_K: groups of 32; weight = d * scale * code - dmin * minimum, scales and minima of 6 bits, d and dmin float16.
Q6_K: groups of 16; weight = d * scale * (code - 32), scales of 8 bits, signed.
Scales and minima are searched: those of least squared error, each weight's counted as it is asked or by its size.

Source of the layout: GGML's ggml-quants.c; tests have gguf's own decoder read what is packed here. The search is ours:
candidates around the plain scale, each put right by least squares, as GGML's own searches do as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.quantize.pack import kernel_input, widen_row

SUPER = 256
# scales that are tried, and how far apart, in codes: of groups with a minimum from 1 code less to as many more
_TRIES, _STEP = 12, 0.15


def pack(
    name: str, weight_OI: NDArray[Any], weights: NDArray[np.float32] | None, planes: tuple[NDArray[np.uint8], ...]
) -> None:
    """See `Format.pack`."""
    (out,) = planes
    rows, columns = weight_OI.shape
    bits, group = int(name[1]), 16 if name == "Q6_K" else 32
    asked = np.zeros(0, np.float32) if weights is None else np.ascontiguousarray(weights, np.float32)
    scales, minima = (np.empty((rows, columns // group), np.float32) for _ in range(2))
    source, narrow = kernel_input(weight_OI)
    _search_rows(source, narrow, asked, bits, group, scales, minima)
    # the codes of scales, and float16 numbers that they are multiplied with
    by_super = scales.reshape(rows, -1, SUPER // group)
    if bits == 6:
        largest = np.take_along_axis(by_super, np.abs(by_super).argmax(axis=2)[..., None], axis=2)
        d = (largest / np.float32(-128)).astype("<f2")
        codes = np.clip(np.rint(_divide(by_super, d)), -128, 127)
        lows, minimum_codes = np.zeros_like(d), np.zeros_like(codes)
    else:
        lows_of = minima.reshape(by_super.shape)
        d = (by_super.max(axis=2, keepdims=True) / np.float32(63)).astype("<f2")
        lows = (lows_of.max(axis=2, keepdims=True) / np.float32(63)).astype("<f2")
        codes = np.clip(np.rint(_divide(by_super, d)), 0, 63)
        minimum_codes = np.clip(np.rint(_divide(lows_of, lows)), 0, 63)
    true_scales = (d.astype(np.float32) * codes).reshape(rows, -1)
    true_minima = (lows.astype(np.float32) * minimum_codes).reshape(rows, -1)
    numbers = np.empty((rows, columns), np.uint8)
    _code_rows(source, narrow, true_scales, true_minima, bits, group, numbers)
    layout = _store_6 if bits == 6 else _store_45
    layout(bits, numbers.reshape(rows, -1, SUPER), codes, minimum_codes, d, lows, out.reshape(rows, len(d[0]), -1))


def unpack(name: str, planes: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """See `Format.unpack`."""
    bits = int(name[1])
    (packed,) = planes
    size = {4: 144, 5: 176, 6: 210}[bits]
    bytes_RSB = np.ascontiguousarray(packed).reshape(len(packed), -1, size)
    values = _load_6(bytes_RSB) if bits == 6 else _load_45(bits, bytes_RSB)
    return values.reshape(len(packed), -1)


def _divide(values: NDArray[np.float32], by: NDArray[Any]) -> NDArray[np.float32]:
    wide = by.astype(np.float32)
    quotient: NDArray[np.float32] = np.divide(values, wide, out=np.zeros_like(values), where=wide != 0)
    return quotient


def _store_45(
    bits: int, numbers: NDArray[Any], codes: NDArray[Any], minima: NDArray[Any], d: NDArray[Any], low: NDArray[Any],
    out: NDArray[np.uint8],
) -> None:  # fmt: skip
    out[..., 0:2], out[..., 2:4] = d.view(np.uint8), low.view(np.uint8)
    scale, minimum = codes.astype(np.uint8), minima.astype(np.uint8)
    out[..., 4:8] = scale[..., :4] | (scale[..., 4:] >> 4) << 6
    out[..., 8:12] = minimum[..., :4] | (minimum[..., 4:] >> 4) << 6
    out[..., 12:16] = (scale[..., 4:] & 15) | (minimum[..., 4:] & 15) << 4
    pairs = numbers.reshape(*numbers.shape[:2], 4, 2, 32)
    low_bits = pairs & 15
    out[..., -128:] = (low_bits[..., 0, :] | low_bits[..., 1, :] << 4).reshape(*numbers.shape[:2], 128)
    if bits == 5:
        high = (pairs >> 4).reshape(*numbers.shape[:2], 8, 32)
        out[..., 16:48] = np.bitwise_or.reduce(high << np.arange(8, dtype=np.uint8)[:, None], axis=2)


def _load_45(bits: int, packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    d, low = (np.ascontiguousarray(packed[..., at : at + 2]).view("<f2").astype(np.float32) for at in (0, 2))
    first, second, rest = packed[..., 4:8], packed[..., 8:12], packed[..., 12:16]
    scale = np.concatenate([first & 63, (rest & 15) | (first >> 6) << 4], axis=-1)
    minimum = np.concatenate([second & 63, (rest >> 4) | (second >> 6) << 4], axis=-1)
    pairs = packed[..., -128:].reshape(*packed.shape[:2], 4, 1, 32)
    numbers = np.concatenate([pairs & 15, pairs >> 4], axis=-2).reshape(*packed.shape[:2], 8, 32)
    if bits == 5:
        high = packed[..., 16:48][..., None, :] >> np.arange(8, dtype=np.uint8)[:, None]
        numbers |= (high & 1) << 4
    values: NDArray[np.float32] = (d * scale)[..., None] * numbers.astype(np.float32) - (low * minimum)[..., None]
    return values


def _store_6(
    bits: int, numbers: NDArray[Any], codes: NDArray[Any], minima: NDArray[Any], d: NDArray[Any], low: NDArray[Any],
    out: NDArray[np.uint8],
) -> None:  # fmt: skip
    # halves of 128, in each four runs of 32
    runs = numbers.reshape(*numbers.shape[:2], 2, 4, 32)
    low_bits, high = runs & 15, runs >> 4
    out[..., :128] = np.concatenate(
        [low_bits[..., 0, :] | low_bits[..., 2, :] << 4, low_bits[..., 1, :] | low_bits[..., 3, :] << 4], axis=-1
    ).reshape(*numbers.shape[:2], 128)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    out[..., 128:192] = np.bitwise_or.reduce(high << shifts, axis=-2).reshape(*numbers.shape[:2], 64)
    out[..., 192:208] = codes.astype(np.int8).view(np.uint8)
    out[..., 208:210] = d.view(np.uint8)


def _load_6(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    d = np.ascontiguousarray(packed[..., 208:210]).view("<f2").astype(np.float32)
    scale = d * np.ascontiguousarray(packed[..., 192:208]).view(np.int8).astype(np.float32)
    low = packed[..., :128].reshape(*packed.shape[:2], 2, 2, 32)
    runs = np.concatenate([low & 15, low >> 4], axis=-2)
    high = packed[..., 128:192].reshape(*packed.shape[:2], 2, 1, 32) >> np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    numbers = (runs | (high & 3) << 4).reshape(*packed.shape[:2], 16, 16).astype(np.float32) - np.float32(32)
    values: NDArray[np.float32] = scale[..., None] * numbers
    return values


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc", "contract"})  # type: ignore[untyped-decorator]
def _search_rows(source: Any, narrow: Any, asked_I: Any, bits: Any, group: Any, scales_RG: Any, minima_RG: Any) -> None:
    rows, columns = source.shape
    words = np.empty(columns, np.uint32)
    values, weights = words.view(np.float32), np.empty(group, np.float32)
    for row in range(rows):
        widen_row(source[row], narrow, words)
        mean = np.float32(0.0)
        for place in range(columns // group):
            start = place * group
            if place * group % 256 == 0:
                mean = np.float32(0.0)
                for i in range(start, start + 256):
                    mean += values[i] * values[i]
                mean /= np.float32(256.0)
            group_I = values[start : start + group]
            for i in range(group):
                size = group_I[i] * group_I[i]
                if asked_I.size:
                    weights[i] = asked_I[start + i] * np.sqrt(mean + size)
                elif bits == 6:
                    weights[i] = size
                else:
                    weights[i] = np.sqrt(mean) + abs(group_I[i])
            if bits == 6:
                scales_RG[row, place] = _search_signed(group_I, weights)
            else:
                scale, minimum = _search_minimum(group_I, weights, np.float32((1 << bits) - 1))
                scales_RG[row, place] = scale
                minima_RG[row, place] = minimum


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc", "contract"})  # type: ignore[untyped-decorator]
def _search_minimum(values: Any, weights: Any, top: Any) -> Any:
    """Scale and minimum, so that value = scale * code - minimum, of least weighted error; none is negative."""
    low, high = min(values[0], np.float32(0.0)), values[0]
    total, first = np.float32(0.0), np.float32(0.0)
    for i in range(values.size):
        low, high = min(low, values[i]), max(high, values[i])
        total += weights[i]
        first += weights[i] * values[i]
    if high <= low:
        return np.float32(0.0), -low
    best, best_scale, best_low = np.float32(np.inf), (high - low) / top, low
    for step in range(-1, _TRIES):
        inverse = top / (high - low)
        if step >= 0:
            inverse = (top + np.float32(_STEP) * np.float32(step) - np.float32(0.9)) / (high - low)
        sum_codes = sum_squares = sum_products = np.float32(0.0)
        for i in range(values.size):
            code = min(np.float32(np.int32((values[i] - low) * inverse + np.float32(0.5))), top)
            weighted = weights[i] * code
            sum_codes += weighted
            sum_squares += weighted * code
            sum_products += weighted * values[i]
        determinant = total * sum_squares - sum_codes * sum_codes
        if determinant <= np.float32(0.0):
            continue
        scale = (total * sum_products - first * sum_codes) / determinant
        base = (sum_squares * first - sum_codes * sum_products) / determinant
        if base > np.float32(0.0):
            base = np.float32(0.0)
            scale = sum_products / sum_squares
        error = np.float32(0.0)
        for i in range(values.size):
            code = min(np.float32(np.int32((values[i] - low) * inverse + np.float32(0.5))), top)
            rest = scale * code + base - values[i]
            error += weights[i] * rest * rest
        if error < best and scale > np.float32(0.0):
            best, best_scale, best_low = error, scale, base
    return best_scale, -best_low


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz", "reassoc", "contract"})  # type: ignore[untyped-decorator]
def _search_signed(values: Any, weights: Any) -> Any:
    """The scale of codes from -32 to 31 of least weighted error."""
    largest = values[0]
    for i in range(values.size):
        if abs(values[i]) > abs(largest):
            largest = values[i]
    if largest == np.float32(0.0):
        return np.float32(0.0)
    best, best_scale = np.float32(-1.0), -largest / np.float32(32.0)
    for step in range(-6, 7):
        inverse = -(np.float32(32.0) + np.float32(0.15) * np.float32(step)) / largest
        products = squares = np.float32(0.0)
        for i in range(values.size):
            shifted = np.float32(np.int32(values[i] * inverse + np.float32(64.5))) - np.float32(64.0)
            code = min(max(shifted, np.float32(-32.0)), np.float32(31.0))
            products += weights[i] * values[i] * code
            squares += weights[i] * code * code
        # the error that is left is less by so much
        if squares > np.float32(0.0) and products * products > best * squares:
            best, best_scale = products * products / squares, products / squares
    return best_scale


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _code_rows(source: Any, narrow: Any, scales_RG: Any, minima_RG: Any, bits: Any, group: Any, codes_RI: Any) -> None:
    """The codes of the scales and minima as they are stored."""
    rows, columns = source.shape
    words = np.empty(columns, np.uint32)
    values = words.view(np.float32)
    top = np.float32((1 << bits) - 1)
    shift = np.float32(32.0) if bits == 6 else np.float32(0.0)
    for row in range(rows):
        widen_row(source[row], narrow, words)
        for place in range(columns // group):
            scale, minimum = scales_RG[row, place], minima_RG[row, place]
            inverse = np.float32(0.0) if scale == np.float32(0.0) else np.float32(1.0) / scale
            for i in range(place * group, (place + 1) * group):
                code = (values[i] + minimum) * inverse + shift + np.float32(0.5)
                codes_RI[row, i] = np.uint8(min(max(code, np.float32(0.0)), top))
