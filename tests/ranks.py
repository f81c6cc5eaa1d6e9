"""What ranks hold, put together again: shards as whole tensors, and parts that run, their ranks in threads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fluxkiln.errors import CheckpointError, IntegrityError, UsageError
from fluxkiln.export.bindings import apply_transforms, bind_shard, split_slots, window_of
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.shard_files import ShardFile, write_part
from fluxkiln.patches.cut import ParallelPart
from fluxkiln.types import Part

Result = TypeVar("Result")

_END = "the end of the part"


def write_shards(parts: Sequence[Part], checkpoint: Checkpoint, degree: int, folder: Path) -> list[ShardFile]:
    """The shards of every rank of the parts; a part on one core has one rank."""
    jobs = []
    for part in parts:
        ranks = part.ranks(degree)
        slots = split_slots(checkpoint.model, part, checkpoint.configs, ranks)
        jobs.append((slots, [bind_shard(part, slots, checkpoint, ranks, rank) for rank in range(ranks)]))
    return [file for job in jobs for file in write_part(*job, checkpoint, folder)]


def join_shards(
    part: Part, checkpoint: Checkpoint, shards: Sequence[Mapping[str, NDArray[Any]]]
) -> dict[str, NDArray[Any]]:
    """What the shards of all ranks of a part, in rank order, say about the checkpoint's tensors, padding left out.

    Args:
        checkpoint: for names and shapes; no tensor is read.

    Returns:
        The tensors of the part by their names in the checkpoint, whole.

    Raises:
        IntegrityError: ranks have different values where all have the same, or padding that is not zero.
    """
    ranks = len(shards)
    slots = split_slots(checkpoint.model, part, checkpoint.configs, ranks)
    placed = [
        (slot, checkpoint.tensors[part.component][slot.sources[0]], shard[slot.slot], rank)
        for rank, shard in enumerate(shards)
        for slot in bind_shard(part, slots, checkpoint, ranks, rank).slots
    ]
    tensors: dict[str, NDArray[Any]] = {}
    for slot, ref, piece, _ in placed:
        target = tensors.setdefault(ref.name, np.zeros(ref.shape, piece.dtype))
        window = window_of(ref.shape, slot.transforms)
        spans = (window.rows, window.columns)[: len(ref.shape)]
        inside = tuple(slice(0, stop - start) for start, stop in spans)
        target[tuple(slice(*span) for span in spans)] = piece[inside]
    for slot, ref, piece, rank in placed:
        if apply_transforms(tensors[ref.name], slot.transforms).tobytes() != piece.tobytes():
            raise IntegrityError(
                f"{slot.slot} of rank {rank} is not what the other ranks have, or not zero where it is padded: "
                "they are of different checkpoints; shard the checkpoint again"
            )
    return tensors


def load_parallel_part(part: ParallelPart, weights: Mapping[str, Tensor]) -> nn.Module:
    """The part's module with real weights, for eager execution; the part is not to be used for another rank then.

    Args:
        weights: one rank's, by slot.

    Raises:
        CheckpointError: a weight is missing, one too many, or of another shape than the slot.
    """
    shapes = {spec.name: spec.shape for spec in part.slots}
    for name in sorted(shapes.keys() ^ weights.keys()):
        raise CheckpointError(f"weight {name} is missing or unexpected; shard the checkpoint again")
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"weight {name} has shape {list(weights[name].shape)}, this rank's is {list(shape)}; shard the "
                "checkpoint again for this number of ranks"
            )
    part.module.load_state_dict(dict(weights), assign=True)
    return part.module.requires_grad_(False)


class ThreadRanks:
    """Virtual ranks in threads of this process that meet at a barrier; see `run`.

    Sums are taken in rank order and in the tensors' own dtype, once, so that all ranks get the same bits.

    Attributes:
        counts: collectives so far, by name: `all_reduce`, `all_gather`. One in which all ranks meet counts once.
    """

    def __init__(self, ranks: int) -> None:
        if ranks < 1:
            raise UsageError(f"{ranks} ranks: there must be one at least")
        self.ranks = ranks
        self.counts: Counter[str] = Counter()
        self._place = threading.local()
        self._barrier = threading.Barrier(ranks)
        self._brought: list[tuple[str, Tensor | None]] = []
        self._met: Tensor | None = None

    def run(self, ranks: Sequence[Callable[[], Result]]) -> list[Result]:
        """Call `ranks[r]` as rank r, all at once and without gradients; what they return, in rank order.

        Raises:
            UsageError: there are more or fewer functions than ranks, or the ranks do not issue the same collectives
                with the same shapes in the same order. Otherwise the first error of a rank; it ends the others.
        """
        if len(ranks) != self.ranks:
            raise UsageError(f"{len(ranks)} functions for {self.ranks} ranks: each rank runs one")
        results: list[list[Result]] = [[] for _ in ranks]
        errors: list[BaseException] = []
        self._brought = [("", None)] * self.ranks
        self._barrier = threading.Barrier(self.ranks, action=self._join)

        def work(rank: int) -> None:
            self._place.rank = rank
            try:
                with torch.no_grad():
                    results[rank].append(ranks[rank]())
                self._meet(_END, None)
            except threading.BrokenBarrierError:
                pass  # another rank's error ended this one
            except BaseException as error:
                errors.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,), name=f"rank {rank}") for rank in range(self.ranks)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [result[0] for result in results]

    def all_reduce(self, x: Tensor) -> Tensor:
        """See `Collectives`; to be called by a rank of `run`."""
        return self._meet("all_reduce", x)

    def all_gather(self, x: Tensor) -> Tensor:
        """See `Collectives`; to be called by a rank of `run`."""
        return self._meet("all_gather", x)

    def _meet(self, name: str, x: Tensor | None) -> Tensor:
        rank = getattr(self._place, "rank", None)
        if rank is None:
            raise UsageError(f"{name} outside of a rank: call it within ThreadRanks.run")
        self._brought[rank] = name, x
        self._barrier.wait()
        # the next meeting needs this rank, so nothing is overwritten before it was read here
        met = self._met
        return torch.empty(0) if met is None else met

    def _join(self) -> None:
        """What the last rank to arrive does for all."""
        calls = [(name, None if x is None else (tuple(x.shape), x.dtype)) for name, x in self._brought]
        for rank, call in enumerate(calls):
            if call != calls[0]:
                raise UsageError(
                    f"rank 0 is at {calls[0]}, rank {rank} at {call}: all ranks issue the same collectives with the "
                    "same shapes in the same order"
                )
        name, tensors = calls[0][0], [x for _, x in self._brought if x is not None]
        self._met = None
        if name == _END:
            return
        self.counts[name] += 1
        if name == "all_gather":
            self._met = torch.stack(tensors)
            return
        total = tensors[0]
        for x in tensors[1:]:
            total = total + x
        self._met = total
