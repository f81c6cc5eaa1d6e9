"""Templates with what a method needs beside the codes of a weight, so that the compiler compiles that as well.

For every matmul y = x W^T whose weight is in codes (slot S, W in torch's layout [O, I]):

- `svd`: y = x S^T + (x down^T) up^T, with slots `S__down` [r, I] and `S__up` [O, r] in bfloat16; S holds the rest;
- `awq`: y = (x * reciprocals) S^T, with a slot `S__reciprocals` [I] in bfloat16; S holds W * scales. A product, not a
  quotient: the chip multiplies in one pass, and the scales are made so that this is exact. Matmuls of one x share the
  product and the slot, called after the first of them: the compiler would merge two that happened to be equal, and what
  it compiles must not depend on the weights.

A slot that a template has transposed (`__t`) gets branches that are transposed too. The branch is added behind the
product and before its bias, under the name that the product had.

Source of the methods: `fluxkiln.quantize.activation`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import TRANSPOSED
from fluxkiln.errors import CompileError
from fluxkiln.quantize.activation import check_rank
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Template, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

DOWN, UP, RECIPROCALS = "__down", "__up", "__reciprocals"
_BESIDE = (DOWN, UP, RECIPROCALS)


def split_slot(slot: str) -> tuple[str, str]:
    """The weight that a slot stands beside, and as which of DOWN, UP and RECIPROCALS; its own name and "" otherwise."""
    base = slot.removesuffix(TRANSPOSED)
    for role in _BESIDE:
        if base.endswith(role):
            return base.removesuffix(role), role
    return slot, ""


def beside_slots(slot: str) -> tuple[str, str, str]:
    """What the slots beside a weight's are called, whether its method has them or not: DOWN, UP and RECIPROCALS."""
    return f"{slot}{DOWN}{TRANSPOSED}", f"{slot}{UP}{TRANSPOSED}", f"{slot}{RECIPROCALS}"


def in_codes(slot: str, scheme: Scheme) -> bool:
    """Whether a matmul's weight is to be quantized."""
    return bool(scheme.weight_bits) and not split_slot(slot)[1] and not scheme.keeps(slot)


def correct_template(template: Template, scheme: Scheme, target: Path) -> Template:
    """Write `target`: an opset 17 template with the slots and operations of the scheme's method.

    Returns:
        What was written, its new slots behind the others.

    Raises:
        CompileError: a weight has no shape. SchemeError: a rank that a weight does not have.
    """
    import onnx_ir as ir

    activations = {spec.name for spec in template.inputs}
    coded = {one.output for one in weight_matmuls(template.path, activations) if in_codes(one.slot, scheme)}
    model = ir.load(template.path)
    slots: dict[str, TensorSpec] = {}
    scaled: dict[ir.Value | None, ir.Value] = {}
    for node in [node for node in model.graph if node.outputs[0].name in coded]:
        if scheme.method == "svd":
            added = tuple(_add_branch(model.graph, node, scheme))
        else:
            added = tuple(_scale_input(model.graph, node, scaled))
        slots |= {spec.name: spec for spec in added}
    ir.save(model, target)
    digest = "sha256:" + hashlib.sha256(target.read_bytes()).hexdigest()
    return replace(template, path=target, digest=digest, slots=(*template.slots, *slots.values()))


def _add_branch(graph: ir.Graph, node: ir.Node, scheme: Scheme) -> Iterator[TensorSpec]:
    import onnx_ir as ir

    slot, (rows, columns) = _weight(node)
    check_rank(scheme.rank, (rows, columns), slot)
    down, up = (_new_slot(graph, slot, role, shape) for role, shape in
                ((DOWN, (columns, scheme.rank)), (UP, (scheme.rank, rows))))  # fmt: skip
    output = node.outputs[0]
    name = str(output.name)
    lower = ir.Node("", "MatMul", [node.inputs[0], down], name=f"{name}_down")
    upper = ir.Node("", "MatMul", [lower.outputs[0], up], name=f"{name}_up")
    total = ir.Node("", "Add", [output, upper.outputs[0]], name=f"{name}_sum")
    for made, what in ((lower, "down"), (upper, "branch")):
        made.outputs[0].name = f"{name}_{what}"
    ir.convenience.replace_all_uses_with(output, total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    _take_name(total.outputs[0], output, f"{name}_codes")
    graph.insert_after(node, [lower, upper, total])
    for value in (down, up):
        yield TensorSpec(str(value.name), _shape(value))


def _scale_input(graph: ir.Graph, node: ir.Node, scaled: dict[ir.Value | None, ir.Value]) -> Iterator[TensorSpec]:
    """Have a matmul read its input times reciprocals: one of `scaled`, or made now and put there."""
    import onnx_ir as ir

    source = node.inputs[0]
    if source not in scaled:
        slot, (_, columns) = _weight(node)
        reciprocals = _new_slot(graph, slot, RECIPROCALS, (columns,))
        product = ir.Node("", "Mul", [source, reciprocals], name=f"{node.outputs[0].name}_scaled")
        product.outputs[0].name = product.name
        graph.insert_before(node, product)
        scaled[source] = product.outputs[0]
        yield TensorSpec(str(reciprocals.name), (columns,))
    node.replace_input_with(0, scaled[source])


def _take_name(value: ir.Value, old: ir.Value, renamed: str) -> None:
    """Give a value the name, type and shape of another, which is called `renamed` from now on."""
    name = old.name
    old.name = renamed
    value.name, value.shape, value.type = name, old.shape, old.type


def _weight(node: ir.Node) -> tuple[str, tuple[int, int]]:
    """The slot of a matmul, and its shape in torch's layout."""
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        raise CompileError(f"{node.name} has a weight without a shape")
    name, shape = str(weight.name), _shape(weight)
    rows, columns = shape[::-1] if name.endswith(TRANSPOSED) else shape
    return name, (rows, columns)


def _new_slot(graph: ir.Graph, slot: str, role: str, shape: tuple[int, ...]) -> ir.Value:
    """The slot beside another, made when it is first asked for; matrices are transposed, as a MatMul takes them."""
    import onnx_ir as ir

    name = f"{slot}{role}{TRANSPOSED if len(shape) == 2 else ''}"
    for value in graph.inputs:
        if value.name == name:
            return value
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())
