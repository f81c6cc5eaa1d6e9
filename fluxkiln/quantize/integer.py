"""The arithmetic of W8A8: y = x W^T + b with x and W in 8 bits, as BM1684X computes it and TPU-MLIR stores it.

Inputs and products of every matmul have one scale each, the same for all: numbers up to THRESHOLD in either. So a
compiled kind has nothing of a checkpoint in it: what is calibrated is in the numbers that inputs are multiplied by
(`quantize.methods.smooth`), and a weight's rows have scales of their own.

code_x = round(x / s_x), to even; code_w = round(w / s_w) of each row, s_w = max|w| / 127, half away from zero;
y = round((sum(code_x code_w) + bias) multiplier / 2^shift) s_y, in 16 bits;
bias = round(b / (s_w s_x)), multiplier = round(s_x s_w / s_y 2^shift), both in 32 bits.

Source: found by matching the compiler's output byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# the largest numbers in an input's codes and in a product's
THRESHOLD = 256.0
LEVELS, OUTPUT_LEVELS = 127, 32767
INPUT_SCALE, OUTPUT_SCALE = THRESHOLD / LEVELS, THRESHOLD / OUTPUT_LEVELS


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A weight in 8 bits: codes int8 [O, I] and a float32 scale for each row [O]."""

    codes_OI: NDArray[np.int8]
    scales_O: NDArray[np.float32]

    def dequantize(self) -> NDArray[np.float32]:
        """code * scale as float32 [O, I]."""
        codes: NDArray[np.float32] = self.codes_OI.astype(np.float32)
        codes *= self.scales_O[:, None]
        return codes


def row_scales(weight_OI: NDArray[Any]) -> NDArray[np.float32]:
    """Of each row, float32 [O]."""
    wide = weight_OI.astype(np.float32)
    scales: NDArray[np.float32] = np.maximum(np.abs(wide).max(1), np.float32(1e-10)) / np.float32(LEVELS)
    return scales


def pack_integer(weight_OI: NDArray[Any]) -> IntegerWeight:
    """A weight, or rows of one, in 8 bits."""
    scales = row_scales(weight_OI)
    codes = weight_OI.astype(np.float32) / scales[:, None]
    codes = np.copysign(np.floor(np.abs(codes) + np.float32(0.5)), codes)
    return IntegerWeight(codes.astype(np.int8), scales)
