"""Two methods that need more than codes: scaled input channels (`awq`), and a low-rank branch beside them (`svd`).

- `awq`: input channel i of the weight is multiplied by s_i and the input divided by it, so that the channels that
  matter get finer steps. s = peaks^a, with the exponent a that leaves the least output error. Source: Lin et al., AWQ
  (arXiv 2306.00978), section 3.2.
- `svd`: W S = L R + Q, where L R are the largest singular directions of W S and S = sqrt(diagonal) makes them those of
  the output; the rest is packed. Source: Li et al., SVDQuant (arXiv 2411.05007), without its 4-bit activations.

Both change the graph (a product of the input by 1 / s, two small matmuls), so they are measured and run by ONNX
Runtime, and are not cast into a bmodel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.pack import PackedWeight, bf16_to_float32, dequantize, to_bf16_bits
from fluxkiln.quantize.rounding import empty_packed
from fluxkiln.quantize.schemes import DEFAULT_RANK, Scheme
from fluxkiln.quantize.search import search_into
from fluxkiln.quantize.statistics import Statistics

EXPONENTS = tuple(step / 12 for step in range(12))


@dataclass(frozen=True, slots=True)
class Corrected:
    """A packed weight with what else its product needs: y = packed((x / divisors)) + up (down x).

    Attributes:
        divisors: float32 [I], of the input before it meets the codes; ones where nothing is scaled.
        up, down: [O, r] and [r, I] bfloat16 bits; r = 0 without a low-rank branch.
    """

    packed: PackedWeight
    divisors: NDArray[np.float32]
    up: NDArray[np.uint16]
    down: NDArray[np.uint16]

    @property
    def rank(self) -> int:
        return len(self.down)

    def dequantize(self, group_size: int) -> NDArray[np.float32]:
        """The matrix that x is multiplied with in all, float32 [O, I]."""
        whole = dequantize(self.packed, group_size) / self.divisors
        return whole + bf16_to_float32(self.up) @ bf16_to_float32(self.down) if self.rank else whole


# a slot, and the input channels of it that are packed if not all -> what packs its weight
CorrectorOf = Callable[[str, "tuple[int, int] | None"], Callable[[NDArray[Any]], Corrected]]


def pack_corrected(weight_OI: NDArray[Any], scheme: Scheme, statistics: Statistics | None) -> Corrected:
    """Pack by the scheme's method, `awq` or `svd`.

    Raises:
        SchemeError: there are no statistics and `awq` needs some, or as the methods.
    """
    if scheme.method == "svd":
        return pack_low_rank(weight_OI, scheme.group_size, statistics, scheme.rank, scheme.weight_bits)
    if statistics is None:
        raise SchemeError(f"{scheme.name} needs calibration; make some with fluxkiln calibrate")
    return pack_awq(weight_OI, scheme.group_size, statistics, scheme.weight_bits)


def pack_awq(weight_OI: NDArray[Any], group_size: int, statistics: Statistics, bits: int = 4) -> Corrected:
    """Pack with the channel scales that leave the least output error, as the diagonal of X^T X knows it."""
    wide = weight_OI.astype(np.float32)
    importance = statistics.diagonal
    peaks = np.maximum(statistics.peaks, max(float(statistics.peaks.max()) * 1e-4, 1e-12))
    best, found = np.inf, None
    for exponent in EXPONENTS:
        scales = peaks**exponent
        scales = (scales / np.sqrt(scales.max() * scales.min())).astype(np.float32)
        packed = empty_packed(wide.shape, group_size, bits)
        search_into(wide * scales, bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
        error = dequantize(packed, group_size)
        error /= scales
        error -= wide
        lost = float(np.einsum("oi,oi,i->", error, error, importance, optimize=True))
        if lost < best:
            best, found = lost, (packed, scales)
    if found is None:
        raise SchemeError("no channel scale leaves a finite error: the weight or its calibration is not finite")
    empty = np.empty((len(wide), 0), np.uint16), np.empty((0, wide.shape[1]), np.uint16)
    return Corrected(*found, *empty)


def pack_low_rank(
    weight_OI: NDArray[Any], group_size: int, statistics: Statistics | None, rank: int = DEFAULT_RANK, bits: int = 4
) -> Corrected:
    """Pack what the `rank` largest directions of the smoothed weight leave.

    Args:
        statistics: of the inputs; without them the directions are those of the weight alone.

    Raises:
        SchemeError: more directions than the matrix has.
    """
    wide = weight_OI.astype(np.float32)
    if not 0 < rank <= min(wide.shape):
        raise SchemeError(f"rank {rank}: a matrix of {wide.shape[0]} x {wide.shape[1]} has 1 to {min(wide.shape)}")
    smooth = np.ones(wide.shape[1], np.float32)
    if statistics is not None:
        smooth = np.sqrt(statistics.diagonal)
        smooth = np.maximum(smooth, max(float(smooth.max()) * 1e-4, 1e-12))
    up, down = _directions(wide * smooth, rank)
    up_bits, down_bits = to_bf16_bits(up), to_bf16_bits(down / smooth)
    rest = wide - bf16_to_float32(up_bits) @ bf16_to_float32(down_bits)
    packed = empty_packed(wide.shape, group_size, bits)
    search_into(rest, bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
    return Corrected(packed, np.ones(wide.shape[1], np.float32), up_bits, down_bits)


def _directions(matrix: NDArray[np.float32], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The largest singular directions by subspace iteration: [O, r] and [r, I]."""
    sample = np.random.Generator(np.random.SFC64(0)).standard_normal((matrix.shape[1], min(rank + 8, *matrix.shape)))
    basis = np.linalg.qr(matrix @ sample.astype(np.float32))[0]
    for _ in range(2):
        basis = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ basis)[0])[0]
    left, values, right = np.linalg.svd(basis.T @ matrix, full_matrices=False)
    root = np.sqrt(values[:rank])
    return (basis @ left[:, :rank]) * root, right[:rank] * root[:, None]
