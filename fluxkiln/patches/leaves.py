"""diffusers' and transformers' own leaf modules, seen at work: what a part is compared with from inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.patches.parts import slot_name

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
