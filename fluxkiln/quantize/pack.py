"""Weights to 4-bit or 8-bit codes, scales and zero points, the way TPU-MLIR 1.30.2's W4BF16 and W8BF16 round.

Rounding is half away from zero on float32, L = 15 or 255. Per group of `group_size` input channels:
scale = max(max - min, 1e-5) / L, zero point = clip(round(-min / scale), 0, L), code = clip(round(w / scale) + zero
point, 0, L). The scale is stored in bfloat16 but the codes are computed with the float32 one.

Source: found by matching the compiler's output byte for byte; `tests/quantize/test_pack.py` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError

# rows of a weight, bits, and what they are packed into: codes, scales, zero points; see `pack_into`
Rounder = Callable[[NDArray[Any], int, NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint8]], None]
# a slot, and the input channels of it that are packed if not all -> its rounder
RounderOf = Callable[[str, "tuple[int, int] | None"], Rounder]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A 4-bit or 8-bit weight.

    Attributes:
        codes_OI: uint8; 4 bits: [O, I // 2], two codes a byte, low nibble = even input channel; 8 bits: [O, I].
        scales_OG: [O, I // group_size] bfloat16 bits as uint16.
        zeros_OG: [O, I // group_size] uint8.
    """

    codes_OI: NDArray[np.uint8]
    scales_OG: NDArray[np.uint16]
    zeros_OG: NDArray[np.uint8]
    bits: Literal[4, 8] = 4


def pack_by(rounder: Rounder, weight_OI: NDArray[Any], group_size: int, bits: int) -> PackedWeight:
    """A whole weight as a rounder packs it; SchemeError where in_features is not a multiple of the group size."""
    packed = empty_packed(weight_OI.shape, group_size, bits)
    rounder(weight_OI, bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
    return packed


def empty_packed(shape: tuple[int, ...], group_size: int, bits: int) -> PackedWeight:
    """A packed weight yet to be filled; SchemeError where in_features is not a multiple of the group size."""
    rows, columns = shape
    if group_size <= 0 or columns % group_size or group_size % 2:
        raise SchemeError(f"group size {group_size} does not divide {columns} input channels; use another group size")
    groups = (rows, columns // group_size)
    codes = np.empty((rows, columns * bits // 8), np.uint8)
    return PackedWeight(codes, np.empty(groups, np.uint16), np.empty(groups, np.uint8), 4 if bits == 4 else 8)


def pack_into(
    weight_OI: NDArray[Any],
    bits: int,
    codes_OI: NDArray[np.uint8],
    scales_OG: NDArray[np.uint16],
    zeros_OG: NDArray[np.uint8],
    through_zero: bool = False,
) -> None:
    """Pack some rows of a weight into arrays, or rows of arrays, as `PackedWeight` has them; G of them are groups.

    Args:
        through_zero: extend every group's range to 0, as the compiler does not: no zero point has to be clipped then.
    """
    _pack_rows(*kernel_input(weight_OI), bits, through_zero, codes_OI, scales_OG, zeros_OG)


def dequantize(packed: PackedWeight, group_size: int) -> NDArray[np.float32]:
    """(code - zero point) * scale as float32 [O, I]: what the chip multiplies with."""
    rows = packed.codes_OI.shape[0]
    if packed.bits == 8:
        codes = packed.codes_OI.astype(np.float32)
    else:
        codes = np.empty((rows, packed.codes_OI.shape[1] * 2), np.float32)
        codes[:, 0::2] = packed.codes_OI & 15
        codes[:, 1::2] = packed.codes_OI >> 4
    grouped = codes.reshape(rows, -1, group_size)
    grouped -= packed.zeros_OG[:, :, None]
    grouped *= bf16_to_float32(packed.scales_OG)[:, :, None]
    return codes


def bf16_to_float32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """bfloat16 bits to float32, exactly."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16_bits(values: NDArray[Any]) -> NDArray[np.uint16]:
    """Any float array to bfloat16 bits, to nearest, ties to even; bfloat16 input passes through."""
    if values.dtype == ml_dtypes.bfloat16:
        return values.view(np.uint16)
    return np.ascontiguousarray(values, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)


def kernel_input(weight_OI: NDArray[Any]) -> tuple[NDArray[Any], bool]:
    """Contiguous rows as kernels take them: bfloat16 bits and True, or float32 and False."""
    if weight_OI.dtype == ml_dtypes.bfloat16:
        return np.ascontiguousarray(weight_OI).view(np.uint16), True
    return np.ascontiguousarray(weight_OI, np.float32), False


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def subtract_product(weight_OI: Any, up_OR: Any, down_RI: Any) -> None:
    """weight -= up down, not by BLAS, whose sums depend on how many rows it is given."""
    for row in range(weight_OI.shape[0]):
        for r in range(down_RI.shape[0]):
            factor = up_OR[row, r]
            for i in range(weight_OI.shape[1]):
                weight_OI[row, i] -= factor * down_RI[r, i]


# The kernels below are written for LLVM to vectorise: loops over whole axes of 2-D arrays (an offset index would bring
# Python's negative-index check back), and truncation instead of floor.


@numba.njit(cache=True, nogil=True, inline="always")  # type: ignore[untyped-decorator]
def _round_away(value: Any, limit: Any) -> Any:
    """Half away from zero, of float32, after clipping to +-limit: what is beyond ends in the same code anyway."""
    clipped = min(max(value, -limit), limit)
    whole = np.float32(np.int32(clipped))
    rest = clipped - whole  # exact, so no value just below a half is taken for one
    if rest >= np.float32(0.5):
        whole += np.float32(1.0)
    if rest <= np.float32(-0.5):
        whole -= np.float32(1.0)
    return whole


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def widen_row(source_I: Any, narrow: Any, words_I: Any) -> None:
    """Float32 bits of a row that `kernel_input` made."""
    values_I = words_I.view(np.float32)
    if narrow:
        for i in range(source_I.size):
            words_I[i] = np.uint32(source_I[i]) << np.uint32(16)
    else:
        for i in range(source_I.size):
            values_I[i] = source_I[i]


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def round_word(word: Any) -> Any:
    """bfloat16 bits of float32 bits, to nearest, ties to even."""
    return (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def store_codes(bytes_I: Any, bits: Any, codes: Any) -> None:
    """A row of codes, one a byte, as `PackedWeight` has them."""
    if bits == 4:
        pairs = bytes_I.view(np.uint16)
        for i in range(pairs.size):
            codes[i] = np.uint8(pairs[i] | (pairs[i] >> np.uint16(4)))
    else:
        for i in range(bytes_I.size):
            codes[i] = bytes_I[i]


# weights have no NaN, and the sign of a zero does not survive the rounding: these two flags change no bit
@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})  # type: ignore[untyped-decorator]
def _ranges(values_GI: Any, low_G: Any, high_G: Any) -> None:
    for group in range(values_GI.shape[0]):
        low = values_GI[group, 0]
        high = values_GI[group, 0]
        for i in range(values_GI.shape[1]):
            low = min(low, values_GI[group, i])
            high = max(high, values_GI[group, i])
        low_G[group] = low
        high_G[group] = high


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _codes(values_GI: Any, scale_G: Any, zero_G: Any, top: Any, codes_GI: Any) -> None:
    limit = np.float32(2.0) * top
    for group in range(values_GI.shape[0]):
        scale = scale_G[group]
        zero = zero_G[group]
        for i in range(values_GI.shape[1]):
            # a division: multiplying by the reciprocal rounds differently
            code = _round_away(values_GI[group, i] / scale, limit) + zero
            codes_GI[group, i] = np.uint8(min(max(code, np.float32(0.0)), top))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _pack_rows(source: Any, narrow: Any, bits: Any, through_zero: Any, codes: Any, scales: Any, zeros: Any) -> None:
    rows, columns = source.shape
    groups = scales.shape[1]
    words, bytes_I = np.empty(columns, np.uint32), np.empty(columns, np.uint8)
    values_GI = words.view(np.float32).reshape(groups, columns // groups)
    codes_GI = bytes_I.reshape(groups, columns // groups)
    low = np.empty(groups, np.float32)
    high, scale, zero = np.empty_like(low), np.empty_like(low), np.empty_like(low)
    scale_words = scale.view(np.uint32)
    top = np.float32((1 << bits) - 1)
    for row in range(rows):
        widen_row(source[row], narrow, words)
        _ranges(values_GI, low, high)
        for group in range(groups):
            if through_zero:
                low[group], high[group] = min(low[group], np.float32(0.0)), max(high[group], np.float32(0.0))
            scale[group] = max(high[group] - low[group], np.float32(1e-5)) / top
            zero[group] = max(_round_away(-low[group] / scale[group], top), np.float32(0.0))
        _codes(values_GI, scale, zero, top, codes_GI)
        store_codes(bytes_I, bits, codes[row])
        for group in range(groups):
            zeros[row, group] = np.uint8(zero[group])
            scales[row, group] = np.uint16(round_word(scale_words[group]))
