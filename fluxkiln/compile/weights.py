"""Which rounder each slot of a part gets: the scheme's method, with the checkpoint's calibration where it takes one.

A mould does not depend on it: all methods write codes, scales and zero points of one format to the same places. For
methods that need more than codes see `fluxkiln.compile.corrections`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template
from fluxkiln.digests import digest_json
from fluxkiln.errors import SchemeError
from fluxkiln.export.bindings import bind_part
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.calibration import Calibration, Statistics, open_calibration
from fluxkiln.quantize.pack import Rounder, RounderOf
from fluxkiln.quantize.rounders import as_compiler, make_rounder
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Part, SlotBinding, TensorRef


def calibration_action(component: str, digest: str) -> Action:
    """The key under which the store keeps the calibration that builds of these weights use: the last one made."""
    return Action("calibration", f"calibration of {component}", "1", {component: digest})


def component_digest(digests: Mapping[str, Mapping[str, str]], component: str) -> str:
    """A digest over all tensors of a component."""
    return digest_json(dict(digests[component]))


def find_calibration(cache: ActionCache, component: str, digest: str) -> Calibration | None:
    """The calibration of a component's weights, if the store has one.

    Raises:
        SchemeError: it was made with other weights. IntegrityError: it is damaged.
    """
    found = cache.lookup(calibration_action(component, digest).key)
    if found is None:
        return None
    blob = found.outputs["calibration"]
    calibration = open_calibration(cache.store.path(blob.digest), blob.digest)
    calibration.check_checkpoint(component, digest)
    return calibration


def part_calibration(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part) -> Calibration | None:
    """The calibration that a part's scheme asks for; None where it asks for none.

    Raises:
        SchemeError: there is none in the store.
    """
    scheme = plan.scheme(part)
    if not scheme.calibrated:
        return None
    component = part.folder
    found = find_calibration(cache, component, component_digest(checkpoint.digests, component))
    if found is None:
        raise SchemeError(
            f"{part.name} is to be stored as {scheme.name}, which needs calibration, and the store has none for the "
            f"{component} of {checkpoint.name}; run fluxkiln calibrate on this model first"
        )
    return found


def used_calibrations(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> dict[str, str]:
    """Component -> digest of the calibration that its parts are rounded by; without what the store has not got."""
    found: dict[str, str] = {}
    for component in dict.fromkeys(part.folder for part in plan.parts if plan.scheme(part).calibrated):
        if component in checkpoint.digests:
            calibration = find_calibration(cache, component, component_digest(checkpoint.digests, component))
            found |= {component: calibration.digest} if calibration else {}
    return found


def check_methods(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
    """Raise SchemeError before anything is compiled, where a method cannot be had for lack of calibration."""
    for kind in plan.kinds():
        part_calibration(checkpoint, plan, cache, next(part for part in plan.parts if part.kind == kind))


def part_rounders(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, graph_format: Any = "onnx17"
) -> RounderOf:
    """Slot of a part's template -> its rounder; by a method that needs more than codes, that of what is in codes.

    Args:
        graph_format: of the template whose slots are asked for.

    Raises:
        SchemeError: the method needs a calibration, and there is none or not of this checkpoint.
    """
    scheme = plan.scheme(part)
    if scheme.rounds_as_compiler:
        return as_compiler
    if scheme.codes_only and scheme.calibrated:
        return part_statistics(checkpoint, plan, cache, part, graph_format).rounder
    plain = scheme.how.rounder(None, scheme.symmetric)
    return lambda slot, columns: plain


def part_statistics(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, graph_format: Any = "onnx17"
) -> CalibratedSlots:
    """What calibration knows of the slots of a part's template.

    Raises:
        SchemeError: there is no calibration, or it is not of this checkpoint.
    """
    calibration, component = part_calibration(checkpoint, plan, cache, part), part.folder
    assert calibration is not None
    binding = bind_part(part, make_template(checkpoint, plan, cache, part.kind, graph_format).slots, checkpoint)
    slots = {slot.slot: slot for slot in binding.slots}
    return CalibratedSlots(plan.scheme(part), component, checkpoint.tensors[component], calibration, slots)


@dataclass(slots=True)
class CalibratedSlots:
    """What calibration knows of the slots of a template, and rounders by it.

    Attributes:
        tensors: of the component; slots: how each slot is filled from them.
    """

    scheme: Scheme
    component: str
    tensors: Mapping[str, TensorRef]
    calibration: Calibration
    slots: Mapping[str, SlotBinding]
    _last: tuple[tuple[str, int, int], Rounder] | None = field(default=None, init=False)

    def rounder(self, slot: str, columns: tuple[int, int] | None) -> Rounder:
        """Of a slot, or of some of its channels. The last one is kept: codes are asked for, then scales."""
        key = self.channels(slot, columns)
        if self._last is None or self._last[0] != key:
            self._last = key, make_rounder(self.scheme, self.statistics(slot, columns))
        return self._last[1]

    def statistics(self, slot: str, columns: tuple[int, int] | None) -> Statistics:
        """Of the inputs of a slot, or of some of its channels."""
        name, start, stop = self.channels(slot, columns)
        return self.calibration.statistics(self.component, name, self.tensors[name].shape[1]).columns(start, stop)

    def channels(self, slot: str, columns: tuple[int, int] | None) -> tuple[str, int, int]:
        """The tensor of the checkpoint that a slot is cut from, and its first and last input channel."""
        bound = self.slots[slot]
        name = bound.sources[0]
        start, stop = 0, self.tensors[name].shape[1]
        for step in bound.transforms:
            if step.op == "slice" and step.dim == 1:
                start, stop = start + step.start, start + step.stop
        if columns is not None:
            start, stop = start + columns[0], start + columns[1]
        return name, start, stop
