"""From a part and a template's slots to a binding, and from a binding to weights, read in place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import Checkpoint, read_rows, read_tensor
from fluxkiln.export.graph import slot_transforms
from fluxkiln.types import Binding, Part, SlotBinding, TensorRef, TensorSpec, Transform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def bind_part(part: Part, slots: tuple[TensorSpec, ...], checkpoint: Checkpoint) -> Binding:
    """How every slot of `part` is filled from `checkpoint`.

    Raises:
        CheckpointError: a tensor the part needs is missing or has another shape than the slot.
    """
    component = part.folder
    tensors = checkpoint.tensors[component]
    bindings = []
    for spec in slots:
        base, transforms = slot_transforms(spec.name)
        ref = tensors.get(part.prefix + base)
        if ref is None:
            raise _missing(part, base, checkpoint)
        shape = transformed_shape(ref.shape, transforms)
        if shape != spec.shape:
            raise CheckpointError(
                f"tensor {ref.name} of {component} has shape {list(ref.shape)}, which gives {list(shape)} where part "
                f"{part.name} needs {list(spec.shape)}; its config.json belongs to another checkpoint"
            )
        bindings.append(SlotBinding(spec.name, (ref.name,), transforms))
    return Binding(part.name, component, tuple(bindings))


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

    component = part.folder
    tensors = checkpoint.tensors[component]
    state = {}
    for slot in slots:
        ref = tensors.get(part.prefix + slot)
        if ref is None:
            raise _missing(part, slot, checkpoint)
        state[slot] = read_tensor(ref).astype(np.float32)
    return state


def _missing(part: Part, slot: str, checkpoint: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{part.folder} of {checkpoint.root} has no tensor {part.prefix + slot}, which part {part.name} needs; "
        "fetch the checkpoint again or give one in the diffusers layout"
    )
