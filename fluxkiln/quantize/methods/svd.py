"""`svd`: W S = L R + Q, where L R are the largest singular directions of W S, kept in bfloat16 beside the codes, and
S = sqrt(diagonal) makes them those of the output; the rest is packed.

Source: Li et al., SVDQuant (arXiv 2411.05007), without its 4-bit activations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.quantize.methods import Method, Source, ls
from fluxkiln.quantize.side_tensors import DOWN, UP, SideTensors, check_rank

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.quantize.calibration import Statistics

# of a matrix that are in float64 at a time
_ROWS = 512


def side_tensors(
    sources: Sequence[Source], group_size: int, bits: int, rank: int, most_rows: int
) -> Iterator[SideTensors]:
    """Each has a branch of its own."""
    return (find_branch(source.read(), source.statistics, rank) for source in sources)


def find_branch(weight_OI: NDArray[Any], statistics: Statistics | None, rank: int) -> SideTensors:
    """The `rank` largest directions of the weight, smoothed where its inputs are known.

    Raises:
        SchemeError: more directions than the matrix has.
    """
    import numpy as np

    from fluxkiln.quantize.pack import to_bf16_bits

    check_rank(rank, weight_OI.shape)
    wide = weight_OI.astype(np.float32)
    smooth = np.ones(wide.shape[1], np.float32)
    if statistics is not None:
        smooth = np.sqrt(statistics.diagonal)
        smooth = np.maximum(smooth, max(float(smooth.max()) * 1e-4, 1e-12))
    up, down = _directions(wide * smooth, rank)
    return SideTensors(None, to_bf16_bits(up), to_bf16_bits(down / smooth))


def _directions(matrix: NDArray[Any], rank: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """The largest singular directions by subspace iteration: [O, r] and [r, I], float32.

    In float64: BLAS adds up in an order that depends on the number of threads and on the processor, and what that
    changes must not reach the float32 and bfloat16 numbers that are stored.
    """
    import numpy as np

    sample = np.random.Generator(np.random.SFC64(0)).standard_normal((matrix.shape[1], min(rank + 8, *matrix.shape)))
    basis = np.linalg.qr(_product(matrix, sample))[0]
    for _ in range(2):
        basis = np.linalg.qr(_product(matrix, np.linalg.qr(_transposed_product(matrix, basis))[0]))[0]
    left, values, right = np.linalg.svd(_transposed_product(matrix, basis).T, full_matrices=False)
    root = np.sqrt(values[:rank])
    up, down = (basis @ left[:, :rank]) * root, right[:rank] * root[:, None]
    return up.astype(np.float32), down.astype(np.float32)


def _product(matrix: NDArray[Any], right: NDArray[Any]) -> NDArray[Any]:
    """matrix @ right, some rows of the matrix in float64 at a time."""
    import numpy as np

    return np.concatenate([rows.astype(np.float64) @ right for rows in _row_blocks(matrix)])


def _transposed_product(matrix: NDArray[Any], left: NDArray[Any]) -> NDArray[Any]:
    """matrix.T @ left, some rows of the matrix in float64 at a time."""
    import numpy as np

    total = np.zeros((matrix.shape[1], left.shape[1]))
    for rows, own in zip(_row_blocks(matrix), _row_blocks(left), strict=True):
        total += rows.astype(np.float64).T @ own
    return total


def _row_blocks(matrix: NDArray[Any]) -> list[NDArray[Any]]:
    return [matrix[start : start + _ROWS] for start in range(0, len(matrix), _ROWS)]


METHOD = Method(ls.rounder, calibrated=True, roles=(DOWN, UP), default_rank=32, side_tensors=side_tensors)
