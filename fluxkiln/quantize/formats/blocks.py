"""Q8_0, Q5_1, Q5_0, Q4_1 and Q4_0 of GGML: blocks of 32 weights, each with a float16 scale, `_1` with a minimum too.

A block has its scale (and minimum), for 5 bits the codes' highest bits, 4 bytes, then the codes: of 4 bits a byte has
one of the first half and one of the second. `_0` scales by the number of largest magnitude, which gets the lowest code.

Source: GGML's ggml-quants.c and gguf-py; tests hold these kernels to gguf's own encoder byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.quantize.pack import kernel_input, widen_row

BLOCK = 32
# of a code: bits, and whether blocks have a minimum
_SHAPES = {"Q8_0": (8, False), "Q5_1": (5, True), "Q5_0": (5, False), "Q4_1": (4, True), "Q4_0": (4, False)}


def pack(
    name: str, weight_OI: NDArray[Any], weights: NDArray[np.float32] | None, planes: tuple[NDArray[np.uint8], ...]
) -> None:
    """See `Format.pack`; no format here is weighted."""
    bits, minimum = _SHAPES[name]
    (out,) = planes
    rows, blocks = len(weight_OI), weight_OI.shape[1] // BLOCK
    bytes_RGB = out.reshape(rows, blocks, -1)
    scales = np.empty((1 + minimum, rows, blocks), np.float32)
    source, narrow = kernel_input(weight_OI)
    _pack_rows(source, narrow, bits, minimum, bytes_RGB[:, :, 2 * (1 + minimum) :], scales)
    for place, scale in enumerate(scales):
        bytes_RGB[:, :, 2 * place : 2 * place + 2] = scale.astype("<f2")[:, :, None].view(np.uint8)


def unpack(name: str, planes: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """See `Format.unpack`."""
    bits, minimum = _SHAPES[name]
    (packed,) = planes
    size = 2 * (1 + minimum) + (4 if bits == 5 else 0) + (32 if bits == 8 else 16)
    bytes_RGB = np.ascontiguousarray(packed).reshape(len(packed), -1, size)
    heads = np.ascontiguousarray(bytes_RGB[:, :, : 2 * (1 + minimum)]).view("<f2").astype(np.float32)
    codes = bytes_RGB[:, :, 2 * (1 + minimum) :]
    if bits == 8:
        values = np.ascontiguousarray(codes).view(np.int8).astype(np.float32)
    else:
        low = codes[:, :, -16:]
        whole = np.concatenate([low & 15, low >> 4], axis=2)
        if bits == 5:
            high = np.unpackbits(np.ascontiguousarray(codes[:, :, :4]), axis=2, bitorder="little")
            whole |= high << 4
        values = whole.astype(np.float32)
        if not minimum:
            values -= np.float32(1 << (bits - 1))
    values *= heads[:, :, :1]
    if minimum:
        values += heads[:, :, 1:]
    return values.reshape(len(packed), -1)


# as in `quantize.pack`: weights have no NaN, and the sign of a zero does not survive the rounding
@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})  # type: ignore[untyped-decorator]
def _extremes(values_GI: Any, low_G: Any, high_G: Any) -> None:
    for group in range(values_GI.shape[0]):
        low = values_GI[group, 0]
        high = values_GI[group, 0]
        for i in range(32):
            low = min(low, values_GI[group, i])
            high = max(high, values_GI[group, i])
        low_G[group] = low
        high_G[group] = high


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _largest(values_I: Any, low: Any, high: Any) -> Any:
    """The number of largest magnitude, the first of two."""
    if high > -low:
        return high
    if high < -low:
        return low
    for i in range(32):
        if abs(values_I[i]) == high:
            return values_I[i]
    return high


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _round_codes(values_GI: Any, inverse_G: Any, bytes_GI: Any) -> None:
    """Signed codes, half away from zero."""
    half = np.float32(0.5)
    for group in range(values_GI.shape[0]):
        inverse = inverse_G[group]
        for i in range(32):
            value = values_GI[group, i] * inverse
            whole = np.float32(np.int32(value))
            rest = value - whole
            whole += np.float32(rest >= half) - np.float32(rest <= -half)
            bytes_GI[group, i] = np.uint8(np.int32(whole) & 255)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _shift_codes(values_GI: Any, inverse_G: Any, low_G: Any, shift: Any, top: Any, bytes_GI: Any) -> None:
    """Codes from 0 to `top`, rounded by truncation of what is `shift` above."""
    for group in range(values_GI.shape[0]):
        inverse, low = inverse_G[group], low_G[group]
        for i in range(32):
            value = (values_GI[group, i] - low) * inverse + shift
            bytes_GI[group, i] = np.uint8(min(np.int32(value), top))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _store(bytes_GI: Any, bits: Any, out_GB: Any) -> None:
    for group in range(bytes_GI.shape[0]):
        if bits == 8:
            for i in range(32):
                out_GB[group, i] = bytes_GI[group, i]
            continue
        first = 0
        if bits == 5:
            first = 4
            for byte in range(4):
                high = np.uint8(0)
                for i in range(8):
                    high |= np.uint8((bytes_GI[group, 8 * byte + i] >> 4) << i)
                out_GB[group, byte] = high
        for i in range(16):
            out_GB[group, first + i] = (bytes_GI[group, i] & 15) | np.uint8(bytes_GI[group, 16 + i] << 4)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _pack_rows(source: Any, narrow: Any, bits: Any, minimum: Any, out_RGB: Any, scales_KRG: Any) -> None:
    rows, columns = source.shape
    groups = columns // 32
    words, bytes_GI = np.empty(columns, np.uint32), np.empty((groups, 32), np.uint8)
    values_GI = words.view(np.float32).reshape(groups, 32)
    low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
    inverse, nothing = np.empty(groups, np.float32), np.zeros(groups, np.float32)
    top = np.int32((1 << bits) - 1)
    half = np.float32(1 << (bits - 1))
    for row in range(rows):
        widen_row(source[row], narrow, words)
        _extremes(values_GI, low, high)
        for group in range(groups):
            if bits == 8:
                scale = max(high[group], -low[group]) / np.float32(127.0)
            elif minimum:
                scale = (high[group] - low[group]) / np.float32(top)
                scales_KRG[1, row, group] = low[group]
            else:
                scale = _largest(values_GI[group], low[group], high[group]) / -half
            scales_KRG[0, row, group] = scale
            inverse[group] = np.float32(1.0) / scale if scale != np.float32(0.0) else np.float32(0.0)
        if bits == 8:
            _round_codes(values_GI, inverse, bytes_GI)
        elif minimum:
            _shift_codes(values_GI, inverse, low, np.float32(0.5), top, bytes_GI)
        else:
            _shift_codes(values_GI, inverse, nothing, half + np.float32(0.5), top, bytes_GI)
        _store(bytes_GI, bits, out_RGB[row])
