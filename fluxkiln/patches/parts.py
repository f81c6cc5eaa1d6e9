"""The wrapper module of a part: its weights, how they get into it, and what upstream's leaf modules in it make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError
from fluxkiln.patches.model import Model
from fluxkiln.types import Configs

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.nn import Module


def part_slots(model: Model, kind: str, configs: Configs) -> tuple[str, ...]:
    """The weights a part of `kind` holds, as the checkpoint names them after the part's prefix; errors as build_part.

    T5's block 0 has one tensor more in the checkpoint, the position bias table, which no part holds.
    """
    return tuple(slot_name(name) for name, _ in model.build_part(kind, configs).named_parameters())


def load_part(model: Model, kind: str, configs: Configs, weights: Mapping[str, Tensor]) -> Module:
    """The wrapper module of `kind` with real weights, keyed by `slot_name`; for eager execution.

    Raises:
        CheckpointError: a weight is missing or one too many.
    """
    module = model.build_part(kind, configs)
    names = {name: slot_name(name) for name, _ in module.named_parameters()}
    missing = sorted(set(names.values()) ^ set(weights))
    if missing:
        raise CheckpointError(f"part of kind {kind}: weight {missing[0]} is missing or unexpected")
    state = {name: weights[slot] for name, slot in names.items()}
    buffers = {name: _real_buffer(name, buffer) for name, buffer in module.named_buffers()}
    module.load_state_dict({**state, **buffers}, strict=False, assign=True)
    return module


def slot_name(parameter: str) -> str:
    """A parameter's name inside the part, as the checkpoint has it after the part's prefix."""
    return parameter.removeprefix("block.")


def _real_buffer(name: str, buffer: Tensor) -> Tensor:
    import torch

    return torch.zeros(buffer.shape, dtype=buffer.dtype)  # position ids: the parts do not read them


@dataclass(frozen=True, slots=True)
class Leaf:
    """One call of a leaf module: its name inside the part as the checkpoint has it, its class, and what it returned.

    `epsilon` is a norm's own, else None.
    """

    name: str
    type: str
    output: NDArray[Any]
    epsilon: float | None


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
