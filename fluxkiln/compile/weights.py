"""Which rounder each slot of a part gets: the scheme's method, with the checkpoint's calibration where it takes one.

A mould does not depend on it: all methods write codes, scales and zero points of one format to the same places. For
methods that need more than codes see `fluxkiln.compile.corrections`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.compile.templates import Kiln, make_template
from fluxkiln.digests import digest_json
from fluxkiln.errors import SchemeError
from fluxkiln.export.bindings import bind_part
from fluxkiln.quantize.calibration import Calibration, open_calibration
from fluxkiln.quantize.rounding import Rounder, RounderOf, as_compiler, empty_packed, make_rounder
from fluxkiln.quantize.schemes import METHODS, Scheme
from fluxkiln.quantize.statistics import Statistics
from fluxkiln.types import Binding, Part, SlotBinding

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.quantize.activation import Corrected, CorrectorOf


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


def part_calibration(kiln: Kiln, part: Part) -> Calibration | None:
    """The calibration that a part's scheme asks for; None where it asks for none.

    Raises:
        SchemeError: there is none in the store.
    """
    scheme = kiln.scheme(part)
    if not _is_calibrated(scheme):
        return None
    component = part.folder
    found = find_calibration(kiln.cache, component, component_digest(kiln.checkpoint.digests, component))
    if found is None:
        raise SchemeError(
            f"{part.name} is to be stored as {scheme.name}, which needs calibration, and the store has none for the "
            f"{component} of {kiln.checkpoint.name}; run fluxkiln calibrate on this model first"
        )
    return found


def used_calibrations(kiln: Kiln) -> dict[str, str]:
    """Component -> digest of the calibration that its parts are rounded by; without what the store has not got."""
    found: dict[str, str] = {}
    for component in dict.fromkeys(part.folder for part in kiln.parts if _is_calibrated(kiln.scheme(part))):
        if component in kiln.checkpoint.digests:
            calibration = find_calibration(kiln.cache, component, component_digest(kiln.checkpoint.digests, component))
            found |= {component: calibration.digest} if calibration else {}
    return found


def _is_calibrated(scheme: Scheme) -> bool:
    return bool(scheme.weight_bits) and METHODS[scheme.method].calibrated


def check_methods(kiln: Kiln) -> None:
    """Raise SchemeError before anything is compiled, where a method cannot be had for lack of calibration."""
    for kind in kiln.kinds():
        part_calibration(kiln, next(part for part in kiln.parts if part.kind == kind))


def part_rounders(kiln: Kiln, part: Part, graph_format: Any = "onnx17") -> RounderOf:
    """Slot of a part's template -> its rounder; by a method that needs more than codes, that of what is in codes.

    Args:
        graph_format: of the template whose slots are asked for.

    Raises:
        SchemeError: the method needs a calibration, and there is none or not of this checkpoint.
    """
    scheme = kiln.scheme(part)
    if scheme.rounds_as_compiler:
        return as_compiler
    calibration = part_calibration(kiln, part) if scheme.codes_only else None
    if calibration is None:
        plain = make_rounder(scheme if scheme.codes_only else _rest_scheme(scheme))
        return lambda slot, columns: plain
    binding = bind_part(part, make_template(kiln, part.kind, graph_format).slots, kiln.checkpoint)
    return CalibratedSlots(kiln, part, calibration, binding)


def part_correctors(kiln: Kiln, part: Part, graph_format: Any = "onnx17") -> CorrectorOf | None:
    """Slot of a part's template -> what packs it by a method that needs more than codes; None for all others.

    Raises:
        SchemeError: there is no calibration, or it is not of this checkpoint.
    """
    from fluxkiln.compile.corrections import shared_divisors, stored_branches
    from fluxkiln.quantize.activation import pack_corrected, pack_scaled

    scheme = kiln.scheme(part)
    if scheme.codes_only:
        return None
    known = part_statistics(kiln, part, graph_format)
    divisors = shared_divisors(kiln, part) if scheme.method == "awq" else {}
    branches = stored_branches(kiln, part) if scheme.method == "svd" and graph_format == "onnx17" else {}

    def corrector_of(slot: str, columns: tuple[int, int] | None) -> Callable[[NDArray[Any]], Corrected]:
        shared = divisors.get(known.channels(slot, columns))
        branch = branches.get(slot) if columns is None else None
        if shared is not None:
            return lambda weight: pack_scaled(weight, scheme.group_size, shared, scheme.weight_bits)
        if branch is not None:
            return lambda weight: _pack_rest(weight, scheme, *branch)
        return lambda weight: pack_corrected(weight, scheme, known.statistics(slot, columns))

    return corrector_of


def _pack_rest(weight: NDArray[Any], scheme: Scheme, up: NDArray[Any], down: NDArray[Any]) -> Corrected:
    """What a branch leaves of a weight, as a cast packs it; the branch in bits of bfloat16."""
    import numpy as np

    from fluxkiln.quantize.activation import Corrected, packed_rows

    ones = np.ones(weight.shape[1], np.float32)
    rest = packed_rows(weight, ones, up, down)
    packed = empty_packed(rest.shape, scheme.group_size, scheme.weight_bits)
    pack_into = make_rounder(_rest_scheme(scheme))
    pack_into(rest, scheme.weight_bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
    return Corrected(packed, ones, up, down)


def _rest_scheme(scheme: Scheme) -> Scheme:
    """How a method that needs more than codes finds its codes."""
    return replace(scheme, method="ls", rank=0)


def part_statistics(kiln: Kiln, part: Part, graph_format: Any = "onnx17") -> CalibratedSlots:
    """What calibration knows of the slots of a part's template.

    Raises:
        SchemeError: there is no calibration, or it is not of this checkpoint.
    """
    calibration = part_calibration(kiln, part)
    assert calibration is not None
    binding = bind_part(part, make_template(kiln, part.kind, graph_format).slots, kiln.checkpoint)
    return CalibratedSlots(kiln, part, calibration, binding)


class CalibratedSlots:
    """Rounders with the statistics of their matrices. The last one is kept: codes are asked for, then scales."""

    def __init__(self, kiln: Kiln, part: Part, calibration: Calibration, binding: Binding) -> None:
        self.scheme = kiln.scheme(part)
        self.calibration = calibration
        self.component = part.folder
        self.tensors = kiln.checkpoint.tensors[self.component]
        self.slots: Mapping[str, SlotBinding] = {slot.slot: slot for slot in binding.slots}
        self._last: tuple[tuple[str, int, int], Rounder] | None = None

    def __call__(self, slot: str, columns: tuple[int, int] | None) -> Rounder:
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
