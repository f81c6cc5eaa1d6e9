"""Parts executed by PyTorch: as published, and patched, the rung of the ladder that judges the patches alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.export.bindings import part_state
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.parts import Leaf, load_part, part_slots, watch_leaves
from fluxkiln.patches.patch import Patch, apply_patches, patches_for
from fluxkiln.types import GraphFormat, Kind, Part, find_part

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module


class PatchedRunner:
    """Runs parts in float32 from the very modules a template of `graph_format` is traced from, patches applied.

    Weights are read when a part is first run, and the last `keep` parts stay in memory: a double block has 1.4 GB. One
    is enough for a replay part by part, and no number short of all helps a pipeline, which runs them in turn.
    """

    def __init__(
        self, checkpoint: Checkpoint, parts: tuple[Part, ...], graph_format: GraphFormat = "onnx17", keep: int = 1
    ) -> None:
        self.keep = keep
        self.checkpoint = checkpoint
        self.parts = parts
        self.graph_format = graph_format
        self._loaded: dict[str, Module] = {}

    def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name.

        Raises:
            UsageError: no such part. PatchError: upstream changed. CheckpointError: a tensor is missing.
        """
        part = find_part(self.parts, name)
        if name not in self._loaded:
            while self._loaded and len(self._loaded) >= self.keep:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[name] = load_whole(part, self.checkpoint)
        self._loaded[name] = self._loaded.pop(name)  # the last used goes last
        patches = patches_for(self.checkpoint.model.patches(), part.kind, self.graph_format)
        return run_module(part.traits, self._loaded[name], inputs, patches)

    def close(self) -> None:
        """Drop the weights; the runner can be used again."""
        self._loaded.clear()


def run_module(
    kind: Kind, module: Module, inputs: Mapping[str, NDArray[Any]], patches: Iterable[Patch]
) -> dict[str, NDArray[Any]]:
    """Outputs of a wrapper module of `kind` by their names, float32, with the patches applied."""
    import numpy as np
    import torch

    # copies: recorded arrays may be read-only, which torch does not know
    tensors = [torch.from_numpy(np.array(inputs[name])) for name in kind.inputs if name in inputs]
    with apply_patches(patches), torch.no_grad():
        results = module(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    return {name: result.numpy() for name, result in zip(kind.outputs, results, strict=True)}


def see_leaves(part: Part, checkpoint: Checkpoint, inputs: Mapping[str, NDArray[Any]]) -> tuple[Leaf, ...]:
    """Run `part` in float32 as published, no patch applied, and see what its leaf modules make, in call order.

    Args:
        inputs: by the names and with the shapes of the part's kind.

    Raises:
        CheckpointError: a tensor the part needs is missing.
    """
    module = load_whole(part, checkpoint)
    seen = watch_leaves(module)
    run_module(part.traits, module, inputs, ())
    return tuple(seen)


def load_whole(part: Part, checkpoint: Checkpoint) -> Module:
    """The wrapper module of a part with its weights in float32; errors as `see_leaves`."""
    import torch

    state = part_state(part, part_slots(checkpoint.model, part.kind, checkpoint.configs), checkpoint)
    weights = {slot: torch.from_numpy(weight) for slot, weight in state.items()}
    return load_part(checkpoint.model, part.kind, checkpoint.configs, weights)
