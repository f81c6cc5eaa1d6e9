"""What a part's slots are filled with: the checkpoint's weights, or by a method that needs more than codes, what that
makes of them: the rest that is packed, and what stands beside it.

What stands beside the codes is found once and kept in the store: its search takes seconds a matrix, and the cast, the
comparison with what was cast and the interpreter all ask for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.artifacts.actions import Action, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.templates import Kiln, make_template, weights_digest
from fluxkiln.compile.toolchains.tpu_mlir.side_tensors import beside_slots, in_codes, split_slot
from fluxkiln.compile.weights import CalibratedSlots, part_calibration, part_rounders, part_statistics
from fluxkiln.export.bindings import BoundWeights, WeightReader, bind_part, weight_reader
from fluxkiln.quantize.activation import find_divisors, pack_low_rank, packed_rows
from fluxkiln.quantize.statistics import Statistics
from fluxkiln.types import Part, Template

# rows of the weights of one input that its scales are chosen by
MOST_ROWS = 4096


@dataclass(frozen=True, slots=True)
class CorrectedWeights:
    """The weights of a part by slot, those in codes as they are packed.

    Attributes:
        plain: the checkpoint's.
        beside: slot of `fluxkiln.compile.toolchains.tpu_mlir.side_tensors` -> its array, bfloat16, in torch's layout.
    """

    plain: BoundWeights
    beside: Mapping[str, NDArray[Any]]

    def __call__(self, slot: str) -> NDArray[Any]:
        """The whole weight."""
        return self.beside[slot] if slot in self.beside else self._packed(slot, self.plain(slot), 0)

    def read_rows(self, slot: str, start: int, stop: int) -> NDArray[Any]:
        """Rows `start` to `stop` of the weight: the same numbers as in the whole."""
        if slot in self.beside:
            return self.beside[slot][start:stop]
        return self._packed(slot, self.plain.read_rows(slot, start, stop), start)

    def _packed(self, slot: str, rows: NDArray[Any], start: int) -> NDArray[Any]:
        down, up, reciprocals = (self.beside.get(name) for name in beside_slots(slot))
        if down is None and reciprocals is None:
            return rows
        columns = rows.shape[1]
        scaled = np.ones(columns, np.float32) if reciprocals is None else reciprocals.astype(np.float32)
        divisors: NDArray[np.float32] = np.reciprocal(scaled)
        if down is None or up is None:
            return packed_rows(rows, divisors, np.empty((len(rows), 0), np.uint16), np.empty((0, columns), np.uint16))
        return packed_rows(rows, divisors, up[start : start + len(rows)].view(np.uint16), down.view(np.uint16))


def part_weights(kiln: Kiln, part: Part, template: Template) -> WeightReader:
    """Slot of a part's compiled form -> what it is filled with, in torch's layout; it has a method `read_rows`.

    Args:
        template: of format `onnx17`, as it was traced.

    Raises:
        SchemeError: the method has no calibration, or a rank that a weight does not have.
    """
    plain = weight_reader(bind_part(part, template.slots, kiln.checkpoint), kiln.checkpoint)
    if kiln.scheme(part).codes_only:
        return plain
    return CorrectedWeights(plain, _stored_beside(kiln, part, template, plain))


def rounding_key(kiln: Kiln, part: Part) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings and inputs that a part's method adds to the key of its weights; nothing for the compiler's own."""
    scheme = kiln.scheme(part)
    if scheme.rounds_as_compiler:
        return {}, {}
    calibration = part_calibration(kiln, part)
    settings = {
        "method": scheme.method,
        "symmetric": scheme.symmetric,
        "rank": scheme.rank,
        "code": code_version(part_rounders, _stored_beside),
    }
    return settings, {} if calibration is None else {"calibration": calibration.digest}


def _stored_beside(kiln: Kiln, part: Part, template: Template, plain: BoundWeights) -> Mapping[str, NDArray[Any]]:
    """What stands beside the codes of a part's weights, from the store or found now."""
    settings, calibration = rounding_key(kiln, part)
    binding = bind_part(part, template.slots, kiln.checkpoint)
    action = Action(
        stage="correct",
        what=f"{part.name} {kiln.scheme(part).name}",
        code_version=str(settings["code"]),
        inputs={"weights": weights_digest(kiln, binding), "template": template.digest, **calibration},
        settings={"scheme": kiln.scheme(part).name},
    )

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        found: dict[str, Any] = {
            slot: array.view(np.uint16) for slot, array in _find_beside(kiln, part, template, plain)
        }
        with (folder / "beside.npz").open("wb") as file:
            np.savez(file, **found)
        return {"beside": folder / "beside.npz"}, {}

    blob = run_action(kiln.cache, action, produce).outputs["beside"]
    with np.load(kiln.path(blob)) as arrays:
        return {slot: arrays[slot].view(ml_dtypes.bfloat16) for slot in arrays.files}


def _find_beside(kiln: Kiln, part: Part, template: Template, plain: BoundWeights) -> Iterator[tuple[str, NDArray[Any]]]:
    scheme = kiln.scheme(part)
    group_size, bits = scheme.group_size, scheme.weight_bits
    known = part_statistics(kiln, part)
    inputs: dict[str, list[str]] = {}
    for one in weight_matmuls(template.path, {spec.name for spec in template.inputs}):
        if in_codes(one.slot, scheme):
            inputs.setdefault(one.source, []).append(one.slot)
    for slots in inputs.values():
        if scheme.method == "awq":
            sampled = np.concatenate([_some_rows(plain(slot), MOST_ROWS // len(slots)) for slot in slots])
            divisors = find_divisors(sampled, group_size, _mean([known.statistics(slot, None) for slot in slots]), bits)
            for slot in slots:
                yield beside_slots(slot)[2], np.reciprocal(divisors).astype(ml_dtypes.bfloat16)
            continue
        for slot in slots:
            found = pack_low_rank(plain(slot), group_size, known.statistics(slot, None), scheme.rank, bits)
            down, up, _ = beside_slots(slot)
            yield down, found.down
            yield up, found.up


def shared_divisors(kiln: Kiln, part: Part) -> dict[tuple[str, int, int], NDArray[Any]]:
    """Tensor of the checkpoint, its first and last input channel -> what these inputs are divided by, float32."""
    beside, known = _known_beside(kiln, part)
    return {
        known.channels(split_slot(slot)[0], None): np.reciprocal(beside[slot].astype(np.float32)) for slot in beside
    }


def stored_branches(kiln: Kiln, part: Part) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Slot of a part's compiled form -> its branch, up and down in bits of bfloat16.

    What is dequantized has the branch that was cast, not one that was searched again: that takes seconds a matrix.
    """
    beside, _ = _known_beside(kiln, part)
    found = {}
    for slot in dict.fromkeys(split_slot(name)[0] for name in beside):
        down, up, _ = beside_slots(slot)
        found[slot] = beside[up].view(np.uint16), beside[down].view(np.uint16)
    return found


def _known_beside(kiln: Kiln, part: Part) -> tuple[Mapping[str, NDArray[Any]], CalibratedSlots]:
    template = make_template(kiln, part.kind, "onnx17")
    binding = bind_part(part, template.slots, kiln.checkpoint)
    beside = _stored_beside(kiln, part, template, weight_reader(binding, kiln.checkpoint))
    return beside, part_statistics(kiln, part)


def _some_rows(weight: NDArray[Any], most: int) -> NDArray[Any]:
    """At most so many rows, from everywhere in the weight."""
    return weight[:: -(-len(weight) // max(most, 1))]


def _mean(known: Sequence[Statistics]) -> Statistics:
    """Of inputs that are one and the same, but may have been recorded one by one."""
    first, *others = known
    if all(one.peaks is first.peaks for one in others):
        return first
    blocks = tuple(np.mean(blocks, axis=0) for blocks in zip(*(one.blocks for one in known), strict=True))
    peaks: NDArray[np.float32] = np.mean([one.peaks for one in known], axis=0)
    return Statistics(blocks, peaks, first.count)
