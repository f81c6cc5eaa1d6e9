"""What calibration knows of the inputs of one weight matrix: second moments by channel, and between neighbours.

With X [N, I] the inputs of a linear layer, `diagonal` is the mean of x_i^2 and `blocks` are the square blocks on the
diagonal of X^T X / N: what a weight's error E [O, I] does to the output is tr(E (X^T X) E^T), of which blocks keep all
products of channels that are near to one another. `peaks` is the mean of |x_i|.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError


@dataclass(frozen=True, slots=True)
class Statistics:
    """Second moments of the inputs of one matrix.

    Attributes:
        blocks: float32 [b, b] each, side by side they cover all input channels.
        peaks: float32 [I].
        count: input rows that were seen.
    """

    blocks: tuple[NDArray[np.float32], ...]
    peaks: NDArray[np.float32]
    count: int

    @property
    def in_features(self) -> int:
        return sum(len(block) for block in self.blocks)

    @property
    def diagonal(self) -> NDArray[np.float32]:
        """Mean of x_i^2, float32 [I]."""
        return np.concatenate([np.diag(block) for block in self.blocks])

    def columns(self, start: int, stop: int) -> Statistics:
        """What is known of some of the channels: for a weight that a part uses in slices."""
        cut = []
        for first, block in self.starts():
            low, high = max(start - first, 0), min(stop - first, len(block))
            if low < high:
                cut.append(block[low:high, low:high])
        return Statistics(tuple(cut), self.peaks[start:stop], self.count)

    def starts(self) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Each block with the channel that it begins at."""
        first = 0
        for block in self.blocks:
            yield first, block
            first += len(block)

    def check(self, name: str, in_features: int) -> None:
        """Raise SchemeError unless these are finite moments of inputs of this width."""
        if self.in_features != in_features or self.peaks.shape != (in_features,):
            raise SchemeError(
                f"calibration of {name} is for {self.in_features} input channels, the weight has {in_features}; "
                "calibrate this checkpoint"
            )
        diagonal = self.diagonal
        sound = all(np.isfinite(block).all() for block in self.blocks) and np.isfinite(self.peaks).all()
        if not sound or (diagonal < 0).any() or self.count < 1:
            raise SchemeError(
                f"calibration of {name} has NaN, infinite or negative moments; calibrate again, with prompts that the "
                "model runs without overflow"
            )


def output_error(error_OI: NDArray[np.float32], statistics: Statistics) -> float:
    """Sum over output rows and mean over inputs of the squared error that an error of the weight makes: tr(E H E^T)."""
    total = 0.0
    for first, block in statistics.starts():
        part = error_OI[:, first : first + len(block)]
        total += float(np.einsum("ij,ij->", part @ block, part, dtype=np.float64))
    return total


def mean_statistics(known: Sequence[Statistics]) -> Statistics:
    """Of inputs that are one and the same, but may have been recorded one by one."""
    first, *others = known
    if all(one.peaks is first.peaks for one in others):
        return first
    blocks = tuple(np.mean(blocks, axis=0) for blocks in zip(*(one.blocks for one in known), strict=True))
    peaks: NDArray[np.float32] = np.mean([one.peaks for one in known], axis=0)
    return Statistics(blocks, peaks, first.count)


def gather(inputs_NI: NDArray[np.float32], block: int) -> Statistics:
    """Statistics of inputs that are all in memory.

    Args:
        block: channels of one block; 0 for all of them in one.
    """
    count, width = inputs_NI.shape
    side = block or width
    blocks = []
    for start in range(0, width, side):
        some = inputs_NI[:, start : start + side]
        blocks.append((some.T @ some / np.float32(count)).astype(np.float32))
    return Statistics(tuple(blocks), np.abs(inputs_NI).mean(0, dtype=np.float64).astype(np.float32), count)
