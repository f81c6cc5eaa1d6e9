"""Methods by name: what turns rows of a weight into codes, scales and zero points, and matrices packed by them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.methods import Source, find_method, method_names
from fluxkiln.quantize.pack import PackedWeight, Rounder, pack_by, pack_into, to_bf16_bits
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import SidedWeight, SideTensors
from fluxkiln.quantize.statistics import Statistics


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


def pack_matrix(weight_OI: NDArray[Any], scheme: Scheme, statistics: Statistics | None = None) -> PackedWeight:
    """Pack a whole weight [O, I] as the scheme says.

    Raises:
        SchemeError: in_features is not a multiple of the group size, NaN or infinity in the weight, or as
            `make_rounder`.
    """
    if not is_finite(weight_OI):
        raise SchemeError("the weight has NaN or infinite values, which have no code; fetch the checkpoint again")
    return pack_by(make_rounder(scheme, statistics), weight_OI, scheme.group_size, scheme.weight_bits)


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


@dataclass(frozen=True, slots=True)
class GroupCounts:
    """Groups of a weight that deserve a look.

    Attributes:
        groups: all of them.
        one_signed: without a value of the other sign, and further from 0 than half a step of the compiler's: it clips
            their zero point, and what is left of them is no longer where they were.
        empty: nothing but zeros; they are stored as such.
        finite: no value of the weight is NaN or infinite.
    """

    groups: int
    one_signed: int
    empty: int
    finite: bool


def inspect_groups(weight_OI: NDArray[Any], group_size: int, bits: int = 4) -> GroupCounts:
    """Count them."""
    words = to_bf16_bits(weight_OI)
    clipped, empty = _count(words, group_size, np.float32((1 << bits) - 1))
    return GroupCounts(words.size // group_size, int(clipped), int(empty), is_finite(weight_OI))


def is_finite(weight_OI: NDArray[Any]) -> bool:
    """Whether no value is NaN or infinite."""
    if weight_OI.dtype != ml_dtypes.bfloat16:
        return bool(np.isfinite(weight_OI).all())
    return bool(_finite(np.ascontiguousarray(weight_OI).view(np.uint16)))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _finite(words: Any) -> Any:
    worst = np.uint16(0)
    for row in range(words.shape[0]):
        for i in range(words.shape[1]):
            worst = max(worst, words[row, i] & np.uint16(0x7FFF))
    return worst < np.uint16(0x7F80)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count(words: Any, group_size: Any, top: Any) -> Any:
    wide = np.empty(group_size, np.uint32)
    values = wide.view(np.float32)
    clipped = empty = 0
    for row in range(words.shape[0]):
        for start in range(0, words.shape[1], group_size):
            for i in range(group_size):
                wide[i] = np.uint32(words[row, start + i]) << np.uint32(16)
            low = values[0]
            high = values[0]
            for i in range(group_size):
                low, high = min(low, values[i]), max(high, values[i])
            step = max(high - low, np.float32(1e-5)) / top
            if low == 0 and high == 0:
                empty += 1
            elif low > np.float32(0.5) * step or high < np.float32(-0.5) * step:
                clipped += 1
    return clipped, empty
