"""GPTQ: columns are rounded one after the other, and each one's error is made up for by the columns not yet rounded.

With H = X^T X / N (its products a little smaller, its diagonal a little larger), in blocks (`Statistics`), and U the
upper Cholesky factor of H^-1, rounding column i with the error e = (w_i - w^_i) / U_ii leaves the least output error
when e U_ij is taken from every later column j. A group's scale and zero point are found when its first column is
reached, from the weights as they are then, by least squares weighted with the diagonal of H. Rows do not depend on one
another, and sums are in one order: some rows at a time have the codes that they have in the whole.

Source: Frantar et al., GPTQ (arXiv 2210.17323), algorithm 1; the least-squares groups are our own.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.calibration import Statistics
from fluxkiln.quantize.pack import round_word
from fluxkiln.quantize.search import SHRINKS, fit_group

# of the mean diagonal of H, added to it: what few samples say of channels that hardly move is not believed
DAMPING = 0.02
# products of channels are believed less the fewer rows there were: of b channels seen in N rows, b / (b + 4 N) is taken
# off them. Measured on inputs that were not calibrated on: 4 is the best of 1, 2, 4, 8, with 128 rows as with 4096
BELIEF = 4.0
# rows that share what is read of a factor
ROWS = 8
_FAST = {"nnan", "ninf", "nsz", "contract"}  # no reordering


class ColumnRounder:
    """Packs rows of one matrix. Factors are made once; not for several threads.

    Args:
        statistics: of the matrix's inputs.

    Raises:
        SchemeError: the moments have no Cholesky factor.
    """

    def __init__(self, statistics: Statistics, damping: float = DAMPING) -> None:
        widest = max(len(block) for block in statistics.blocks)
        self._factors = np.zeros((len(statistics.blocks), widest, widest), np.float32)
        # of each channel: its block, and where that begins and ends
        self._places = np.empty((statistics.in_features, 3), np.int64)
        for index, (first, block) in enumerate(statistics.starts()):
            self._factors[index, : len(block), : len(block)] = _inverse_factor(block, damping, statistics.count)
            self._places[first : first + len(block)] = index, first, first + len(block)
        self._importance = np.ascontiguousarray(statistics.diagonal)
        self._importance += np.float32(max(float(self._importance.mean()) * damping, 1e-30))

    def __call__(
        self,
        weight_OI: NDArray[Any],
        bits: int,
        codes_OI: NDArray[np.uint8],
        scales_OG: NDArray[np.uint16],
        zeros_OG: NDArray[np.uint8],
    ) -> None:
        """As `pack.pack_into`."""
        values = weight_OI.astype(np.float32)
        columns = values.shape[1]
        if columns != self._importance.size:
            raise SchemeError(
                f"calibration is for {self._importance.size} input channels, the weight has {columns}; calibrate this "
                "checkpoint"
            )
        wide = np.empty((len(values), columns), np.uint8)
        inputs = (self._factors, self._places, self._importance, np.array(SHRINKS, np.float32))
        _round_rows(np.ascontiguousarray(values), bits, *inputs, wide, (scales_OG, zeros_OG))
        if bits == 8:
            codes_OI[:] = wide
        else:
            np.bitwise_or(wide[:, 0::2], wide[:, 1::2] << 4, out=codes_OI)


def _inverse_factor(block: NDArray[np.float32], damping: float, count: int) -> NDArray[np.float32]:
    """Upper U with U^T U = (H + damping)^-1, products of channels reduced by what few rows leave unknown."""
    moments = block.astype(np.float64)
    mean = float(np.trace(moments)) / len(moments)
    diagonal = np.diag(moments).copy()
    moments *= BELIEF * count / (len(moments) + BELIEF * count)
    np.fill_diagonal(moments, diagonal)
    # channels that were never anything but 0 say nothing
    moments[np.diag_indices(len(moments))] += damping * mean if mean > 0 else 1.0
    try:
        inverse = np.linalg.inv(np.linalg.cholesky(moments))
        factor = np.linalg.cholesky(inverse.T @ inverse).T
    except np.linalg.LinAlgError as error:
        raise SchemeError(
            f"the calibration's moments of {len(moments)} channels have no Cholesky factor ({error}); calibrate again "
            "with more prompts or steps"
        ) from error
    return factor.astype(np.float32)


@numba.njit(cache=True, nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _take_off(values: Any, errors: Any, factor: Any, first: Any, last: Any, stop: Any, offset: Any) -> None:
    """Take the errors of columns [first, last) off the columns [last, stop) of some rows, four columns at a time."""
    # slices, so that no index has to be checked for being negative
    low, high = last - offset, stop - offset
    column = first
    while column + 4 <= last:
        at = column - offset
        u0, u1 = factor[at, low:high], factor[at + 1, low:high]
        u2, u3 = factor[at + 2, low:high], factor[at + 3, low:high]
        for row in range(values.shape[0]):
            own, e = values[row, last:stop], errors[row]
            e0, e1, e2, e3 = e[column], e[column + 1], e[column + 2], e[column + 3]
            for j in range(own.size):
                own[j] -= e0 * u0[j] + e1 * u1[j] + e2 * u2[j] + e3 * u3[j]
        column += 4
    while column < last:
        u0 = factor[column - offset, low:high]
        for row in range(values.shape[0]):
            own, e0 = values[row, last:stop], errors[row, column]
            for j in range(own.size):
                own[j] -= e0 * u0[j]
        column += 1


@numba.njit(cache=True, nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _round_span(
    weights: Any, scale: Any, zero: Any, most: Any, span: Any, factor: Any, errors: Any, codes: Any
) -> None:
    """Round columns [first, stop) of one row, which are in one group and one block, that begins at `offset`."""
    first, stop, offset = span
    inverse, shift = np.float32(1.0) / scale, zero + np.float32(0.5)
    for i in range(first, stop):
        place = np.int32(min(max(weights[i] * inverse + shift, np.float32(0.0)), most))
        codes[i] = np.uint8(place)
        error = (weights[i] - (np.float32(place) - zero) * scale) / factor[i - offset, i - offset]
        errors[i] = error
        rest, own = weights[i + 1 : stop], factor[i - offset, i + 1 - offset : stop - offset]
        for j in range(rest.size):
            rest[j] -= error * own[j]


@numba.njit(cache=True, nogil=True, fastmath=_FAST)  # type: ignore[untyped-decorator]
def _round_rows(
    values: Any, bits: Any, factors: Any, places: Any, importance: Any, shrinks: Any, codes: Any, grids: Any
) -> None:
    scales, zeros = grids
    rows, columns = values.shape
    groups = scales.shape[1]
    width = columns // groups
    top = np.float32((1 << bits) - 1)
    most = top + np.float32(0.5)
    errors = np.empty((ROWS, columns), np.float32)
    stored, zero = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    words = stored.view(np.uint32)
    for row in range(0, rows, ROWS):
        count = min(ROWS, rows - row)
        tile = values[row : row + count]
        for group in range(groups):
            start = group * width
            for one in range(count):
                stored[one], zero[one] = fit_group(
                    tile[one, start : start + width], importance[start : start + width], shrinks, top
                )
                high = round_word(words[one])
                scales[row + one, group] = np.uint16(high)
                zeros[row + one, group] = np.uint8(zero[one])
                words[one] = high << np.uint32(16)
            column = start
            while column < start + width:
                index, offset, end = places[column]
                stop = min(start + width, end)
                factor = factors[index]
                for one in range(count):
                    _round_span(
                        tile[one], stored[one], zero[one], most, (column, stop, offset), factor, errors[one],
                        codes[row + one],
                    )  # fmt: skip
                _take_off(tile, errors, factor, column, stop, end, offset)
                column = stop
