"""What a scheme really stores of a weight, as float32: what the dequantized reference computes with."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.quantize.pack import Rounder, bf16_to_float32, dequantize, pack_by, to_bf16_bits
from fluxkiln.quantize.rounding import make_rounder
from fluxkiln.quantize.schemes import Scheme


def stored_weight(
    weight: NDArray[Any], scheme: Scheme, quantized: bool, rounder: Rounder | None = None
) -> NDArray[np.float32]:
    """The numbers that are multiplied with when `weight` is stored under `scheme`.

    Args:
        weight: in torch's layout, [out_features, in_features] where it is quantized; float32, float16 or bfloat16.
        quantized: whether the slot is one of the matmul weights that the scheme quantizes; all others are stored in
            its arithmetic.
        rounder: what makes the codes; the scheme's own by default, which has no calibration.

    Raises:
        SchemeError: the group size does not divide the input channels.
    """
    if quantized and scheme.weight_bits:
        packed = pack_by(rounder or make_rounder(scheme), weight, scheme.group_size, scheme.weight_bits)
        return dequantize(packed, scheme.group_size)
    if scheme.arithmetic == "BF16":
        return bf16_to_float32(to_bf16_bits(weight))
    values = weight.astype(np.float16) if scheme.arithmetic == "F16" else weight
    return values.astype(np.float32)
