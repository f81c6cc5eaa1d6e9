"""diffusers' and transformers' own leaf modules, seen at work inside one part: what a template is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.export.bindings import part_state
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.leaves import Leaf, watch_leaves
from fluxkiln.patches.parts import load_part, part_slots
from fluxkiln.types import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module


def see_leaves(part: Part, checkpoint: Checkpoint, inputs: Mapping[str, NDArray[Any]]) -> tuple[Leaf, ...]:
    """Run `part` in float32 as published, no patch applied, and see what its leaf modules make, in call order.

    Args:
        inputs: by the names and with the shapes of the part's kind.

    Raises:
        CheckpointError: a tensor the part needs is missing.
    """
    import numpy as np
    import torch

    module = load_whole(part, checkpoint)
    seen = watch_leaves(module)
    tensors = [torch.from_numpy(np.array(inputs[name])) for name in part.traits.inputs if name in inputs]
    with torch.no_grad():
        module(*tensors)
    return tuple(seen)


def load_whole(part: Part, checkpoint: Checkpoint) -> Module:
    """The wrapper module of a part with its weights in float32; errors as `see_leaves`."""
    import torch

    state = part_state(part, part_slots(checkpoint.model, part.kind, checkpoint.configs), checkpoint)
    weights = {slot: torch.from_numpy(weight) for slot, weight in state.items()}
    return load_part(checkpoint.model, part.kind, checkpoint.configs, weights)
