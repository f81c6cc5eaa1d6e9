"""A scheme's rounder, and what the scheme stores of a matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.calibration import Statistics
from fluxkiln.quantize.methods import Source, find_method, method_names
from fluxkiln.quantize.pack import Rounder, bf16_to_float32, dequantize, pack_by, pack_into, to_bf16_bits
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import SidedWeight, SideTensors


def as_compiler(slot: str = "", columns: tuple[int, int] | None = None) -> Rounder:
    """Every slot is rounded as TPU-MLIR does."""
    return pack_into


def make_rounder(scheme: Scheme, statistics: Statistics | None = None) -> Rounder:
    """The rounder of one matrix.

    Args:
        statistics: of the matrix's inputs, for a method that is calibrated.

    Raises:
        SchemeError: a calibrated method without statistics, or a method that needs more than codes.
    """
    method = find_method(scheme.method)
    if method.side_tensors is not None:
        able = ", ".join(name for name in method_names() if find_method(name).side_tensors is None)
        raise SchemeError(
            f"{scheme.name}: {scheme.method} changes the graph and cannot be put into its codes; use {able}"
        )
    if method.calibrated and statistics is None:
        raise SchemeError(f"{scheme.name} needs calibration; make some with fluxkiln calibrate, and name it")
    return method.rounder(statistics, scheme.symmetric)


def pack_sided(
    weight_OI: NDArray[Any], scheme: Scheme, statistics: Statistics | None = None, beside: SideTensors | None = None
) -> SidedWeight:
    """Pack a whole weight by a method that needs more than codes.

    Args:
        beside: what was found before; searched now otherwise.

    Raises:
        SchemeError: the method needs statistics and there are none, or it finds nothing.
    """
    if beside is None:
        (beside,) = scheme.find_beside([Source(lambda: weight_OI, statistics)])
    return SidedWeight(beside.pack(weight_OI, scheme.group_size, scheme.weight_bits), beside)


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
