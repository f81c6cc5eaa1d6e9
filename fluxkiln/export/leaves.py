"""diffusers' and transformers' own leaf modules, seen at work inside one part: what a template is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.components import KINDS, Part
from fluxkiln.export.bindings import part_state
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.flux1.parts import load_part, part_slots, slot_name

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module


@dataclass(frozen=True, slots=True)
class Leaf:
    """One call of a leaf module: its name inside the part as the checkpoint has it, its class, and what it returned.

    `epsilon` is a norm's own, else None.
    """

    name: str
    type: str
    output: NDArray[Any]
    epsilon: float | None


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
    tensors = [torch.from_numpy(np.array(inputs[name])) for name in KINDS[part.kind].inputs if name in inputs]
    with torch.no_grad():
        module(*tensors)
    return tuple(seen)


def load_whole(part: Part, checkpoint: Checkpoint) -> Module:
    """The wrapper module of a part with its weights in float32; errors as `see_leaves`."""
    import torch

    state = part_state(part, part_slots(part.kind, checkpoint.configs), checkpoint)
    return load_part(part.kind, checkpoint.configs, {slot: torch.from_numpy(weight) for slot, weight in state.items()})


def watch_leaves(module: Module) -> list[Leaf]:
    """A list that gets what the leaf modules of `module` make whenever it runs, in call order."""
    import torch

    seen: list[Leaf] = []

    def watch(name: str, leaf: Any) -> None:
        epsilon = next((getattr(leaf, key) for key in ("eps", "variance_epsilon") if hasattr(leaf, key)), None)

        def hook(_: Any, __: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point():
                seen.append(Leaf(slot_name(name), type(leaf).__name__, output.float().numpy().copy(), epsilon))

        leaf.register_forward_hook(hook)

    for name, leaf in module.named_modules():
        if not list(leaf.children()):
            watch(name, leaf)
    return seen
