"""What a scheme does to one matrix: error of the weight, error of the output, bytes, time. A few rows at a time."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.calibration import Statistics, output_error
from fluxkiln.quantize.pack import to_bf16_bits
from fluxkiln.quantize.rounders import make_rounder, pack_sided, plain_packer, stored_weight
from fluxkiln.quantize.schemes import Scheme, stored_size

# elements that are in float32 at a time
_BLOCK = 1 << 21


@dataclass(frozen=True, slots=True)
class Figures:
    """One matrix under one scheme.

    Attributes:
        weight_error: relative L2 of the weight as it is stored.
        output_error: relative L2 of what it makes of the inputs that were calibrated on; NaN without calibration.
        size: bytes as the chip stores them.
        seconds: of one core, to find the codes.
        one_signed, empty: groups, see `count_groups`.
    """

    scheme: str
    weight_error: float
    output_error: float
    size: int
    weights: int
    seconds: float
    one_signed: int = 0
    empty: int = 0

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size / self.weights

    @property
    def error(self) -> float:
        """The output's where it is known, else the weight's."""
        return self.weight_error if math.isnan(self.output_error) else self.output_error

    @property
    def cost(self) -> float:
        """What a choice adds up."""
        return self.error**2


def measure(
    read_rows: Callable[[int, int], NDArray[Any]],
    shape: tuple[int, int],
    scheme: Scheme,
    statistics: Statistics | None = None,
) -> Figures:
    """Pack a matrix, read from one row to another, as the scheme says and compare.

    Raises:
        SchemeError: what is not finite, a group size that does not divide, or a method without its calibration.
    """
    started = time.thread_time()
    # a method that needs more than codes takes a whole matrix
    sided = None if scheme.codes_only else pack_sided(read_rows(0, shape[0]), scheme, statistics)
    sided_matrix = None if sided is None else sided.dequantize(scheme.group_size)
    pack = None
    if scheme.weight_bits and sided is None:
        pack = plain_packer(scheme, lambda slot, columns: make_rounder(scheme, statistics))("", None)
    taken = time.thread_time() - started
    wrong = whole = lost = made = 0.0
    one_signed = empty = 0
    step = max(64, _BLOCK // shape[1])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        rows = read_rows(start, stop)
        exact = rows.astype(np.float32)
        if scheme.weight_bits:
            if not np.isfinite(exact).all():
                raise SchemeError("the weight has NaN or infinite values, which have no code; fetch it again")
            counts = count_groups(rows, scheme.group_size, scheme.weight_bits)
            one_signed, empty = one_signed + counts[0], empty + counts[1]
        if sided_matrix is not None:
            stored = sided_matrix[start:stop]
        elif pack is not None:
            started = time.thread_time()
            packed = pack(rows)
            taken += time.thread_time() - started
            stored = packed.dequantize(scheme.group_size)
        else:
            stored = stored_weight(exact, scheme)
        error = stored - exact
        wrong += float(np.vdot(error, error))
        whole += float(np.vdot(exact, exact))
        if statistics is not None:
            lost += output_error(error, statistics)
            made += output_error(exact, statistics)
    size = stored_size(shape, scheme)
    output = math.sqrt(max(lost, 0.0) / made) if statistics is not None and made > 0 else math.nan
    weight_error = math.sqrt(wrong / whole) if whole else 0.0
    return Figures(scheme.name, weight_error, output, size, math.prod(shape), taken, one_signed, empty)


def count_groups(weight_OI: NDArray[Any], group_size: int, bits: int = 4) -> tuple[int, int]:
    """How many groups of a weight deserve a look.

    Returns:
        one_signed: without a value of the other sign, and further from 0 than half a step of the compiler's: it clips
        their zero point, and what is left of them is no longer where they were.
        empty: nothing but zeros; they are stored as such.
    """
    one_signed, empty = _count(to_bf16_bits(weight_OI), group_size, np.float32((1 << bits) - 1))
    return int(one_signed), int(empty)


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
