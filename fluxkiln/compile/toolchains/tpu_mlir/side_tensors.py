"""Templates with what a method needs beside the codes of a weight, so that the compiler compiles that as well.

Every matmul y = x W^T whose weight is in codes gets the slots of `fluxkiln.quantize.side_tensors`, and the operations
that use them. Matmuls of one x share the product by reciprocals and its slot, called after the first of them: the
compiler would merge two that happened to be equal, and what it compiles must not depend on the weights.

A branch is added behind the product and before its bias, under the name that the product had.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.errors import CompileError
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import DOWN, RECIPROCALS, UP, check_rank, side_slot
from fluxkiln.types import TRANSPOSED, Template, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def add_side_tensors(template: Template, scheme: Scheme, target: Path) -> Template:
    """Write `target`: an opset 17 template with the slots and operations of the scheme's method.

    Returns:
        What was written, its new slots behind the others.

    Raises:
        CompileError: a weight has no shape. SchemeError: a rank that a weight does not have.
    """
    import onnx_ir as ir

    activations = {spec.name for spec in template.inputs}
    coded = {one.output for one in weight_matmuls(template.path, activations) if scheme.in_codes(one.slot)}
    model = ir.load(template.path)
    known = {value.name for value in model.graph.inputs}
    scaled: dict[ir.Value | None, ir.Value] = {}
    for node in [node for node in model.graph if node.outputs[0].name in coded]:
        slot, shape = _weight(node)
        shapes = scheme.side_shapes(shape)
        if DOWN in shapes:
            check_rank(scheme.rank, shape, slot)
            # transposed, as a MatMul takes them
            down, up = (_slot(model.graph, side_slot(slot, role), shapes[role][::-1]) for role in (DOWN, UP))
            _add_branch(model.graph, node, down, up)
        if RECIPROCALS in shapes:
            _scale_input(model.graph, node, side_slot(slot, RECIPROCALS), scaled)
    ir.save(model, target)
    digest = "sha256:" + hashlib.sha256(target.read_bytes()).hexdigest()
    added = (TensorSpec(str(value.name), _shape(value)) for value in model.graph.inputs if value.name not in known)
    return replace(template, path=target, digest=digest, slots=(*template.slots, *added))


def _add_branch(graph: ir.Graph, node: ir.Node, down: ir.Value, up: ir.Value) -> None:
    import onnx_ir as ir

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


def _scale_input(graph: ir.Graph, node: ir.Node, slot: str, scaled: dict[ir.Value | None, ir.Value]) -> None:
    """Have a matmul read its input times reciprocals: one of `scaled`, or made now and put there."""
    import onnx_ir as ir

    source = node.inputs[0]
    if source not in scaled:
        reciprocals = _slot(graph, slot, (_weight(node)[1][1],))
        product = ir.Node("", "Mul", [source, reciprocals], name=f"{node.outputs[0].name}_scaled")
        product.outputs[0].name = product.name
        graph.insert_before(node, product)
        scaled[source] = product.outputs[0]
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


def _slot(graph: ir.Graph, name: str, shape: tuple[int, ...]) -> ir.Value:
    """The input of this name, made when it is first asked for: a weight may be in several matmuls."""
    import onnx_ir as ir

    for value in graph.inputs:
        if value.name == name:
            return value
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    return value


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())
