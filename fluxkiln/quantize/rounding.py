"""Methods by name: what turns rows of a weight into codes, scales and zero points, and matrices packed by them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.pack import PackedWeight, pack_into, to_bf16_bits
from fluxkiln.quantize.schemes import METHODS, Scheme
from fluxkiln.quantize.search import Searched, search_into
from fluxkiln.quantize.statistics import Statistics

# rows of a weight, bits, and what they are packed into: codes, scales, zero points; see `pack.pack_into`
Rounder = Callable[[NDArray[Any], int, NDArray[np.uint8], NDArray[np.uint16], NDArray[np.uint8]], None]
# a slot, and the input channels of it that are packed if not all -> its rounder
RounderOf = Callable[[str, "tuple[int, int] | None"], Rounder]


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
    method = METHODS[scheme.method]
    if not method.codes_only:
        raise SchemeError(
            f"{scheme.name}: {scheme.method} changes the graph and cannot be put into its codes; use "
            f"{', '.join(name for name, one in METHODS.items() if one.codes_only)}"
        )
    if method.calibrated:
        from fluxkiln.quantize.gptq import Gptq

        if statistics is None:
            raise SchemeError(f"{scheme.name} needs calibration; make some with fluxkiln calibrate, and name it")
        return Gptq(statistics)
    if scheme.method in ("mse", "ls"):
        searched: Searched = "ls" if scheme.method == "ls" else "mse"
        return partial(search_into, method=searched, symmetric=scheme.symmetric)
    return partial(pack_into, through_zero=True) if scheme.method == "rtn0" else pack_into


def pack_matrix(weight_OI: NDArray[Any], scheme: Scheme, statistics: Statistics | None = None) -> PackedWeight:
    """Pack a whole weight [O, I] as the scheme says.

    Raises:
        SchemeError: in_features is not a multiple of the group size, NaN or infinity in the weight, or as
            `make_rounder`.
    """
    packed = empty_packed(weight_OI.shape, scheme.group_size, scheme.weight_bits)
    if not is_finite(weight_OI):
        raise SchemeError("the weight has NaN or infinite values, which have no code; fetch the checkpoint again")
    rounder = make_rounder(scheme, statistics)
    rounder(weight_OI, scheme.weight_bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
    return packed


def empty_packed(shape: tuple[int, ...], group_size: int, bits: int) -> PackedWeight:
    """A packed weight yet to be filled.

    Raises:
        SchemeError: in_features is not a multiple of the group size.
    """
    rows, columns = shape
    if group_size <= 0 or columns % group_size or group_size % 2:
        raise SchemeError(f"group size {group_size} does not divide {columns} input channels; use another group size")
    groups = (rows, columns // group_size)
    codes = np.empty((rows, columns * bits // 8), np.uint8)
    width: Literal[4, 8] = 4 if bits == 4 else 8
    return PackedWeight(codes, np.empty(groups, np.uint16), np.empty(groups, np.uint8), width)


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
