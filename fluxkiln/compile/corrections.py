"""What a part's slots are filled with: the checkpoint's weights, or by a method that needs more than codes, what that
makes of them: the rest that is packed, and what stands beside it.

What stands beside the codes is found once and kept in the store: its search takes seconds a matrix, and the cast, the
comparison with what was cast and the interpreter all ask for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template, weights_digest
from fluxkiln.compile.weights import CalibratedSlots, part_calibration, part_rounders, part_statistics
from fluxkiln.export.bindings import BoundWeights, bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.methods import Source, find_method
from fluxkiln.quantize.rounders import pack_sided
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import PackerOf, SidedWeight, SideTensors, split_slot
from fluxkiln.types import Part, Template, WeightReader

# rows of the weights of one input that what stands beside their codes may be chosen by
MOST_ROWS = 4096


@dataclass(frozen=True, slots=True)
class SidedWeights:
    """The weights of a part by slot, those in codes as they are packed.

    Attributes:
        plain: the checkpoint's.
        beside: slot of `quantize.side_tensors` -> its array, bfloat16, in torch's layout.
    """

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
    return SidedWeights(plain, _stored_beside(checkpoint, plan, cache, part, template, plain))


def part_packers(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, graph_format: Any = "onnx17"
) -> PackerOf | None:
    """Slot of a part's template -> what packs it by a method that needs more than codes; None for all others.

    What is dequantized has what was cast beside its codes, not what is searched again: that takes seconds a matrix.

    Raises:
        SchemeError: there is no calibration, or it is not of this checkpoint.
    """
    scheme = plan.scheme(part)
    if scheme.codes_only:
        return None
    known = part_statistics(checkpoint, plan, cache, part, graph_format)
    if scheme.how.of_input:
        compiled = known if graph_format == "onnx17" else part_statistics(checkpoint, plan, cache, part)
        shared = {
            compiled.channels(slot, None): found for slot, found in _known_beside(checkpoint, plan, cache, part).items()
        }
        return _packers(scheme, known, lambda slot, columns: shared.get(known.channels(slot, columns)))
    whole = _known_beside(checkpoint, plan, cache, part) if graph_format == "onnx17" else {}
    return _packers(scheme, known, lambda slot, columns: whole.get(slot) if columns is None else None)


def _packers(
    scheme: Scheme,
    known: CalibratedSlots,
    beside_of: Callable[[str, tuple[int, int] | None], SideTensors | None],
) -> PackerOf:
    """Packers by what `beside_of` knows of a slot, and by a search where it knows nothing."""

    def packer_of(slot: str, columns: tuple[int, int] | None) -> Callable[[NDArray[Any]], SidedWeight]:
        beside = beside_of(slot, columns)
        statistics = known.statistics(slot, columns) if beside is None else None
        return partial(pack_sided, scheme=scheme, statistics=statistics, beside=beside)

    return packer_of


def _known_beside(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part) -> dict[str, SideTensors]:
    """Slot of a part's compiled form -> what stands beside its codes."""
    template = make_template(checkpoint, plan, cache, part.kind, "onnx17")
    binding = bind_part(part, template.slots, checkpoint)
    arrays = _stored_beside(checkpoint, plan, cache, part, template, weight_reader(binding, checkpoint))
    found = {slot: SideTensors.of_slot(arrays, slot) for slot in dict.fromkeys(split_slot(name)[0] for name in arrays)}
    return {slot: beside for slot, beside in found.items() if beside is not None}


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
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template, plain: BoundWeights
) -> Mapping[str, NDArray[Any]]:
    """What stands beside the codes of a part's weights, from the store or found now."""
    settings, calibration = rounding_key(checkpoint, plan, cache, part)
    binding = bind_part(part, template.slots, checkpoint)
    action = Action(
        stage="correct",
        what=f"{part.name} {plan.scheme(part).name}",
        code_version=str(settings["code"]),
        inputs={
            "weights": weights_digest(checkpoint, binding),
            "template": template.digest,
            **calibration,
        },
        settings={"scheme": plan.scheme(part).name},
    )

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        known = part_statistics(checkpoint, plan, cache, part)
        found: dict[str, Any] = {
            slot: array.view(np.uint16) for slot, array in _find_beside(plan.scheme(part), template, plain, known)
        }
        with (folder / "beside.npz").open("wb") as file:
            np.savez(file, **found)
        return {"beside": folder / "beside.npz"}, {}

    blob = run_action(cache, action, produce).outputs["beside"]
    with np.load(cache.path(blob)) as arrays:
        return {slot: arrays[slot].view(ml_dtypes.bfloat16) for slot in arrays.files}


def _find_beside(
    scheme: Scheme, template: Template, plain: BoundWeights, known: CalibratedSlots
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Slot beside a weight's -> its array, input by input."""
    inputs: dict[str, list[str]] = {}
    for one in weight_matmuls(template.path, {spec.name for spec in template.inputs}):
        if scheme.in_codes(one.slot):
            inputs.setdefault(one.source, []).append(one.slot)
    for slots in inputs.values():
        sources = [Source(partial(plain, slot), known.statistics(slot, None)) for slot in slots]
        for slot, beside in zip(slots, scheme.find_beside(sources, MOST_ROWS), strict=True):
            yield from beside.arrays(slot).items()
