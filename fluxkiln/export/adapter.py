"""LoRAs of a checkpoint as one adapter, for programs that add it to weights which they have: mflux, MLX's example.

Downs lie below each other, ups beside each other, each up times strength and alpha / rank: the sum of the pairs is one
pair. What is no pair of matrices, a DoRA say, cannot be written so.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.change import Change, LowRank
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.lora import changed_tensors
from fluxkiln.files import write_durably
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    from torch import Tensor

# targets whose programs take adapters: by diffusers' names, and by those of MLX's FLUX example
ADAPTED = ("mflux", "mlx_example")
_WEIGHT = ".weight"
_INSTEAD = "fuse it: fluxkiln fuse, or --lora of a build"


def write_adapter(path: Path, checkpoint: Checkpoint, layout: str) -> int:
    """Write the LoRAs that a checkpoint was opened with as one file; how many layers of the program it changes.

    Raises:
        UsageError: no such layout, or `path` is there. CheckpointError: what a LoRA changes is no layer of a block, or
            not changed by a pair of matrices.
    """
    from safetensors.torch import save

    if layout not in ADAPTED:
        raise UsageError(f"--adapter {layout}: adapters are written for {' and '.join(ADAPTED)}")
    if path.exists():
        raise UsageError(f"{path} is there already; name a new file")
    model = checkpoint.model
    pairs = {ref.name.removesuffix(_WEIGHT): _pair(checkpoint, component, ref)
             for component, ref in changed_tensors(checkpoint)}  # fmt: skip
    if layout == "mflux":
        tensors = {f"{model.adapted}.{name}.lora_{place}{_WEIGHT}": matrix
                   for name, pair in pairs.items() for place, matrix in zip("AB", pair, strict=True)}  # fmt: skip
        facts, layers = {"format": "pt"}, len(pairs)
    else:
        tensors = model.mlx_lora(pairs | _untouched(checkpoint, pairs))
        if not tensors:
            raise UsageError(f"--adapter {layout}: MLX's example has no {model.title}; leave it out")
        # any rank is taken, and -1 is all blocks
        facts, layers = (
            {"lora_rank": str(max(down.shape[0] for down, _ in pairs.values())), "lora_blocks": "-1"},
            len(tensors) // 2,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, save(tensors, facts))
    return layers


def _pair(checkpoint: Checkpoint, component: str, ref: TensorRef) -> tuple[Tensor, Tensor]:
    """Down [R, I] and up [O, R] of all that changes a tensor, strength 1."""
    import torch

    model, change = checkpoint.model, ref.change
    assert isinstance(change, Change)
    blocks = model.stacks.get(model.adapted, {})
    if component != model.adapted or not re.match(rf"({'|'.join(blocks)})\.\d+\..*\{_WEIGHT}$", ref.name):
        raise CheckpointError(
            f"{ref.name} of the {component} is no layer of a block, and adapters change those of the {model.adapted} "
            f"alone; {_INSTEAD}"
        )
    downs, ups = [], []
    for piece, (_, strength) in zip(change.pieces, change.loras, strict=True):
        if not isinstance(piece.delta, LowRank) or piece.replaces or piece.magnitude is not None:
            raise CheckpointError(
                f"{ref.name} is not changed by a pair of matrices but by a LoHa, LoKr or DoRA; {_INSTEAD}"
            )
        downs.append(torch.from_numpy(piece.delta.down()))
        ups.append(torch.from_numpy(piece.delta.up.rows(piece.rows)) * (strength * piece.scale))
    return torch.cat(downs), torch.cat(ups, dim=1)


def _untouched(checkpoint: Checkpoint, pairs: dict[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of rank 0 for the other layers of these blocks: the example joins layers."""
    import torch

    blocks = {tuple(name.split(".")[:2]) for name in pairs}
    refs = checkpoint.tensors[checkpoint.model.adapted].values()
    return {
        ref.name.removesuffix(_WEIGHT): (torch.zeros(0, ref.shape[1]), torch.zeros(ref.shape[0], 0))
        for ref in refs
        if len(ref.shape) == 2
        and tuple(ref.name.split(".")[:2]) in blocks
        and ref.name.removesuffix(_WEIGHT) not in pairs
    }
