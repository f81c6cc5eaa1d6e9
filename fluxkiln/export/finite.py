"""The search for NaN and Inf in raw bytes, at the speed of memory; numba is imported by whoever needs it only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

# safetensors dtype -> unsigned integer of its width, and the exponent bits: all ones in NaN and Inf, in nothing else
_EXPONENTS: Mapping[str, tuple[Any, int]] = {
    "BF16": (np.dtype("<u2"), 0x7F80),
    "F16": (np.dtype("<u2"), 0x7C00),
    "F32": (np.dtype("<u4"), 0x7F800000),
}


def first_nonfinite(raw: NDArray[np.uint8], dtype: str) -> int:
    """Flat index of the first NaN or Inf in the bytes of a tensor of `dtype` (safetensors' code), or -1.

    A dtype without exponent bits of this kind has none.
    """
    if dtype not in _EXPONENTS:
        return -1
    width, mask = _EXPONENTS[dtype]
    bits = raw.view(width)
    if not _has_ones(bits, bits.dtype.type(mask)):
        return -1
    return int(np.argmax((bits & bits.dtype.type(mask)) == mask))


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _has_ones(bits: Any, mask: Any) -> Any:
    """Whether any value has all bits of the mask; without a way out of the loop, so that it is vectorised."""
    highest = bits.dtype.type(0)
    for i in range(bits.size):
        highest = max(highest, bits[i] & mask)
    return highest == mask
