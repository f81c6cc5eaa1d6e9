"""How large the inputs of a matrix are, channel by channel: counts in bins, which add up over any number of rows.

Bins are eighths of powers of two from 2^-12 to 2^12, so a quantile of any channel, or of all of them once each has been
multiplied by a number of its own, is known to about 6 % afterwards. The first bin has all that is smaller, the last all
that is larger.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

_OCTAVES, _LOWEST = 24, -12
_STEPS = 3  # bits of the mantissa: 8 bins an octave
SIZE_BINS = _OCTAVES << _STEPS
_SHIFT = 23 - _STEPS
_FIRST = (127 + _LOWEST) << _STEPS


def count_sizes(rows_NI: NDArray[np.float32]) -> NDArray[np.float32]:
    """How many of the rows have |x_i| in which bin, [I, SIZE_BINS]."""
    counts = np.zeros((rows_NI.shape[1], SIZE_BINS), np.float32)
    _count(np.ascontiguousarray(rows_NI).view(np.uint32), counts)
    return counts


def bin_edges() -> NDArray[np.float32]:
    """Where each bin ends, [SIZE_BINS]: no number in it is larger."""
    ends = np.arange(_FIRST + 1, _FIRST + SIZE_BINS + 1, dtype=np.uint32) << np.uint32(_SHIFT)
    return ends.view(np.float32)


def middles() -> NDArray[np.float32]:
    """A number in the middle of each bin, [SIZE_BINS]; 0 of the first, which is what is too small to matter."""
    ends = bin_edges()
    found: NDArray[np.float32] = ends * np.float32(1 - 0.5 / (1 << _STEPS) / 1.5)
    found[0] = 0
    return found


def largest(sizes_IB: NDArray[np.float32]) -> NDArray[np.float32]:
    """The end of the last bin of each channel that anything was in, [I]."""
    last = SIZE_BINS - 1 - np.argmax(sizes_IB[:, ::-1] > 0, axis=1)
    found: NDArray[np.float32] = bin_edges()[last]
    return found


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count(words: Any, counts: Any) -> None:
    for row in range(words.shape[0]):
        for i in range(words.shape[1]):
            place = np.int64((words[row, i] & np.uint32(0x7FFFFFFF)) >> np.uint32(_SHIFT)) - _FIRST
            counts[i, min(max(place, 0), SIZE_BINS - 1)] += np.float32(1.0)
