"""Parts executed by PyTorch: the rung of the ladder that judges the patches and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.components import KINDS, Part, find_part
from fluxkiln.export.bindings import part_state
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.flux1.parts import load_part, part_slots
from fluxkiln.patches.patch import apply_patches, patches_for
from fluxkiln.types import GraphFormat

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
            self._loaded[name] = _load(part, self.checkpoint)
        self._loaded[name] = self._loaded.pop(name)  # the last used goes last
        return run_module(part.kind, self._loaded[name], inputs, self.graph_format)

    def close(self) -> None:
        """Drop the weights; the runner can be used again."""
        self._loaded.clear()


def run_module(
    kind: str, module: Module, inputs: Mapping[str, NDArray[Any]], graph_format: GraphFormat
) -> dict[str, NDArray[Any]]:
    """Outputs of a wrapper module of `kind` by their names, float32, with the patches of `graph_format` applied."""
    import numpy as np
    import torch

    # copies: recorded arrays may be read-only, which torch does not know
    tensors = [torch.from_numpy(np.array(inputs[name])) for name in KINDS[kind].inputs if name in inputs]
    with apply_patches(patches_for(kind, graph_format)), torch.no_grad():
        results = module(*tensors)
    results = results if isinstance(results, tuple) else (results,)
    return {name: result.numpy() for name, result in zip(KINDS[kind].outputs, results, strict=True)}


def _load(part: Part, checkpoint: Checkpoint) -> Module:
    import torch

    state = part_state(part, part_slots(part.kind, checkpoint.configs), checkpoint)
    return load_part(part.kind, checkpoint.configs, {slot: torch.from_numpy(weight) for slot, weight in state.items()})
