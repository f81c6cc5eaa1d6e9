"""What a part's slots are filled with, and what packs them: the scheme's method, calibrated where it takes that.

A mould does not depend on the method: all write codes, scales and zero points of one format to the same places. What a
method needs beside the codes is found once and kept in the store: its search takes seconds a matrix, and the cast, the
comparison with what was cast and the interpreter all ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.onnx.gated import gated_slots
from fluxkiln.compile.onnx.scores import find_scores
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template, weights_digest
from fluxkiln.digests import digest_json
from fluxkiln.errors import SchemeError
from fluxkiln.export.bindings import BoundWeights, bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.calibration import Calibration, Statistics, open_calibration
from fluxkiln.quantize.integer import THRESHOLD
from fluxkiln.quantize.methods import Source, find_method
from fluxkiln.quantize.pack import Rounder, RounderOf
from fluxkiln.quantize.rounders import as_compiler, make_rounder, pack_sided, plain_packer
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import GAINS, PackerOf, SidedWeight, SideTensors, side_slot, split_slot
from fluxkiln.quantize.smoothing import check_limit, find_gains
from fluxkiln.types import Part, SlotBinding, Template, TensorRef, WeightReader

# rows of the weights of one input that what stands beside their codes may be chosen by
MOST_ROWS = 4096


def calibration_action(component: str, digest: str) -> Action:
    """The key under which the store keeps the calibration that builds of these weights use: the last one made."""
    return Action("calibration", f"calibration of {component}", "1", {component: digest})


def component_digest(digests: Mapping[str, Mapping[str, str]], component: str) -> str:
    """A digest over all tensors of a component."""
    return digest_json(dict(digests[component]))


def find_calibration(checkpoint: Checkpoint, cache: ActionCache, component: str) -> Calibration | None:
    """The calibration of a component's weights, if the store has one.

    Raises:
        SchemeError: it was made with other weights. IntegrityError: it is damaged.
    """
    digest = component_digest(checkpoint.digests, component)
    found = cache.lookup(calibration_action(component, digest).key)
    if found is None:
        return None
    blob = found.outputs["calibration"]
    calibration = open_calibration(cache.store.path(blob.digest), blob.digest)
    calibration.check_checkpoint(component, digest)
    return calibration


def part_calibration(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part) -> Calibration | None:
    """The calibration that a part's scheme asks for, if any; SchemeError when the store has none."""
    scheme = plan.scheme(part)
    if not scheme.calibrated:
        return None
    found = find_calibration(checkpoint, cache, part.folder)
    if found is None:
        raise SchemeError(
            f"{part.name} is to be stored as {scheme.name}, which needs calibration, and the store has none for the "
            f"{part.folder} of {checkpoint.name}; run fluxkiln calibrate on this model first"
        )
    return found


def used_calibrations(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> dict[str, str]:
    """Component -> digest of the calibration that its parts are rounded by; without what the store has not got."""
    found: dict[str, str] = {}
    for component in dict.fromkeys(part.folder for part in plan.parts if plan.scheme(part).calibrated):
        if component in checkpoint.digests:
            calibration = find_calibration(checkpoint, cache, component)
            found |= {component: calibration.digest} if calibration else {}
    return found


def check_methods(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
    """Raise SchemeError before anything is compiled, where a method cannot be had for lack of calibration."""
    for part in {(part.kind, plan.scheme(part)): part for part in reversed(plan.parts)}.values():
        part_calibration(checkpoint, plan, cache, part)


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
    """What calibration knows of the slots of a part's template; errors as `part_rounders`."""
    calibration, component = part_calibration(checkpoint, plan, cache, part), part.folder
    assert calibration is not None
    binding = bind_part(
        part, make_template(checkpoint, plan.of(part), cache, part.kind, graph_format).slots, checkpoint
    )
    slots = {slot.slot: slot for slot in binding.slots}
    return CalibratedSlots(plan.scheme(part), component, checkpoint.tensors[component], calibration, slots)


@dataclass(slots=True)
class CalibratedSlots:
    """What calibration knows of the slots of a template, filled from a component's tensors, and rounders by it."""

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

    def check_products(self, slot: str) -> None:
        """Raise SchemeError where the products of a slot's weight do not fit an integer scheme's 16 bits."""
        name = self.channels(slot, None)[0]
        if (largest := float(self.calibration.outputs(self.component, name).max())) > THRESHOLD:
            raise SchemeError(
                f"products of {name} reach {largest:.4g} in the calibration, {self.scheme.name} holds {THRESHOLD:g}; "
                f"leave it out of the codes ({self.scheme.base_name},KIND.WEIGHT={self.scheme.arithmetic})"
            )

    def gains(self, slots: Iterable[str]) -> NDArray[Any]:
        """Of the products of these slots, which are added up: [O]."""
        names = dict.fromkeys(self.channels(slot, None)[0] for slot in slots)
        return find_gains(np.max([self.calibration.outputs(self.component, name) for name in names], axis=0))

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


@dataclass(frozen=True, slots=True)
class SidedWeights:
    """The weights of a part by slot, those in codes as they are packed: the checkpoint's, `plain`, without what is
    `beside`: slot of `quantize.side_tensors` -> its array, bfloat16, in torch's layout."""

    plain: BoundWeights
    beside: Mapping[str, NDArray[Any]]

    def __call__(self, slot: str) -> NDArray[Any]:
        """The whole weight."""
        return self.beside[slot] if slot in self.beside else self._rest(slot, self.plain(slot), 0)

    def read_rows(self, slot: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the weight: the same numbers as in the whole."""
        if slot in self.beside:
            return self.beside[slot][start:stop]
        return self._rest(slot, self.plain.read_rows(slot, start, stop), start)

    def _rest(self, slot: str, rows: NDArray[Any], start: int) -> NDArray[Any]:
        found = SideTensors.of_slot(self.beside, slot)
        return found.rest(rows, start) if found else rows


def part_weights(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template
) -> WeightReader:
    """Slot of a part's compiled form -> what it is filled with, in torch's layout; it has a method `read_rows`.

    Args:
        template: of format `onnx17`, as it was traced.

    Raises:
        SchemeError: the method has no calibration, or a rank that a weight does not have.
    """
    plain = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
    if plan.scheme(part).codes_only:
        return plain
    return SidedWeights(plain, _stored_beside(checkpoint, plan, cache, part, template))


def part_packers(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, graph_format: Any = "onnx17"
) -> PackerOf:
    """Slot of a part's template -> what packs it.

    What stands beside the codes is what was cast, not what is searched again. Errors as `part_rounders`.
    """
    scheme = plan.scheme(part)
    if scheme.codes_only:
        return plain_packer(scheme, part_rounders(checkpoint, plan, cache, part, graph_format))
    known = part_statistics(checkpoint, plan, cache, part, graph_format)
    beside: dict[Any, SideTensors] = {}
    if scheme.how.of_input or graph_format == "onnx17":
        arrays = _stored_beside(
            checkpoint, plan, cache, part, make_template(checkpoint, plan.of(part), cache, part.kind, "onnx17")
        )
        slots = dict.fromkeys(split_slot(name)[0] for name in arrays)
        beside = {slot: found for slot in slots if (found := SideTensors.of_slot(arrays, slot)) is not None}
    if scheme.how.of_input:
        compiled = known if graph_format == "onnx17" else part_statistics(checkpoint, plan, cache, part)
        beside = {compiled.channels(slot, None): found for slot, found in beside.items()}

    def packer_of(slot: str, columns: tuple[int, int] | None) -> Callable[[NDArray[Any]], SidedWeight]:
        found = beside.get(known.channels(slot, columns) if scheme.how.of_input else slot if columns is None else None)
        statistics = known.statistics(slot, columns) if found is None else None
        return partial(pack_sided, scheme=scheme, statistics=statistics, beside=found)

    return packer_of


def rounding_key(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part
) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and inputs that a part's method adds to the key of its weights; nothing for the compiler's own."""
    scheme = plan.scheme(part)
    if scheme.rounds_as_compiler:
        return {}, {}
    calibration = part_calibration(checkpoint, plan, cache, part)
    settings = {
        "method": scheme.method,
        "symmetric": scheme.symmetric,
        "rank": scheme.rank,
        "code": code_version(part_rounders, _stored_beside, find_method),
    }
    return settings, {} if calibration is None else {"calibration": calibration.digest}


def _stored_beside(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template
) -> Mapping[str, NDArray[Any]]:
    """What stands beside the codes of a part's weights, from the store or found now."""
    settings, calibration = rounding_key(checkpoint, plan, cache, part)
    binding = bind_part(part, template.slots, checkpoint)
    action = Action(
        stage="correct",
        what=f"{part.name} {plan.scheme(part).name}",
        code_version=str(settings["code"]),
        inputs={"weights": weights_digest(checkpoint, binding), "template": template.digest, **calibration},
        settings={"scheme": plan.scheme(part).name},
    )

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        scheme, plain = plan.scheme(part), weight_reader(binding, checkpoint)
        known = part_statistics(checkpoint, plan, cache, part)
        found: dict[str, Any] = {}
        activations = {spec.name for spec in template.inputs}
        for gated, biases in gated_slots(template.path, activations, scheme) if scheme.integer else ():
            gains = known.gains(gated).astype(ml_dtypes.bfloat16)
            found |= {side_slot(slot, GAINS): gains.view(np.uint16) for slot in gated}
            found |= {bias: (plain(bias) / gains).astype(ml_dtypes.bfloat16).view(np.uint16) for bias in biases}
        for scores in find_scores(template.path, activations) if scheme.limit else ():
            check_limit({slot: plain(slot) for slot in scores.norms}, scheme.limit)
        inputs: dict[str, list[str]] = {}
        for one in weight_matmuls(template.path, activations):
            if scheme.in_codes(one.slot):
                inputs.setdefault(one.source, []).append(one.slot)
            if scheme.in_codes(one.slot) and scheme.integer and side_slot(one.slot, GAINS) not in found:
                known.check_products(one.slot)
        for slots in inputs.values():
            sources = [Source(partial(plain, slot), known.statistics(slot, None)) for slot in slots]
            for slot, beside in zip(slots, scheme.find_beside(sources, MOST_ROWS), strict=True):
                found |= {name: array.view(np.uint16) for name, array in beside.arrays(slot).items()}
        with (folder / "beside.npz").open("wb") as file:
            np.savez(file, **found)
        return {"beside": folder / "beside.npz"}, {}

    blob = run_action(cache, action, produce).outputs["beside"]
    with np.load(cache.path(blob)) as arrays:
        return {slot: arrays[slot].view(ml_dtypes.bfloat16) for slot in arrays.files}
