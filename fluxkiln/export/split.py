"""From a tensor-parallel part to bindings of each rank: which tensors, which rows and columns of them, what padding.

Everything follows from the model's table of cuts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.bindings import transformed_shape
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.cut import WHOLE, columns_of, find_cut, share_of
from fluxkiln.patches.model import Model
from fluxkiln.patches.parts import slot_name
from fluxkiln.types import Binding, Configs, Part, Shapes, SlotBinding, TensorSpec, Transform

# shape of a tensor, rank -> how the rank's weight is made of it
_Transforms = Callable[[tuple[int, ...], int], tuple[Transform, ...]]


def split_slots(model: Model, part: Part, configs: Configs, ranks: int) -> tuple[TensorSpec, ...]:
    """The slots of a part in order, with the shapes each rank has; the ones of the module that is compiled.

    Raises:
        UsageError: the ranks cannot share a weight. PatchError, CheckpointError: as `Model.build_parallel_part`.
    """
    if not part.traits.cut:
        parameters = model.build_part(part.kind, configs).named_parameters()
        return tuple(TensorSpec(slot_name(name), tuple(weight.shape)) for name, weight in parameters)
    from fluxkiln.patches.collectives import ThreadRanks

    # weights do not depend on the size of the image
    return model.build_parallel_part(part, configs, Shapes(16, 16, 1), ThreadRanks(ranks)).slots


def bind_shard(part: Part, slots: tuple[TensorSpec, ...], checkpoint: Checkpoint, ranks: int, rank: int) -> Binding:
    """How every slot of `part` is filled from `checkpoint` on one rank.

    Args:
        slots: with the shapes of a rank, see `split_slots`.

    Raises:
        UsageError: the ranks cannot share a weight. CheckpointError: a tensor the part needs is missing or has
            another shape than its config says.
    """
    if not 0 <= rank < ranks:
        raise UsageError(f"rank {rank} of {ranks}: ranks are counted from 0 to {ranks - 1}")
    tensors = checkpoint.tensors[part.folder]
    bindings = []
    for spec in slots:
        name, transforms_of = slot_rule(checkpoint.model, part, spec.name, checkpoint.configs, ranks)
        ref = tensors.get(name)
        if ref is None:
            raise CheckpointError(
                f"{part.folder} of {checkpoint.root} has no tensor {name}, which part {part.name} needs; fetch the "
                "checkpoint again or give one in the diffusers layout"
            )
        transforms = transforms_of(ref.shape, rank)
        shape = transformed_shape(ref.shape, transforms)
        if shape != spec.shape:
            raise CheckpointError(
                f"tensor {name} of {part.folder} has shape {list(ref.shape)}, which gives {list(shape)} on one of "
                f"{ranks} ranks where part {part.name} needs {list(spec.shape)}; its config.json belongs to another "
                "checkpoint"
            )
        bindings.append(SlotBinding(spec.name, (name,), transforms))
    return Binding(part.name, part.folder, tuple(bindings))


def slot_rule(model: Model, part: Part, slot: str, configs: Configs, ranks: int) -> tuple[str, _Transforms]:
    """The tensor behind a slot, and the function from its shape and a rank to transforms."""
    number, local = (0, slot) if len(part.members) == 1 else (int(slot.split(".")[0]), slot.partition(".")[2])
    kind, prefix = part.members[number]
    cut, heads = find_cut(model.cuts.get(kind, WHOLE), local), model.head_count(kind, configs)

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


def holds_tensor(model: Model, part: Part, name: str) -> bool:
    """Whether a part has a tensor of its component, or some of it."""
    return any(
        name.startswith(prefix) and cut.takes(name.removeprefix(prefix))
        for kind, prefix in part.members
        for cut in model.cuts.get(kind, WHOLE)
    )


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
