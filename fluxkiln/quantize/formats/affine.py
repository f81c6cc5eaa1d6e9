"""MLX4 and MLX8: what `mlx.core.quantize` makes of a bfloat16 matrix with 4 or 8 bits in groups of 64.

Three planes: codes, low bits first, as MLX has them in whole uint32; scales and biases, bfloat16. A weight is code *
scale + bias. The end of a group's range that is larger in magnitude is met exactly, and so is zero.

Source: github.com/ml-explore/mlx, mlx/backend/cpu/quantized.cpp (`quantize`); tests hold this kernel to it byte for
byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.quantize.pack import bf16_to_float32, kernel_input, round_word, store_codes, to_bf16_bits, widen_row

GROUP = 64
_BITS = {"MLX8": 8, "MLX4": 4}


def pack(
    name: str, weight_OI: NDArray[Any], weights: NDArray[np.float32] | None, planes: tuple[NDArray[np.uint8], ...]
) -> None:
    """See `Format.pack`; no format here is weighted. Weights are bfloat16 first, whatever they come in."""
    codes, scales, biases = planes
    source, narrow = kernel_input(weight_OI)
    if not narrow:
        source, narrow = to_bf16_bits(source), True
    _pack_affine(source, narrow, _BITS[name], codes, scales.view(np.uint16), biases.view(np.uint16))


def unpack(name: str, planes: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
    """See `Format.unpack`."""
    codes, scales, biases = (np.ascontiguousarray(plane) for plane in planes)
    if _BITS[name] == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    values = codes.reshape(len(codes), -1, GROUP).astype(np.float32)
    values *= bf16_to_float32(scales.view(np.uint16))[:, :, None]
    values += bf16_to_float32(biases.view(np.uint16))[:, :, None]
    return values.reshape(len(codes), -1)


# as in `quantize.pack`: weights have no NaN, and the sign of a zero does not survive the rounding
@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})  # type: ignore[untyped-decorator]
def _ends(values_GI: Any, low_G: Any, high_G: Any) -> None:
    for group in range(values_GI.shape[0]):
        low = values_GI[group, 0]
        high = values_GI[group, 0]
        for i in range(64):
            low = min(low, values_GI[group, i])
            high = max(high, values_GI[group, i])
        low_G[group] = low
        high_G[group] = high


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _affine_codes(values_GI: Any, scale_G: Any, bias_G: Any, top: Any, codes_GI: Any) -> None:
    for group in range(values_GI.shape[0]):
        scale, bias = scale_G[group], bias_G[group]
        for i in range(64):
            # a division: multiplying by the reciprocal rounds differently
            code = np.rint((values_GI[group, i] - bias) / scale)
            codes_GI[group, i] = np.uint8(np.int32(min(max(code, np.float32(0.0)), top)))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _pack_affine(source: Any, narrow: Any, bits: Any, codes: Any, scales: Any, biases: Any) -> None:
    rows, columns = source.shape
    groups = columns // 64
    words, bytes_I = np.empty(columns, np.uint32), np.empty(columns, np.uint8)
    values_GI, codes_GI = words.view(np.float32).reshape(groups, 64), bytes_I.reshape(groups, 64)
    low, high = np.empty(groups, np.float32), np.empty(groups, np.float32)
    scale, bias = np.empty(groups, np.float32), np.empty(groups, np.float32)
    scale_words, bias_words = scale.view(np.uint32), bias.view(np.uint32)
    top = np.float32((1 << bits) - 1)
    for row in range(rows):
        widen_row(source[row], narrow, words)
        _ends(values_GI, low, high)
        for group in range(groups):
            step = max((high[group] - low[group]) / top, np.float32(1e-7))
            edge = high[group]
            if -low[group] > abs(edge):
                edge = low[group]
            else:
                step = -step
            whole = np.rint(edge / step)
            scale[group], bias[group] = step, np.float32(0.0)
            if whole != np.float32(0.0):
                scale[group], bias[group] = edge / whole, edge
        _affine_codes(values_GI, scale, bias, top, codes_GI)
        store_codes(bytes_I, bits, codes[row])
        for group in range(groups):
            scales[row, group] = np.uint16(round_word(scale_words[group]))
            biases[row, group] = np.uint16(round_word(bias_words[group]))
