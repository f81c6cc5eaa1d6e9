"""What ranks hold, put together again: shards as whole tensors, and parts that run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fluxkiln.errors import CheckpointError, IntegrityError
from fluxkiln.export.bindings import apply_transforms, bind_shard, split_slots, window_of
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.shard_files import ShardFile, write_part
from fluxkiln.patches.cut import ParallelPart
from fluxkiln.types import Part


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
