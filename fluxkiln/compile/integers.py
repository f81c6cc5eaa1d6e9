"""A part in the arithmetic of an integer scheme: its template with every product in codes computed as the chip does.

What is not a product in codes is float32 arithmetic, as in the template. So this is the rung that compiled forms of the
scheme are compared with: an error of the scheme is on both sides. Of products of queries and keys the operands are
rounded to 8 bits; their 16 bits, thousands of steps for a unit of the softmax, round less than float32 to bfloat16.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.onnx.gated import gated_slots
from fluxkiln.compile.onnx.products import replace_nodes
from fluxkiln.compile.onnx.runner import Filling
from fluxkiln.compile.onnx.scores import find_scores
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import specs_from_json, specs_to_json
from fluxkiln.compile.weights import part_packers, part_weights
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.integer import INPUT_SCALE, LEVELS, OUTPUT_SCALE, IntegerWeight
from fluxkiln.quantize.rounders import stored_weight
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import GAINS, RECIPROCALS, SCALES, side_slot, split_slot
from fluxkiln.types import TRANSPOSED, Part, Template, TensorSpec

if TYPE_CHECKING:
    from onnx import NodeProto

_NUMBERS: Mapping[str, float] = {
    "to_codes": 1 / INPUT_SCALE, "lowest": -LEVELS - 1, "highest": LEVELS, "of_sums": INPUT_SCALE,
    "to_products": INPUT_SCALE / OUTPUT_SCALE, "lowest_product": -32768.0, "highest_product": 32767.0,
    "of_products": OUTPUT_SCALE,
}  # fmt: skip


def fill_integers(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template) -> Filling:
    """The part's template in integers, and what fills its slots: codes, scales and reciprocals of weights in codes."""
    scheme, reader = plan.scheme(part), weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
    made, biases = _find_form(cache, template, scheme)
    packer_of, held = part_packers(checkpoint, plan, cache, part), part_weights(checkpoint, plan, cache, part, template)
    known: dict[str, NDArray[Any]] = {}

    def packed(slot: str) -> NDArray[np.int8]:
        found = packer_of(slot, None)(reader(slot))
        assert isinstance(found.packed, IntegerWeight)
        assert found.beside.divisors is not None
        known[side_slot(slot, SCALES)] = found.packed.scales_O
        known[side_slot(slot, RECIPROCALS)] = 1 / found.beside.divisors
        if found.beside.gains is not None:
            known[side_slot(slot, GAINS)] = found.beside.gains
        return found.packed.codes_OI

    def read(slot: str) -> NDArray[Any]:
        weight, role = split_slot(slot)
        if role and slot not in known:
            packed(weight)
        if role:
            return known[slot]
        if side_slot(slot, SCALES) in (spec.name for spec in made.slots):
            return packed(slot)
        return held(slot) if slot in biases else stored_weight(reader(slot), scheme)

    return Filling(made, read)


def _find_form(cache: ActionCache, template: Template, scheme: Scheme) -> tuple[Template, frozenset[str]]:
    """A template in integers, from the store or made now, and the slots that are added to its products."""
    action = Action(
        stage="integer",
        what=f"{template.kind} {scheme.compiled_name}",
        code_version=code_version(integer_template),
        inputs={"template": template.digest},
        settings={"scheme": scheme.compiled_name},
    )

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        made, biases = integer_template(template, scheme, folder / "integer.onnx")
        return {"graph": made.path}, {"slots": specs_to_json(made.slots), "biases": sorted(biases)}

    result = run_action(cache, action, produce)
    graph, facts = result.outputs["graph"], dict[str, Any](result.facts)
    slots, biases = specs_from_json(facts["slots"]), frozenset(map(str, facts["biases"]))
    return replace(template, path=cache.path(graph), digest=graph.digest, slots=slots), biases


def integer_template(template: Template, scheme: Scheme, target: Path) -> tuple[Template, frozenset[str]]:
    """Write `target`: an opset 17 template whose products in codes are in the arithmetic of `quantize.integer`.

    Multipliers are as exact as float32, and are not shifted: a chip's have 20 bits and more. Values keep their names.

    Returns:
        the template with slots for scales and reciprocals, and the slots that are added to products.
    """
    import onnx
    from onnx.helper import make_node, make_tensor, make_tensor_value_info

    model = onnx.load(template.path)
    graph, activations = model.graph, {spec.name for spec in template.inputs}
    vectors = {spec.name for spec in template.slots if len(spec.shape) == 1}
    coded = {one.output: one for one in weight_matmuls(template.path, activations) if scheme.in_codes(one.slot)}
    gated = {slot for slots, _ in gated_slots(template.path, activations, scheme) for slot in slots}
    scores = {one.output for one in find_scores(template.path, activations)} if scheme.limit else set()
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    # what a bias is added to -> the addition
    sums = {
        name: node
        for name in coded
        for node in readers.get(name, ())
        if node.op_type == "Add" and vectors & set(node.input) and len(readers[name]) == 1
    }
    added = {node.output[0] for node in sums.values()}
    shapes = {spec.name: spec.shape for spec in template.slots}
    nodes: list[NodeProto] = []
    slots: dict[str, TensorSpec] = {}
    biases: set[str] = set()
    quantized: dict[str, str] = {}

    def emit(operation: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(make_node(operation, inputs, [output], **attributes))
        return output

    def slot_beside(slot: str, role: str, size: int) -> str:
        name = side_slot(slot, role)
        slots[name] = TensorSpec(name, (size,))
        return name

    def quantize(source: str, slot: str, width: int) -> str:
        scaled = emit("Mul", [source, slot_beside(slot, RECIPROCALS, width)], f"{source}/scaled")
        rounded = emit("Round", [emit("Mul", [scaled, "to_codes"], f"{source}/steps")], f"{source}/rounded")
        clipped = emit("Clip", [rounded, "lowest", "highest"], f"{source}/clipped")
        return emit("Cast", [clipped], f"{source}/codes", to=onnx.TensorProto.INT8)

    for node in graph.node:
        if node.output[0] in added:
            continue  # with its product
        if node.output[0] in scores:
            for place, operand in enumerate(node.input):
                steps = emit("Mul", [operand, "to_score_codes"], f"{operand}/steps")
                clipped = emit(
                    "Clip", [emit("Round", [steps], f"{operand}/rounded"), "lowest", "highest"], f"{operand}/codes"
                )
                node.input[place] = emit("Mul", [clipped, "of_score_codes"], f"{operand}/stored")
        if node.output[0] not in coded:
            nodes.append(node)
            continue
        one, own = coded[node.output[0]], node.output[0]
        columns, rows = shapes[one.slot] if one.slot.endswith(TRANSPOSED) else shapes[one.slot][::-1]
        if one.source not in quantized:
            quantized[one.source] = quantize(one.source, one.slot, columns)
        scales = slot_beside(one.slot, SCALES, rows)
        codes = emit("Cast", [one.slot], f"{own}/weight", to=onnx.TensorProto.INT8)
        total = emit("MatMulInteger", [quantized[one.source], codes], f"{own}/sums")
        output = own
        if own in sums:
            output = sums[own].output[0]
            (bias,) = vectors & set(sums[own].input)
            biases.add(bias)
            steps = emit("Div", [bias, emit("Mul", [scales, "of_sums"], f"{own}/bias_scales")], f"{own}/bias_steps")
            rounded = emit("Round", [steps], f"{own}/bias_rounded")
            whole = emit("Cast", [rounded], f"{own}/bias", to=onnx.TensorProto.INT32)
            total = emit("Add", [total, whole], f"{own}/biased")
        wide = emit("Cast", [total], f"{own}/wide", to=onnx.TensorProto.FLOAT)
        multipliers = emit("Mul", [scales, "to_products"], f"{own}/multipliers")
        rounded = emit("Round", [emit("Mul", [wide, multipliers], f"{own}/steps")], f"{own}/rounded")
        clipped = emit("Clip", [rounded, "lowest_product", "highest_product"], f"{own}/clipped")
        if one.slot in gated:
            gains = slot_beside(one.slot, GAINS, rows)
            emit("Mul", [emit("Mul", [clipped, "of_products"], f"{own}/products"), gains], output)
        else:
            emit("Mul", [clipped, "of_products"], output)
    replace_nodes(graph, nodes)
    numbers = {**_NUMBERS, "to_score_codes": LEVELS / (scheme.limit or 1), "of_score_codes": scheme.limit / LEVELS}
    graph.initializer.extend(make_tensor(name, 1, [], [value]) for name, value in numbers.items())
    graph.input.extend(make_tensor_value_info(spec.name, 1, spec.shape) for spec in slots.values())
    target.write_bytes(model.SerializeToString(deterministic=True))
    digest = "sha256:" + hashlib.sha256(target.read_bytes()).hexdigest()
    made = replace(template, path=target, digest=digest, slots=(*template.slots, *slots.values()))
    return made, frozenset(biases)
