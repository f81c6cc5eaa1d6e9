"""One part at one rung after the other, looked into: its values against those of the rung below."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.corrections import part_packers, part_weights
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.rungs import dequantized_rung
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.weights import part_rounders
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.types import GraphFormat, Part, Template, WeightReader
from fluxkiln.verify.debug.bisect import (
    Finding,
    Range,
    Tolerance,
    first_missed,
    judge_values,
    tolerance_of,
    value_range,
)
from fluxkiln.verify.debug.remedies import Remedy, find_remedy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.values import LoweredValue, Operation
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

Values = Mapping[str, "NDArray[Any]"]
# operations whose values are computed anew at once
PIECE = 16


@dataclass(frozen=True, slots=True)
class Inside:
    """A part that can be looked into.

    Attributes:
        template: the file of its graph, whose operations are `operations`.
        inputs: one recorded call, filled up where the kind takes rows.
        weights: the checkpoint's by slot, as the template takes them; stored: as the scheme stores them. What is read
            and not computed is read whenever it is needed: a block has a gigabyte of each.
    """

    part: Part
    template: Path
    operations: tuple[Operation, ...]
    inputs: Values
    weights: Values
    stored: Values

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(operation.output for operation in self.operations)

    def operation(self, value: str) -> Operation:
        return next(operation for operation in self.operations if operation.output == value)


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first operation that leaves its tolerance.

    Attributes:
        operation: its type in the template; lowered: what it became in the compiled form, '' elsewhere.
        inputs: value -> its range at this rung.
        output: the range of what it makes.
    """

    rung: str
    finding: Finding
    operation: str
    lowered: str
    slots: tuple[str, ...]
    inputs: Mapping[str, Range]
    output: Range
    remedy: Remedy


@dataclass(frozen=True, slots=True)
class RungFindings:
    """What was found at one rung, compared with the rung `against`; `culprit` is None where nothing is out."""

    rung: str
    against: str
    findings: tuple[Finding, ...]
    culprit: Culprit | None = None

    @property
    def noisiest(self) -> Finding | None:
        """The value with the largest error of its own."""
        return max(self.findings, key=lambda finding: finding.own, default=None)


def look_inside(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, inputs: Values, graph_format: GraphFormat
) -> Inside:
    """The part's template with its weights, the checkpoint's and the stored ones.

    Args:
        graph_format: `onnx17` for what TPU-MLIR compiles, `onnx23` for the graphs of a cpu bundle.
    """
    from fluxkiln.compile.onnx.values import SlotWeights, list_operations

    template = make_template(checkpoint, plan, cache, part.kind, graph_format)
    slots = [spec.name for spec in template.slots]
    reader = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
    read_stored = _stored_17 if graph_format == "onnx17" else _stored_23
    stored: Values = SlotWeights(slots, read_stored(checkpoint, plan, cache, part, template, reader))
    if plan.scheme(part).weight_bits:  # rounding takes longer than reading
        stored = dict(stored)
    weights = SlotWeights(slots, reader)
    return Inside(part, template.path, list_operations(template.path, slots), inputs, weights, stored)


def _stored_17(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template, reader: WeightReader
) -> WeightReader:
    """Every weight as the compiled form holds it."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    rung = dequantized_rung(checkpoint, plan, cache)
    assert isinstance(rung, TemplateRunner)
    return rung.fill(part.name).read_weight


def _stored_23(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template, reader: WeightReader
) -> WeightReader:
    """Weights in codes as a linked graph holds them, product by product; all others as the checkpoint has them."""
    import numpy as np

    from fluxkiln.compile.onnx.values import quantized_regions
    from fluxkiln.quantize.stored import stored_weight

    scheme = plan.scheme(part)
    if not scheme.weight_bits:
        return reader
    regions = quantized_regions(template.path, [spec.name for spec in template.slots])
    packer_of = part_packers(checkpoint, plan, cache, part, "onnx23")
    rounder_of = None if packer_of is not None else part_rounders(checkpoint, plan, cache, part, "onnx23")

    def stored(slot: str) -> NDArray[Any]:
        weight = np.array(reader(slot), np.float32)
        if scheme.keeps(slot):
            return weight
        for region in regions.get(slot, ()):
            start, stop, _ = region[1].indices(weight.shape[1])
            if packer_of is not None:
                weight[region] = packer_of(slot, (start, stop))(weight[region]).dequantize(scheme.group_size)
            elif rounder_of is not None:
                weight[region] = stored_weight(weight[region], scheme, True, rounder_of(slot, (start, stop)))
        return weight

    return stored


def check_template(inside: Inside, checkpoint: Checkpoint) -> RungFindings:
    """The template with the checkpoint's weights against diffusers' own modules, one by one in the order they run.

    A module's output is looked for among the template's values: patches may cut it in pieces, which are not judged.
    """
    from fluxkiln.compile.onnx.values import template_values
    from fluxkiln.export.leaves import see_leaves
    from fluxkiln.verify.debug.match import match_leaves

    leaves = see_leaves(inside.part, checkpoint, inside.inputs)
    seen = template_values(inside.template, inside.inputs, inside.weights, inside.order)
    matched = match_leaves(leaves, inside.operations, seen, tolerance_of("onnxruntime", "*"))
    made = RungFindings("onnxruntime", "reference", tuple(matched))
    # a module is several operations: its operands are what the modules before it made
    judged = {finding.value: seen[finding.value] for finding in matched}
    return _with_culprit(made, inside, {**inside.inputs, **judged}, {}, "*")


def check_stored(inside: Inside, scheme: str) -> RungFindings:
    """The template with the weights as the scheme stores them, against the checkpoint's."""
    from fluxkiln.compile.onnx.values import template_values

    below = template_values(inside.template, inside.inputs, inside.weights, inside.order)
    seen = template_values(inside.template, inside.inputs, inside.stored, inside.order)
    findings = _judge_pieces(inside, seen, below, inside.weights, tolerance_of("dequantized", scheme))
    made = RungFindings("dequantized", "onnxruntime", findings)
    return _with_culprit(made, inside, {**inside.inputs, **seen}, {}, scheme)


def check_lowered(inside: Inside, lowered: Path, simulator: Simulator, scheme: str) -> RungFindings:
    """The compiler's lowered graph, its weights beside it, against the template with the stored weights."""
    from fluxkiln.compile.onnx.values import lowered_run, lowered_values, template_values

    below = template_values(inside.template, inside.inputs, inside.stored, inside.order)
    found = lowered_values(lowered.read_text(), inside.order)
    look = partial(simulator.look, lowered, inside.inputs)
    seen = lowered_run(look, found, {name: array.shape for name, array in below.items()})
    findings = _judge_pieces(inside, seen, below, inside.stored, tolerance_of("interpreter", scheme))
    made = RungFindings("interpreter", "dequantized", _with_epsilons(findings, inside, found))
    return _with_culprit(made, inside, {**inside.inputs, **seen}, found, scheme)


def check_linked(inside: Inside, graph: Path, scheme: str) -> RungFindings:
    """A graph of a cpu bundle, as ONNX Runtime runs it, against the template with the stored weights."""
    from fluxkiln.compile.onnx.values import graph_values, template_values

    below = template_values(inside.template, inside.inputs, inside.stored, inside.order)
    seen = graph_values(graph, inside.inputs, list(below))
    findings = _judge_pieces(inside, seen, below, inside.stored, tolerance_of("executed", scheme))
    made = RungFindings("executed", "dequantized" if "W" in scheme else "onnxruntime", findings)
    return _with_culprit(made, inside, {**inside.inputs, **seen}, {}, scheme)


def check_binary(
    inside: Inside, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, file: Path, net: str
) -> RungFindings:
    """The weights in a file of the bundle, read back, against what casting makes of the checkpoint's.

    Args:
        kiln: at the shapes of the bundle. binary: the cast part, for its map. net: the part's in `file`.
    """
    from fluxkiln.compile.toolchains.tpu_mlir.cast import compare_stored
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
    from fluxkiln.quantize.side_tensors import split_slot

    reader = part_weights(
        checkpoint, plan, cache, binary.part, make_template(checkpoint, plan, cache, binary.part.kind, "onnx17")
    )
    coefficients = CoefficientMap.from_json(json.loads(cache.path(binary.blobs["map"]).read_text()))
    differing: dict[str, float] = {}
    for stored, wrong_bytes in compare_stored(
        file, net, coefficients, reader, part_rounders(checkpoint, plan, cache, binary.part)
    ).items():
        # what stands beside a weight's codes is the business of the same product
        slot = split_slot(stored)[0]
        differing[slot] = max(differing.get(slot, 0.0), float(wrong_bytes.max()))
    findings = []
    for operation in inside.operations:
        shares = [differing[slot] for slot in operation.slots if slot in differing]
        if shares:
            share = max(shares)
            findings.append(Finding(operation.output, share, share, share, "own" if share else ""))
    made = RungFindings("stored", "dequantized", tuple(findings))
    first = first_missed(findings)
    if first is None:
        return made
    operation = inside.operation(first.value)
    wrong = tuple(slot for slot in operation.slots if differing.get(slot))
    remedy = Remedy(
        f"{', '.join(wrong)} in {file.name}: a share of {first.own:.2g} of the bytes is not what this checkpoint and "
        "scheme make",
        "check the bundle (`fluxkiln verify`), then build it again",
    )
    nothing = Range(0.0, 0.0, 0.0, 0.0, ())
    return replace(made, culprit=Culprit("stored", first, operation.op_type, "", wrong, {}, nothing, remedy))


def _judge_pieces(
    inside: Inside, seen: Values, below: Values, weights: Values, tolerance: Tolerance
) -> tuple[Finding, ...]:
    """Findings of all values, what their operations should make of their operands computed for a few at a time."""
    from fluxkiln.compile.onnx.values import local_values

    known: list[Finding] = []
    given = {**inside.inputs, **seen}
    for start in range(0, len(inside.order), PIECE):
        names = inside.order[start : start + PIECE]
        local = local_values(inside.template, given, weights, names)
        known += judge_values(names, seen, below, local, tolerance)
    return tuple(known)


def _with_epsilons(
    findings: tuple[Finding, ...], inside: Inside, found: Mapping[str, LoweredValue]
) -> tuple[Finding, ...]:
    """A norm with another epsilon is out of its tolerance, also where these inputs do not show it."""
    made = []
    for finding in findings:
        wanted, has = inside.operation(finding.value).epsilon, found[finding.value].epsilon
        differs = wanted is not None and has is not None and abs(has - wanted) > 1e-3 * wanted
        made.append(replace(finding, missed=finding.missed or "epsilon") if differs else finding)
    return tuple(made)


def _with_culprit(
    made: RungFindings, inside: Inside, seen: Values, found: Mapping[str, LoweredValue], scheme: str
) -> RungFindings:
    first = first_missed(made.findings)
    if first is None:
        return made
    operation = inside.operation(first.value)
    lowered = found.get(first.value)
    sources = _seen_sources(operation, inside, seen)
    culprit = Culprit(
        made.rung, first, operation.op_type, lowered.operation if lowered else "",
        _slots_between(operation, inside, seen),
        {name: value_range(seen[name]) for name in sources}, value_range(seen[first.value]),
        find_remedy(made.rung, first, operation, inside.operations, lowered, scheme),
    )  # fmt: skip
    return replace(made, culprit=culprit)


def _seen_sources(operation: Operation, inside: Inside, seen: Values) -> tuple[str, ...]:
    """The nearest values that were seen and lead to the operation: those between were fused away."""
    found: dict[str, None] = {}
    pending = list(reversed(operation.inputs))
    makers = {one.output: one for one in inside.operations}
    while pending:
        name = pending.pop()
        if name in seen:
            found[name] = None
        elif name in makers:
            pending += reversed(makers[name].inputs)
    return tuple(found)


def _slots_between(operation: Operation, inside: Inside, seen: Values) -> tuple[str, ...]:
    """The weights of the operation and of those fused into it."""
    found: dict[str, None] = dict.fromkeys(operation.slots)
    makers = {one.output: one for one in inside.operations}
    pending = [name for name in operation.inputs if name not in seen]
    while pending:
        maker = makers.get(pending.pop())
        if maker is not None:
            found |= dict.fromkeys(maker.slots)
            pending += [name for name in maker.inputs if name not in seen]
    return tuple(found)
