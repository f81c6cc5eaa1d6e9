"""The arithmetic of W8A8: y = x W^T + b with x and W in 8 bits, as BM1684X computes it and TPU-MLIR stores it.

Inputs and products of every matmul have one scale each, the same for all: numbers up to THRESHOLD in either. So a
compiled kind has nothing of a checkpoint in it: what is calibrated is in the numbers that inputs are multiplied by
(`quantize.smoothing`), and a weight's rows have scales of their own.

code_x = round(x / s_x); code_w = round(w / s_w), s_w = max|w| / 127 of each row;
y = round((sum(code_x code_w) + bias) multiplier / 2^shift) s_y, in 16 bits;
bias = round(b / (s_w s_x)); multiplier = round(s_x s_w / s_y 2^shift), to even and the quotient in float32.
What is rounded otherwise is rounded half away from zero, scales are in float64.

Queries and keys, where they are in 8 bits too, have scales of their own, with which up to a scheme's limit is held.

Source: TPU-MLIR 1.30.2, found by matching its output byte for byte.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError

# the largest numbers in an input's codes and in a product's
THRESHOLD = 256.0
LEVELS, WIDE_LEVELS = 127, 127 * 257
INPUT_SCALE, OUTPUT_SCALE = THRESHOLD / LEVELS, THRESHOLD / WIDE_LEVELS
LARGEST_MULTIPLIER = 2**31 - 1


@dataclass(frozen=True, slots=True)
class IntegerWeight:
    """A weight in 8 bits: codes int8 [O, I] and a float64 scale for each row [O]."""

    codes_OI: NDArray[np.int8]
    scales_O: NDArray[np.float64]

    def dequantize(self) -> NDArray[np.float32]:
        """code * scale as float32 [O, I]."""
        codes: NDArray[np.float32] = self.codes_OI.astype(np.float32)
        codes *= self.scales_O[:, None].astype(np.float32)
        return codes


def pack_integer(weight_OI: NDArray[Any]) -> IntegerWeight:
    """A weight, or rows of one, in 8 bits."""
    codes, scales = np.empty(weight_OI.shape, np.int8), np.empty(len(weight_OI))
    _pack_rows(np.ascontiguousarray(weight_OI, np.float32), codes, scales)
    return IntegerWeight(codes, scales)


def integer_bias(bias_O: NDArray[Any], scales_O: NDArray[np.float64]) -> NDArray[np.int32]:
    """What is added to the sums of a weight with these scales, [O]."""
    found = bias_O.astype(np.float64) / (scales_O * INPUT_SCALE)
    return np.copysign(np.floor(np.abs(found) + 0.5), found).astype(np.int32)


def integer_multipliers(scales_O: NDArray[np.float64], shift: int, name: str) -> NDArray[np.int32]:
    """What the sums of a weight with these scales are multiplied by before they are shifted, [O].

    Raises:
        SchemeError: one does not fit 32 bits.
    """
    found = np.rint((scales_O * INPUT_SCALE / OUTPUT_SCALE).astype(np.float32).astype(np.float64) * 2.0**shift)
    if (worst := float(found.max())) > LARGEST_MULTIPLIER:
        raise SchemeError(
            f"{name} needs the multiplier {worst:.3g} at shift {shift}, and a multiplier has 32 bits: the weights are "
            f"{worst / LARGEST_MULTIPLIER:.3g} times as large as W8A8 can hold; leave it out of the codes "
            "(W8A8,KIND.WEIGHT=BF16)"
        )
    return found.astype(np.int32)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _pack_rows(values: Any, codes: Any, scales: Any) -> None:
    for row in range(values.shape[0]):
        most = np.float32(0.0)
        for i in range(values.shape[1]):
            most = max(most, abs(values[row, i]))
        scale = np.float64(most) / 127.0 if most > 0 else 1.0
        scales[row] = scale
        for i in range(values.shape[1]):
            value = np.float64(values[row, i]) / scale
            codes[row, i] = np.int8(np.int32(value + 0.5) if value >= 0 else -np.int32(0.5 - value))
