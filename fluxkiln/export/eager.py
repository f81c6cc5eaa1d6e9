"""Parts executed by PyTorch: the rung of the ladder that judges the patches and nothing else."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.types import GraphFormat, PartRunner
from fluxkiln.components import KINDS, Part, find_part
from fluxkiln.export.bindings import part_state
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.parts import load_part, part_slots
from fluxkiln.patches.registry import apply_patches, patches_for

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch.nn import Module


def patched_runner(
    checkpoint: Checkpoint, parts: tuple[Part, ...], graph_format: GraphFormat = "onnx17", keep: int = 1
) -> PartRunner:
    """Run parts in float32 from the very modules a template of `graph_format` is traced from, patches applied.

    Weights are read when a part is run and the last `keep` parts stay in memory: a double block of FLUX.1 is 1.4 GB.
    One is enough for a replay part by part, and no number short of all helps a pipeline, which runs them in turn.

    Returns:
        A runner. It raises UsageError for a part that is not in `parts`, PatchError when upstream changed and
        CheckpointError when a tensor is missing.
    """
    loaded: OrderedDict[str, Module] = OrderedDict()

    def run(name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        part = find_part(parts, name)
        if name not in loaded:
            while loaded and len(loaded) >= keep:
                loaded.popitem(last=False)
            loaded[name] = _load(part, checkpoint)
        loaded.move_to_end(name)
        return run_module(part.kind, loaded[name], inputs, graph_format)

    return run


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
