"""A scheme's rounder, and what the scheme stores of a matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.calibration import Statistics
from fluxkiln.quantize.formats import FILE_FORMATS, PackedPlanes
from fluxkiln.quantize.integer import pack_integer
from fluxkiln.quantize.methods import Source, find_method, method_names
from fluxkiln.quantize.pack import Rounder, RounderOf, bf16_to_float32, pack_by, pack_into, to_bf16_bits
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import PackerOf, SidedWeight, SideTensors


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
    method = scheme.how
    if method.side_tensors is not None:
        able = ", ".join(name for name in method_names() if find_method(name).side_tensors is None)
        raise SchemeError(f"{scheme.name} changes the graph, which cannot be put into codes; use {able}")
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
    if scheme.integer:
        return SidedWeight(pack_integer(beside.rest(weight_OI)), beside)
    return SidedWeight(beside.pack(weight_OI, scheme.group_size, scheme.weight_bits), beside)


def plain_packer(scheme: Scheme, rounder_of: RounderOf | None = None) -> PackerOf:
    """What packs the slots of a part by a method that needs codes alone.

    Args:
        rounder_of: what makes their codes; the scheme's own by default, which has no calibration.
    """

    def packer_of(slot: str, columns: tuple[int, int] | None) -> Callable[[NDArray[Any]], SidedWeight]:
        if scheme.form:
            form = FILE_FORMATS[scheme.form]
            return lambda weight: SidedWeight(PackedPlanes(form, form.pack(weight)))
        rounder = make_rounder(scheme) if rounder_of is None else rounder_of(slot, columns)
        return lambda weight: SidedWeight(pack_by(rounder, weight, scheme.group_size, scheme.weight_bits))

    return packer_of


def stored_weight(weight: NDArray[Any], scheme: Scheme) -> NDArray[np.float32]:
    """The numbers that are multiplied with when a weight, of any float, is stored in the scheme's arithmetic."""
    if scheme.arithmetic == "BF16":
        return bf16_to_float32(to_bf16_bits(weight))
    values = weight.astype(np.float16) if scheme.arithmetic == "F16" else weight
    return values.astype(np.float32)
