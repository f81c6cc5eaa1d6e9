"""Two methods that need more than codes: scaled input channels (`awq`), and a low-rank branch beside them (`svd`).

- `awq`: input channel i of the weight is multiplied by s_i and the input divided by it, so that the channels that
  matter get finer steps. s = peaks^a, with the exponent a that leaves the least output error; weights that have one
  input in common share it, so that it is divided once. Source: Lin et al., AWQ (arXiv 2306.00978), section 3.2.
- `svd`: W S = L R + Q, where L R are the largest singular directions of W S and S = sqrt(diagonal) makes them those of
  the output; the rest is packed. Source: Li et al., SVDQuant (arXiv 2411.05007), without its 4-bit activations.

Both change the graph (a product of the input by 1 / s, two small matmuls): ONNX Runtime's is written with them
(`fluxkiln.compile.onnx.packed`), and for the chip the template is rewritten before it is compiled, so that a kind has a
mould for each method and rank (`side_tensors.py`). What is packed is in bfloat16, as the compiler gets it,
and is made row by row, so that a cast makes the same of some rows as of all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numba
import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.pack import PackedWeight, bf16_to_float32, dequantize, to_bf16_bits
from fluxkiln.quantize.rounding import empty_packed
from fluxkiln.quantize.schemes import DEFAULT_RANK, Scheme
from fluxkiln.quantize.search import search_into
from fluxkiln.quantize.statistics import Statistics

# of a matrix that are in float64 at a time
ROWS = 512
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
    """Pack with the channel scales that leave the least output error, see `find_divisors`."""
    return pack_scaled(weight_OI, group_size, find_divisors(weight_OI, group_size, statistics, bits), bits)


def find_divisors(
    weight_OI: NDArray[Any], group_size: int, statistics: Statistics, bits: int = 4
) -> NDArray[np.float32]:
    """The channel scales that leave the least output error, as the diagonal of X^T X knows it: float32 [I].

    They are reciprocals of bfloat16 numbers, since the chip multiplies the input.

    Args:
        weight_OI: one weight, or rows of all that have one input: they are scaled alike.

    Raises:
        SchemeError: no scales leave a finite error.
    """
    wide = weight_OI.astype(np.float32)
    importance = statistics.diagonal
    peaks = np.maximum(statistics.peaks, max(float(statistics.peaks.max()) * 1e-4, 1e-12))
    best, found = np.inf, None
    for exponent in EXPONENTS:
        scales = peaks**exponent
        scales /= np.sqrt(scales.max() * scales.min())
        divisors: NDArray[np.float32] = np.reciprocal(bf16_to_float32(to_bf16_bits(1 / scales)))
        error = dequantize(pack_scaled(wide, group_size, divisors, bits).packed, group_size)
        error /= divisors
        error -= wide
        # in float64 and without BLAS: the choice must not depend on the order of a sum
        lost = float(np.sum(np.einsum("oi,oi->i", error, error, dtype=np.float64) * importance))
        if lost < best:
            best, found = lost, divisors
    if found is None:
        raise SchemeError("no channel scale leaves a finite error: the weight or its calibration is not finite")
    return found


def pack_scaled(weight_OI: NDArray[Any], group_size: int, divisors: NDArray[np.float32], bits: int = 4) -> Corrected:
    """Pack a weight whose input is divided by `divisors`, float32 [I]."""
    rows, columns = weight_OI.shape
    up, down = np.empty((rows, 0), np.uint16), np.empty((0, columns), np.uint16)
    return Corrected(_search(packed_rows(weight_OI, divisors, up, down), group_size, bits), divisors, up, down)


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
    check_rank(rank, wide.shape)
    smooth = np.ones(wide.shape[1], np.float32)
    if statistics is not None:
        smooth = np.sqrt(statistics.diagonal)
        smooth = np.maximum(smooth, max(float(smooth.max()) * 1e-4, 1e-12))
    up, down = _directions(wide * smooth, rank)
    up_bits, down_bits = to_bf16_bits(up), to_bf16_bits(down / smooth)
    ones = np.ones(wide.shape[1], np.float32)
    return Corrected(_search(packed_rows(wide, ones, up_bits, down_bits), group_size, bits), ones, up_bits, down_bits)


def check_rank(rank: int, shape: tuple[int, ...], what: str = "a matrix") -> None:
    """Raise SchemeError when a matrix has fewer directions than are asked for."""
    if not 0 < rank <= min(shape):
        raise SchemeError(f"rank {rank}: {what} of {shape[0]} x {shape[1]} has 1 to {min(shape)}")


def packed_rows(
    weight_OI: NDArray[Any], divisors: NDArray[np.float32], up_OR: NDArray[np.uint16], down_RI: NDArray[np.uint16]
) -> NDArray[Any]:
    """What is packed of some rows of a weight, or of all: W * divisors - up down, as ml_dtypes.bfloat16.

    Args:
        up_OR: of the same rows, bfloat16 bits; down_RI: of all, see `Corrected`.
    """
    wide = np.array(weight_OI, np.float32, order="C")
    wide *= divisors
    if len(down_RI):
        _subtract(wide, bf16_to_float32(up_OR), bf16_to_float32(down_RI))
    return wide.astype(ml_dtypes.bfloat16)


@numba.njit(cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _subtract(weight_OI: Any, up_OR: Any, down_RI: Any) -> None:
    """Not by BLAS, whose sums depend on how many rows it is given."""
    for row in range(weight_OI.shape[0]):
        for r in range(down_RI.shape[0]):
            factor = up_OR[row, r]
            for i in range(weight_OI.shape[1]):
                weight_OI[row, i] -= factor * down_RI[r, i]


def _search(rows: NDArray[Any], group_size: int, bits: int) -> PackedWeight:
    packed = empty_packed(rows.shape, group_size, bits)
    search_into(rows, bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
    return packed


def _directions(matrix: NDArray[np.float32], rank: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The largest singular directions by subspace iteration: [O, r] and [r, I].

    In float64: BLAS adds up in an order that depends on the number of threads and on the processor, and what that
    changes must not reach the float32 and bfloat16 numbers that are stored.
    """
    sample = np.random.Generator(np.random.SFC64(0)).standard_normal((matrix.shape[1], min(rank + 8, *matrix.shape)))
    basis = np.linalg.qr(_product(matrix, sample))[0]
    for _ in range(2):
        basis = np.linalg.qr(_product(matrix, np.linalg.qr(_transposed_product(matrix, basis))[0]))[0]
    left, values, right = np.linalg.svd(_transposed_product(matrix, basis).T, full_matrices=False)
    root = np.sqrt(values[:rank])
    up, down = (basis @ left[:, :rank]) * root, right[:rank] * root[:, None]
    return up.astype(np.float32), down.astype(np.float32)


def _product(matrix: NDArray[np.float32], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """matrix @ right, some rows of the matrix in float64 at a time."""
    return np.concatenate([rows.astype(np.float64) @ right for rows in _row_blocks(matrix)])


def _transposed_product(matrix: NDArray[np.float32], left: NDArray[np.float64]) -> NDArray[np.float64]:
    """matrix.T @ left, some rows of the matrix in float64 at a time."""
    total = np.zeros((matrix.shape[1], left.shape[1]))
    for rows, own in zip(_row_blocks(matrix), _row_blocks(left), strict=True):
        total += rows.astype(np.float64).T @ own
    return total


def _row_blocks(matrix: NDArray[Any]) -> list[NDArray[Any]]:
    return [matrix[start : start + ROWS] for start in range(0, len(matrix), ROWS)]
