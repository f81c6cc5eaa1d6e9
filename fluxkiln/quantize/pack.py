"""Weights to 4-bit codes, scales and zero points, the way TPU-MLIR 1.30.2's W4BF16 rounds.

Rounding is half away from zero on float32. Per group of `group_size` input channels: scale = max(max - min, 1e-5) / 15,
zero point = clip(round(-min / scale), 0, 15), code = clip(round(w / scale) + zero point, 0, 15). The scale is stored in
bfloat16 but the codes are computed with the float32 one.

Source: found by matching the compiler's output byte for byte; `tests/compile/test_mould.py` holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError

LEVELS = 15


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A 4-bit weight.

    Attributes:
        codes_OI: [O, I // 2] uint8, two codes a byte, low nibble = even input channel.
        scales_OG: [O, I // group_size] bfloat16 bits as uint16.
        zeros_OG: [O, I // group_size] uint8.
    """

    codes_OI: NDArray[np.uint8]
    scales_OG: NDArray[np.uint16]
    zeros_OG: NDArray[np.uint8]


def pack_int4(weight_OI: NDArray[Any], group_size: int) -> PackedWeight:
    """Pack a linear weight into 4-bit groups along the input axis.

    Args:
        weight_OI: [out_features, in_features], float32 or bfloat16 (ml_dtypes).
        group_size: input channels that share one scale.

    Raises:
        SchemeError: in_features is not a multiple of group_size.

    Source: the module docstring.
    """
    rows, columns = weight_OI.shape
    if columns % group_size or group_size % 2:
        raise SchemeError(f"group size {group_size} does not divide {columns} input channels; use another group size")
    codes = np.empty((rows, columns // 2), np.uint8)
    scales = np.empty((rows, columns // group_size), np.uint16)
    zeros = np.empty((rows, columns // group_size), np.uint8)
    bits = weight_OI.dtype == ml_dtypes.bfloat16
    source = weight_OI.view(np.uint16) if bits else np.ascontiguousarray(weight_OI, np.float32)
    _pack_rows(source, bits, group_size, codes, scales, zeros)
    return PackedWeight(codes, scales, zeros)


def dequantize(packed: PackedWeight, group_size: int) -> NDArray[np.float32]:
    """(code - zero point) * scale as float32 [O, I]: what the chip multiplies with."""
    rows = packed.codes_OI.shape[0]
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


@numba.njit(cache=True, inline="always")
def _round_away(value: float) -> float:
    """Half away from zero. floor(|x| + 0.5) is wrong just below a half (0.49999997 + 0.5 rounds to 1)."""
    magnitude = np.float32(abs(value))
    whole = np.float32(np.floor(magnitude))
    if magnitude - whole >= np.float32(0.5):
        whole += np.float32(1.0)
    return whole if value >= 0 else -whole


@numba.njit(cache=True, nogil=True)
def _pack_rows(source, bits, group_size, codes, scales, zeros):  # type: ignore[no-untyped-def]
    rows, columns = source.shape
    wide = np.empty(group_size, np.uint32)
    group = wide.view(np.float32)
    for row in range(rows):
        for index in range(columns // group_size):
            start = index * group_size
            if bits:
                for i in range(group_size):
                    wide[i] = np.uint32(source[row, start + i]) << np.uint32(16)
            else:
                for i in range(group_size):
                    group[i] = source[row, start + i]
            low = group[0]
            high = group[0]
            for i in range(1, group_size):
                low = min(low, group[i])
                high = max(high, group[i])
            scale = max(high - low, np.float32(1e-5)) / np.float32(LEVELS)
            zero = min(max(_round_away(-low / scale), np.float32(0)), np.float32(LEVELS))
            for i in range(0, group_size, 2):
                even = min(max(_round_away(group[i] / scale) + zero, np.float32(0)), np.float32(LEVELS))
                odd = min(max(_round_away(group[i + 1] / scale) + zero, np.float32(0)), np.float32(LEVELS))
                codes[row, (start + i) // 2] = np.uint8(even) | (np.uint8(odd) << np.uint8(4))
            zeros[row, index] = np.uint8(zero)
            # bfloat16 of the scale, to nearest, ties to even
            wide[0] = np.uint32(0)
            group[0] = scale
            word = wide[0]
            scales[row, index] = np.uint16(
                (word + np.uint32(0x7FFF) + ((word >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )
