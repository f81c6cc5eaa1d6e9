"""From a tensor-parallel part to bindings of each rank: which tensors, which rows and columns of them, what padding.

Everything follows from the table of `fluxkiln.patches.flux1.cuts`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fluxkiln.components import Part, Shapes
from fluxkiln.errors import CheckpointError, PatchError, UsageError
from fluxkiln.export.bindings import tensors_of, transformed_shape
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.flux1.cuts import columns_of, find_cut, head_count, share_of
from fluxkiln.types import Binding, SlotBinding, TensorSpec, Transform

Configs = Mapping[str, Mapping[str, Any]]
# parts that run on one core, whatever the others do
WHOLE_KINDS = ("clip", "vae_decoder", "tiny_vae_decoder")
# shape of a tensor, rank -> how the rank's weight is made of it
_Transforms = Callable[[tuple[int, ...], int], tuple[Transform, ...]]


@dataclass(frozen=True, slots=True)
class SplitPart:
    """One unit of compilation whose weights are cut over ranks.

    Attributes:
        name: what its folder of shards is called.
        kind: of `fluxkiln.patches.flux1.parallel.PARALLEL_KINDS` or `WHOLE_KINDS`.
        component: the key of `Checkpoint.tensors`.
        members: kind and prefix of what it holds, in the order it runs them. A part of several has the number of the
            member in front of its slots' names: `0.attn.to_q.weight`.
    """

    name: str
    kind: str
    component: str
    members: tuple[tuple[str, str], ...]

    def ranks(self, tp_degree: int) -> int:
        """How many ranks it runs on when the others run on `tp_degree`."""
        return 1 if self.kind in WHOLE_KINDS else tp_degree


def list_split_parts(
    configs: Configs, granularity: str = "block", vae: Literal["kl", "tiny"] = "kl"
) -> tuple[SplitPart, ...]:
    """All parts of a pipeline in the order they run.

    Args:
        granularity: `block`, each block a part; `group:N`, N successive blocks of a kind; `whole`, one part for head,
            all blocks and tail.

    Raises:
        UsageError: no such granularity.
    """
    match = re.fullmatch(r"block|whole|group:([1-9]\d*)", granularity)
    if match is None:
        raise UsageError(f"granularity {granularity!r}: block, group:N with N blocks in a part, and whole are known")
    flux = configs["transformer"]
    doubles = [("double", f"transformer_blocks.{i}.") for i in range(int(flux["num_layers"]))]
    singles = [("single", f"single_transformer_blocks.{i}.") for i in range(int(flux["num_single_layers"]))]
    vae_kind = "vae_decoder" if vae == "kl" else "tiny_vae_decoder"
    if granularity == "whole":
        members = (("head", ""), *doubles, *singles, ("tail", ""))
        transformer = [SplitPart("transformer", "transformer", "transformer", members)]
    else:
        size = int(match.group(1) or 1)
        transformer = [
            SplitPart("head", "head", "transformer", (("head", ""),)),
            *_groups("double", doubles, size),
            *_groups("single", singles, size),
            SplitPart("tail", "tail", "transformer", (("tail", ""),)),
        ]
    return (
        SplitPart("clip", "clip", "text_encoder", (("clip", ""),)),
        SplitPart("t5", "t5", "text_encoder_2", (("t5", ""),)),
        *transformer,
        SplitPart(vae_kind, vae_kind, tensors_of(Part(vae_kind, vae_kind)), ((vae_kind, "decoder."),)),
    )


def _groups(kind: str, blocks: Sequence[tuple[str, str]], size: int) -> list[SplitPart]:
    parts = []
    for first in range(0, len(blocks), size):
        members = tuple(blocks[first : first + size])
        last = first + len(members) - 1
        name = f"{kind}.{first:02d}" if first == last else f"{kind}.{first:02d}-{last:02d}"
        parts.append(SplitPart(name, kind, "transformer", members))
    return parts


def split_slots(part: SplitPart, configs: Configs, ranks: int) -> tuple[TensorSpec, ...]:
    """The slots of a part in order, with the shapes each rank has; the ones of the module that is compiled.

    Raises:
        UsageError: the ranks cannot share a weight. PatchError, CheckpointError: as `build_parallel_part`.
    """
    if part.kind in WHOLE_KINDS:
        from fluxkiln.patches.flux1.parts import build_part, slot_name

        parameters = build_part(part.kind, configs).named_parameters()
        return tuple(TensorSpec(slot_name(name), tuple(weight.shape)) for name, weight in parameters)
    from fluxkiln.patches.collectives import ThreadRanks
    from fluxkiln.patches.flux1.parallel import build_parallel_part

    # weights do not depend on the size of the image
    blocks = 1 if part.kind == "transformer" else len(part.members)
    return build_parallel_part(part.kind, configs, Shapes(16, 16, 1), ThreadRanks(ranks), blocks=blocks).slots


def bind_shard(
    part: SplitPart, slots: tuple[TensorSpec, ...], checkpoint: Checkpoint, ranks: int, rank: int
) -> Binding:
    """How every slot of `part` is filled from `checkpoint` on one rank.

    Args:
        slots: with the shapes of a rank, see `split_slots`.

    Raises:
        UsageError: the ranks cannot share a weight. CheckpointError: a tensor the part needs is missing or has
            another shape than its config says.
    """
    if not 0 <= rank < ranks:
        raise UsageError(f"rank {rank} of {ranks}: ranks are counted from 0 to {ranks - 1}")
    tensors = checkpoint.tensors[part.component]
    bindings = []
    for spec in slots:
        name, transforms_of = _slot_rule(part, spec.name, checkpoint.configs, ranks)
        ref = tensors.get(name)
        if ref is None:
            raise CheckpointError(
                f"{part.component} of {checkpoint.root} has no tensor {name}, which part {part.name} needs; fetch the "
                "checkpoint again or give one in the diffusers layout"
            )
        transforms = transforms_of(ref.shape, rank)
        shape = transformed_shape(ref.shape, transforms)
        if shape != spec.shape:
            raise CheckpointError(
                f"tensor {name} of {part.component} has shape {list(ref.shape)}, which gives {list(shape)} on one of "
                f"{ranks} ranks where part {part.name} needs {list(spec.shape)}; its config.json belongs to another "
                "checkpoint"
            )
        bindings.append(SlotBinding(spec.name, (name,), transforms))
    return Binding(part.name, part.component, tuple(bindings))


def _slot_rule(part: SplitPart, slot: str, configs: Configs, ranks: int) -> tuple[str, _Transforms]:
    """The tensor behind a slot, and the function from its shape and a rank to transforms."""
    number, local = (0, slot) if len(part.members) == 1 else (int(slot.split(".")[0]), slot.partition(".")[2])
    kind, prefix = part.members[number]
    cut, heads = find_cut(kind, local), head_count(kind, configs)

    def transforms(shape: tuple[int, ...], rank: int) -> tuple[Transform, ...]:
        steps = []
        if cut.half:
            start, stop = columns_of(cut, shape)
            steps.append(Transform("slice", dim=1, start=start, stop=stop))
            shape = (shape[0], stop - start)
        share = share_of(cut, slot, shape, heads, ranks, rank)
        if share is not None and ranks > 1:
            steps.append(Transform("slice", dim=share.axis, start=share.start, stop=share.stop))
            if share.stop - share.start < share.size:
                steps.append(Transform("pad", dim=share.axis, stop=share.size))
        return tuple(steps)

    return prefix + (cut.source or local), transforms


@dataclass(frozen=True, slots=True)
class Window:
    """What a slot takes from a tensor [rows, columns, ...]: two intervals, then zeros behind up to `shape`."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    shape: tuple[int, ...]


def window_of(shape: tuple[int, ...], transforms: tuple[Transform, ...]) -> Window:
    """Slices and paddings of a tensor of `shape` as one window; a vector is a matrix of one column."""
    spans = [(0, size) for size in (*shape, 1)[:2]]
    for step in transforms:
        if step.op == "slice":
            start = spans[step.dim][0]
            spans[step.dim] = start + step.start, start + step.stop
        elif step.op != "pad":
            raise UsageError(f"transform {step.op}: the weights of a rank are sliced and padded, nothing else")
    return Window(spans[0], spans[1], transformed_shape(shape, transforms))


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


# per rank: rows and columns of every piece, in order
Pieces = list[list[tuple[tuple[int, int], tuple[int, int]]]]


def _pieces(configs: Configs, shapes: Mapping[str, tuple[int, ...]], ranks: int) -> dict[str, Pieces]:
    made: dict[str, Pieces] = defaultdict(lambda: [[] for _ in range(ranks)])
    for part in list_split_parts(configs):
        if part.component == "transformer":
            for spec in split_slots(part, configs, ranks):
                name, transforms_of = _slot_rule(part, spec.name, configs, ranks)
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
