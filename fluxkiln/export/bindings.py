"""From a part and its slots to a binding, for the whole part or for one of its ranks, and to weights, read in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.checkpoint import Checkpoint, read_rows, read_tensor
from fluxkiln.export.graph import slot_transforms
from fluxkiln.patches.cut import WHOLE, SilentRanks, columns_of, find_cut, share_of
from fluxkiln.patches.model import Model
from fluxkiln.patches.parts import slot_name
from fluxkiln.types import Binding, Configs, Part, Shapes, SlotBinding, TensorRef, TensorSpec, Transform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# a tensor's name, and from its shape how a slot is made of it
_Rule = tuple[str, Callable[[tuple[int, ...]], tuple[Transform, ...]]]
# shape of a tensor, rank -> how the rank's weight is made of it
_Transforms = Callable[[tuple[int, ...], int], tuple[Transform, ...]]


def bind_part(part: Part, slots: tuple[TensorSpec, ...], checkpoint: Checkpoint) -> Binding:
    """How every slot of `part` is filled from `checkpoint`.

    Raises:
        CheckpointError: a tensor the part needs is missing or has another shape than the slot.
    """

    def rule(slot: str) -> _Rule:
        base, transforms = slot_transforms(slot)
        return part.prefix + base, lambda _: transforms

    return _bind(part, slots, checkpoint, rule)


def _bind(
    part: Part, slots: tuple[TensorSpec, ...], checkpoint: Checkpoint, rule: Callable[[str], _Rule], where: str = ""
) -> Binding:
    bindings = []
    for spec in slots:
        name, transforms_of = rule(spec.name)
        ref = _find_tensor(part, name, checkpoint)
        transforms = transforms_of(ref.shape)
        shape = transformed_shape(ref.shape, transforms)
        if shape != spec.shape:
            raise CheckpointError(
                f"tensor {name} of {part.folder} has shape {list(ref.shape)}, which gives {list(shape)}{where} where "
                f"part {part.name} needs {list(spec.shape)}; its config.json belongs to another checkpoint"
            )
        bindings.append(SlotBinding(spec.name, (name,), transforms))
    return Binding(part.name, part.folder, tuple(bindings))


def _find_tensor(part: Part, name: str, checkpoint: Checkpoint) -> TensorRef:
    ref = checkpoint.tensors[part.folder].get(name)
    if ref is None:
        raise CheckpointError(
            f"{part.folder} of {checkpoint.root} has no tensor {name}, which part {part.name} needs; fetch the "
            "checkpoint again or give one in the diffusers layout"
        )
    return ref


def transformed_shape(shape: tuple[int, ...], transforms: tuple[Transform, ...]) -> tuple[int, ...]:
    """The shape after the transforms."""
    for step in transforms:
        if step.op == "transpose":
            shape = shape[::-1]
        elif step.op == "slice":
            shape = (*shape[: step.dim], step.stop - step.start, *shape[step.dim + 1 :])
        elif step.op == "pad":
            shape = (*shape[: step.dim], step.stop, *shape[step.dim + 1 :])
    return shape


def binding_refs(binding: Binding, checkpoint: Checkpoint) -> tuple[TensorRef, ...]:
    """The checkpoint tensors a binding reads, each once, in order of first use."""
    tensors = checkpoint.tensors[binding.component]
    names = dict.fromkeys(source for slot in binding.slots for source in slot.sources)
    return tuple(tensors[name] for name in names)


@dataclass(frozen=True, slots=True)
class BoundWeights:
    """The weights of a part by slot, read from the checkpoint each time; see `weight_reader`."""

    tensors: Mapping[str, TensorRef]
    slots: Mapping[str, SlotBinding]

    def __call__(self, slot: str) -> NDArray[Any]:
        """The whole weight."""
        bound = self.slots[slot]
        return apply_transforms(read_tensor(self.tensors[bound.sources[0]]), _in_torch_layout(bound.transforms))

    def read_rows(self, slot: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the weight; of the checkpoint's tensor only these are read."""
        bound = self.slots[slot]
        transforms = _in_torch_layout(bound.transforms)
        if any(step.op == "transpose" or (step.op == "pad" and step.dim == 0) for step in transforms):
            return self(slot)[start:stop]
        first = sum(step.start for step in transforms if step.op == "slice" and step.dim == 0)
        rest = tuple(step for step in transforms if not (step.op == "slice" and step.dim == 0))
        return apply_transforms(read_rows(self.tensors[bound.sources[0]], first + start, first + stop), rest)


def weight_reader(binding: Binding, checkpoint: Checkpoint) -> BoundWeights:
    """slot -> its weight in torch's layout: all transforms but a last transpose, which is the graph's own layout.

    The array keeps the checkpoint's dtype (bfloat16 as `ml_dtypes.bfloat16`) unless a transform computes.
    """
    return BoundWeights(checkpoint.tensors[binding.component], {slot.slot: slot for slot in binding.slots})


def read_slots(binding: Binding, read: Callable[[str], NDArray[Any]]) -> Callable[[str], NDArray[Any]]:
    """As `weight_reader`, of tensors by name from anywhere."""
    slots = {slot.slot: slot for slot in binding.slots}

    def weight(name: str) -> NDArray[Any]:
        bound = slots[name]
        return apply_transforms(read(bound.sources[0]), _in_torch_layout(bound.transforms))

    return weight


def _in_torch_layout(transforms: tuple[Transform, ...]) -> tuple[Transform, ...]:
    return transforms[:-1] if transforms and transforms[-1].op == "transpose" else transforms


def apply_transforms(weight: NDArray[Any], transforms: tuple[Transform, ...]) -> NDArray[Any]:
    """The weight after the transforms, contiguous; a factor makes it float32."""
    import numpy as np

    for step in transforms:
        if step.op == "transpose":
            weight = weight.T
        elif step.op == "slice":
            weight = weight[(slice(None),) * step.dim + (slice(step.start, step.stop),)]
        elif step.op == "scale":
            weight = weight.astype(np.float32) * np.float32(step.factor)
        elif step.op == "pad":
            missing = step.stop - weight.shape[step.dim]
            weight = np.pad(weight, [(0, missing if axis == step.dim else 0) for axis in range(weight.ndim)])
    return np.ascontiguousarray(weight)


def part_state(part: Part, slots: Iterable[str], checkpoint: Checkpoint) -> dict[str, NDArray[np.float32]]:
    """The weights of a part in float32, by slot: what `patches.parts.load_part` takes.

    Args:
        slots: the weights the part holds, see `patches.parts.part_slots`; nothing else is read.

    Raises:
        CheckpointError: a tensor the part needs is missing.
    """
    import numpy as np

    return {slot: read_tensor(_find_tensor(part, part.prefix + slot, checkpoint)).astype(np.float32) for slot in slots}


def split_slots(model: Model, part: Part, configs: Configs, ranks: int) -> tuple[TensorSpec, ...]:
    """The slots of a part in order, with the shapes each rank has; the ones of the module that is compiled.

    Raises:
        UsageError: the ranks cannot share a weight. PatchError, CheckpointError: as `Model.build_parallel_part`.
    """
    if not part.traits.cut:
        parameters = model.build_part(part.kind, configs).named_parameters()
        return tuple(TensorSpec(slot_name(name), tuple(weight.shape)) for name, weight in parameters)
    # weights do not depend on the size of the image
    return model.build_parallel_part(part, configs, Shapes(16, 16, 1), SilentRanks(ranks)).slots


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

    def rule(slot: str) -> _Rule:
        name, transforms_of = slot_rule(checkpoint.model, part, slot, checkpoint.configs, ranks)
        return name, lambda shape: transforms_of(shape, rank)

    return _bind(part, slots, checkpoint, rule, f" on one of {ranks} ranks")


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
