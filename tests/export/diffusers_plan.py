"""The table of cuts against diffusers' own tensor-parallel plan, rank by rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from fluxkiln.errors import PatchError
from fluxkiln.export.bindings import slot_rule, split_slots, window_of
from fluxkiln.patches.flux1.kinds import list_split_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.types import Configs

# per rank: rows and columns of every piece, in order
Pieces = list[list[tuple[tuple[int, int], tuple[int, int]]]]


def check_against_diffusers(configs: Configs, ranks: int) -> tuple[str, ...]:
    """Compare every rank's cut of the transformer with diffusers' own tensor-parallel plan.

    Returns:
        The tensors that are cut here and whole there, by name in the checkpoint.

    Raises:
        PatchError: diffusers cuts a tensor in another way. UsageError: the ranks cannot share a weight.

    Source: `FluxTransformer2DModel._tp_plan`, resolved by `diffusers.hooks.tensor_parallel.resolve_tp_shard_specs`.
    """
    import torch
    from diffusers import FluxTransformer2DModel
    from diffusers.hooks.tensor_parallel import resolve_tp_shard_specs

    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(dict(configs["transformer"]))
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    theirs = resolve_tp_shard_specs(model, model._tp_plan, ranks)
    ours = _pieces(configs, shapes, ranks)
    if ours.keys() != shapes.keys():
        raise PatchError(f"no part has the tensors {sorted(ours.keys() ^ shapes.keys())}; install the pinned diffusers")
    beyond = []
    for name, pieces in ours.items():
        spec = theirs.get(name)
        expected = _diffusers_pieces(spec, shapes[name], ranks)
        if pieces == expected:
            continue
        if spec is not None:
            raise PatchError(
                f"{name} is cut as {pieces} here, diffusers cuts it as {expected} for {ranks} ranks; install the "
                "diffusers pinned in constraints.txt, or bring the table of cuts up to date"
            )
        beyond.append(name)
    return tuple(beyond)


def _pieces(configs: Configs, shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, Pieces]:
    made: dict[str, Pieces] = defaultdict(lambda: [[] for _ in range(ranks)])
    for part in list_split_parts(configs):
        if part.component == "transformer":
            for spec in split_slots(MODEL, part, configs, ranks):
                name, transforms_of = slot_rule(MODEL, part, spec.name, configs, ranks)
                for rank in range(ranks):
                    window = window_of(shapes[name], transforms_of(shapes[name], rank))
                    made[name][rank].append((window.rows, window.columns))
    return dict(made)


def _diffusers_pieces(spec: Any, shape: tuple[int, ...], ranks: int) -> Pieces:
    """What `diffusers.hooks.tensor_parallel._local_shard` gives to each rank."""
    whole = [(0, size) for size in (*shape, 1)[:2]]
    if spec is None or spec.dim is None:
        return [[(whole[0], whole[1])] for _ in range(ranks)]
    pieces: Pieces = [[] for _ in range(ranks)]
    start = 0
    for size in spec.block_sizes:
        chunk = size // ranks
        for rank in range(ranks):
            spans = list(whole)
            spans[spec.dim] = start + rank * chunk, start + (rank + 1) * chunk
            pieces[rank].append((spans[0], spans[1]))
        start += size
    return pieces
