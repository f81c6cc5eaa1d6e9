"""The rungs that every parity ladder has: what runs a part at each, and a part's values there against the rung below.

Every runner takes the parts of the plan it was made for, at that plan's shapes, and holds one part's weights. A
toolchain's `look` opens a part, has `look_below` judge the template and the stored weights, and adds its own forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchain import Rungs, toolchain_of
from fluxkiln.compile.weights import part_packers
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.quantize.rounders import stored_weight
from fluxkiln.types import Part, PartRunner, Template, find_part
from fluxkiln.verify.findings import (
    COMMON_ADVICE,
    Advice,
    Finding,
    Operation,
    Remedy,
    RungFindings,
    Tolerance,
    Values,
    epsilons_differ,
    find_remedy,
)  # fmt: skip
from fluxkiln.verify.judgement import DEQUANTIZED, REORDERED, judge_values, tolerance_of, with_culprit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.runner import Filling, Rewrite

# of the progress
STAGE = "look"
# operations whose values are computed anew at once
PIECE = 16


def stored_rung(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> Rungs:
    """The rung `dequantized` of parts at the shapes of the build, in little memory; none where it says nothing new."""
    from fluxkiln.compile.onnx.runner import attention_by_heads

    if not _stores_otherwise(plan):
        return {}
    return {"dequantized": dequantized_rung(checkpoint, plan, cache, 0, attention_by_heads)}


def _stores_otherwise(plan: Plan) -> bool:
    """Whether weights as the target stores them are others than the checkpoint's."""
    if not toolchain_of(plan.target).converts:
        return plan.quantized
    return any(plan.scheme(part).arithmetic != "F32" for part in plan.parts)


def rungs_below(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1) -> Rungs:
    """The rungs that need nothing but the checkpoint, on `threads` of ONNX Runtime; PyTorch takes all cores."""
    from fluxkiln.export.eager import PatchedRunner

    rungs: Rungs = {
        "patched": PatchedRunner(checkpoint, plan.parts),
        "onnxruntime": onnxruntime_rung(checkpoint, plan, cache, threads),
    }
    if _stores_otherwise(plan):
        rungs["dequantized"] = dequantized_rung(checkpoint, plan, cache, threads)
    return rungs


def stored_weights(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, keep: int) -> tuple[str, PartRunner]:
    """The rung that computes with the weights as the target stores them, and its name; for many images.

    `keep` is how many parts' weights stay in memory.
    """
    if _stores_otherwise(plan):
        return "dequantized", dequantized_rung(checkpoint, plan, cache, 0, keep=keep)
    return "onnxruntime", onnxruntime_rung(checkpoint, plan, cache, 0, keep)


def onnxruntime_rung(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1, keep: int = 1
) -> PartRunner:
    """The templates of opset 23 on ONNX Runtime, fed with the checkpoint's weights."""
    from fluxkiln.compile.onnx.runner import Filling, TemplateRunner

    def fill(name: str) -> Filling:
        part = find_part(plan.parts, name)
        template = make_template(checkpoint, plan.of(part), cache, part.kind, "onnx23")
        return Filling(template, weight_reader(bind_part(part, template.slots, checkpoint), checkpoint))

    return TemplateRunner(fill, threads=threads, keep=keep)


def dequantized_rung(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1, rewrite: Rewrite | None = None,
    keep: int = 1,
) -> PartRunner:  # fmt: skip
    """The templates of opset 17 fed with the weights as the scheme stores them, float32 arithmetic."""
    from fluxkiln.compile.integers import fill_integers
    from fluxkiln.compile.onnx.filled import weight_matmuls
    from fluxkiln.compile.onnx.runner import Filling, TemplateRunner

    def fill(name: str) -> Filling:
        part = find_part(plan.parts, name)
        template, scheme = make_template(checkpoint, plan.of(part), cache, part.kind, "onnx17"), plan.scheme(part)
        if scheme.integer:
            return fill_integers(checkpoint, plan, cache, part, template)
        matmuls = weight_matmuls(template.path, {spec.name for spec in template.inputs})
        coded = {one.slot for one in matmuls if scheme.in_codes(one.slot)}
        reader = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
        packer_of = part_packers(checkpoint, plan, cache, part)

        def stored(slot: str) -> NDArray[Any]:
            if slot in coded:
                return packer_of(slot, None)(reader(slot)).dequantize(scheme.group_size)
            return stored_weight(reader(slot), scheme)

        return Filling(template, stored)

    return TemplateRunner(fill, rewrite=rewrite, threads=threads, keep=keep)


@dataclass(frozen=True, slots=True)
class OpenPart:
    """A part whose values can be looked at.

    Attributes:
        template: the file of its graph, whose operations are `operations`.
        inputs: of one recorded call.
        weights: the checkpoint's by slot, as the template takes them; stored: as the scheme stores them. What is read
            and not computed is read whenever it is needed: a block has a gigabyte of each.
        form: the graph that takes the stored weights, with values of the template's names, where it is another one.
        scheme: without its group size. advice: what the toolchain can do.
    """

    part: Part
    template: Path
    operations: tuple[Operation, ...]
    inputs: Values
    weights: Values
    stored: Values
    scheme: str
    advice: Advice = COMMON_ADVICE
    form: Path | None = None

    @property
    def order(self) -> tuple[str, ...]:
        return tuple(operation.output for operation in self.operations)


def open_part(
    checkpoint: Checkpoint, plan: Plan, part: Part, template: Template, inputs: Values, stored: Filling | None
) -> OpenPart:
    """The part's template with its weights, the checkpoint's and the stored ones; None: these are the same."""
    from fluxkiln.compile.onnx.values import SlotWeights, list_operations

    slots = [spec.name for spec in template.slots]
    weights = SlotWeights(slots, weight_reader(bind_part(part, template.slots, checkpoint), checkpoint))
    held: Values = weights
    if stored is not None:
        held = SlotWeights([spec.name for spec in stored.template.slots], stored.read_weight)
    if stored is not None and plan.scheme(part).weight_bits:  # rounding takes longer than reading
        held = dict(held)
    operations = list_operations(template.path, slots)
    form = template.path if stored is None else stored.template.path
    return OpenPart(part, template.path, operations, inputs, weights, held, plan.scheme(part).base_name, form=form)


def look_below(opened: OpenPart, checkpoint: Checkpoint, progress: Progress) -> list[RungFindings]:
    """The rung `onnxruntime`, and `dequantized` where other weights are stored than the checkpoint's."""
    rungs = [compare_template(opened, checkpoint)]
    progress.done(STAGE, "onnxruntime", f"{len(opened.operations)} operations")
    if opened.stored is not opened.weights:
        rungs.append(check_stored(opened))
        tell_rung(rungs[-1], progress)
    return rungs


def tell_rung(found: RungFindings, progress: Progress) -> None:
    """One rung is done."""
    progress.done(STAGE, found.rung, f"{len(found.findings)} values")


def compare_template(opened: OpenPart, checkpoint: Checkpoint) -> RungFindings:
    """The template with the checkpoint's weights against upstream's own modules, one by one in the order they run.

    A module's output is looked for among the template's values: patches may cut it in pieces, which are not judged.
    """
    from fluxkiln.compile.onnx.values import template_values
    from fluxkiln.export.eager import see_leaves
    from fluxkiln.verify.judgement import match_leaves

    leaves = see_leaves(opened.part, checkpoint, opened.inputs)
    seen = template_values(opened.template, opened.inputs, opened.weights, opened.order)
    matched = match_leaves(leaves, opened.operations, [seen], REORDERED)
    # a module is several operations: its operands are what the modules before it made
    judged = {finding.value: seen[finding.value] for finding in matched}
    return _with_culprit(RungFindings("onnxruntime", "reference", tuple(matched)), opened, judged, {})


def check_stored(opened: OpenPart) -> RungFindings:
    """The template with the weights as the scheme stores them, against the checkpoint's."""
    from fluxkiln.compile.onnx.values import template_values

    below = template_values(opened.template, opened.inputs, opened.weights, opened.order)
    seen = template_values(opened.form or opened.template, opened.inputs, opened.stored, opened.order)
    of_template = {name: value for name, value in seen.items() if name in below}
    findings = _judge(opened, of_template, below, False, tolerance_of(DEQUANTIZED, opened.scheme))
    return _with_culprit(RungFindings("dequantized", "onnxruntime", tuple(findings)), opened, seen, {})


def check_form(
    opened: OpenPart, rung: str, tolerance: Tolerance, run: Callable[[Values], Values], forms: Mapping[str, Operation]
) -> RungFindings:
    """A compiled form against the template with the stored weights; `forms`: value -> what its operation became.

    Args:
        run: those values of the compiled form, by the template's names, that have the shapes of what it is given.
    """
    from fluxkiln.compile.onnx.values import template_values

    below = template_values(opened.form or opened.template, opened.inputs, opened.stored, opened.order)
    seen = run(below)
    findings = _judge(opened, seen, below, True, tolerance)
    epsilons = {one.output: one.epsilon for one in opened.operations}
    for place, finding in enumerate(findings):
        # also where these inputs do not show it
        if finding.value in forms and epsilons_differ(forms[finding.value].epsilon, epsilons[finding.value]):
            findings[place] = replace(finding, missed=finding.missed or "epsilon")
    against = "onnxruntime" if opened.stored is opened.weights else "dequantized"
    return _with_culprit(RungFindings(rung, against, tuple(findings)), opened, seen, forms)


def _judge(opened: OpenPart, seen: Values, below: Values, stored: bool, tolerance: Tolerance) -> list[Finding]:
    """Findings of all values, what their operations should make of their operands computed for a few at a time."""
    from fluxkiln.compile.onnx.values import local_values

    known: list[Finding] = []
    given = {**opened.inputs, **seen}
    graph, weights = (opened.form or opened.template, opened.stored) if stored else (opened.template, opened.weights)
    for start in range(0, len(opened.order), PIECE):
        names = opened.order[start : start + PIECE]
        local = local_values(graph, given, weights, names)
        known += judge_values(names, seen, below, local, tolerance)
    return known


def _with_culprit(made: RungFindings, opened: OpenPart, seen: Values, forms: Mapping[str, Operation]) -> RungFindings:
    def remedy_of(finding: Finding, operation: Operation) -> Remedy:
        return find_remedy(
            made.rung, finding, operation, opened.operations, forms.get(finding.value), opened.scheme, opened.advice
        )

    return with_culprit(made, opened.operations, {**opened.inputs, **seen}, remedy_of, forms)
