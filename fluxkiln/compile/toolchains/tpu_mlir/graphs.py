"""Graphs rewritten: as the compiler gets them, and its lowered one (`*_tpu.mlir`) as its interpreter gets it."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.onnx.gated import Gated, both_orders, find_gated, has_one_row
from fluxkiln.compile.onnx.runner import MOST_SCORES
from fluxkiln.errors import CompileError
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.quantize.side_tensors import DOWN, GAINS, RECIPROCALS, UP, check_rank, side_slot
from fluxkiln.types import TRANSPOSED, Template, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir


_OPERATION = re.compile(
    r'\s*(?P<result>%\w+) = "(?P<name>[\w.]+)"\((?P<operands>.*?)\) (?P<attributes>\{.*\} )?'
    r": \(.*\) -> (?P<type>.+?) loc\((?P<loc>.+)\)"
)
_TENSOR = re.compile(r"tensor<([0-9x]+)x(\w+)>")
_FUNCTION = "func.func @main("
# inputs with a row per token: what depends on none of them is small
TOKEN_INPUTS = frozenset({"hidden_states", "encoder_hidden_states"})


def small_work_first(model: ir.Model, tokens: Set[str] = TOKEN_INPUTS) -> None:
    """Move all nodes that no input of `tokens` reaches in front of the others; both keep their order.

    For blocks that is the order in which the chip runs them. TPU-MLIR keeps neighbours in local memory when it can
    treat them as one group: LayerNorm, scale and shift then take one pass over the tokens instead of two. It sorts the
    operations before it forms groups, and its order separates what belongs together: what a block does with its
    modulation alone ends up between the norm and the scale. For blocks the sorting is therefore switched off
    (`compiler.py`), and the statements of a model's blocks stand as the chip is to execute them.
    """
    reached = {id(value) for value in model.graph.inputs if str(value.name) in tokens}
    last: list[ir.Node] = []
    for node in model.graph:
        if any(id(value) in reached for value in node.inputs if value is not None):
            last.append(node)
            reached.update(id(value) for value in node.outputs)
    model.graph.remove(last)
    model.graph.extend(last)


def add_side_tensors(template: Template, scheme: Scheme, target: Path) -> Template:
    """Write `target`: an opset 17 template with the slots, behind the others, and operations of the scheme's method.

    Every matmul y = x W^T whose weight is in codes gets the slots of `fluxkiln.quantize.side_tensors`, and the
    operations that use them. Matmuls of one x share the product by reciprocals and its slot, called after the first of
    them: the compiler would merge two that happened to be equal, and what it compiles must not depend on the weights.
    A branch is added behind the product and before its bias, under the name that the product had. Of integers the rows
    that products are multiplied by are multiplied by their gains, and what lies between is called otherwise.

    Raises:
        CompileError: a weight has no shape. SchemeError: a rank that a weight does not have.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

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
    for one in list(find_gated(model, activations)) if scheme.integer else ():
        if all(map(scheme.in_codes, one.slots)):
            _scale_gate(model.graph, one)
    RemoveUnusedNodesPass()(model)
    ir.save(model, target)
    digest = "sha256:" + hashlib.sha256(target.read_bytes()).hexdigest()
    added = (TensorSpec(str(value.name), _shape(value)) for value in model.graph.inputs if value.name not in known)
    return replace(template, path=target, digest=digest, slots=(*template.slots, *added))


def _add_branch(graph: ir.Graph, node: ir.Node, down: ir.Value, up: ir.Value) -> None:
    import onnx_ir as ir

    output, name = node.outputs[0], str(node.outputs[0].name)
    lower = ir.Node("", "MatMul", [node.inputs[0], down], name=f"{name}_down")
    upper = ir.Node("", "MatMul", [lower.outputs[0], up], name=f"{name}_up")
    total = ir.Node("", "Add", [output, upper.outputs[0]], name=f"{name}_sum")
    for made, what in ((lower, "down"), (upper, "branch")):
        made.outputs[0].name = f"{name}_{what}"
    ir.convenience.replace_all_uses_with(output, total.outputs[0], replace_graph_outputs=True)
    total.replace_input_with(0, output)
    total.outputs[0].shape, total.outputs[0].type = output.shape, output.type
    output.name, total.outputs[0].name = f"{name}_codes", name
    graph.insert_after(node, [lower, upper, total])


def _scale_input(graph: ir.Graph, node: ir.Node, slot: str, scaled: dict[ir.Value | None, ir.Value]) -> None:
    """Have a matmul read its input times reciprocals: one of `scaled`, or made now and put there.

    An input x s + t whose s and t have one row for all tokens becomes x (s r) + t r, which takes no pass over them.
    """
    import onnx_ir as ir

    source, name = node.inputs[0], f"{node.outputs[0].name}_scaled"

    def make(operation: str, operands: list[ir.Value], what: str, before: ir.Node) -> ir.Value:
        made = ir.Node("", operation, operands, name=f"{name}{what}")
        made.outputs[0].name = made.name
        graph.insert_before(before, made)
        return made.outputs[0]

    if source not in scaled:
        assert source is not None
        reciprocals = _slot(graph, slot, (_weight(node)[1][1],))
        if (modulated := _find_rows(source)) is None:
            scaled[source] = make("Mul", [source, reciprocals], "", node)
        else:
            place, norm, rows, shift = modulated
            rows, shift = (
                make("Mul", [rows, reciprocals], "_rows", place),
                make("Mul", [shift, reciprocals], "_shift", place),
            )
            scaled[source] = make("Add", [make("Mul", [norm, rows], "_norm", place), shift], "", place)
    node.replace_input_with(0, scaled[source])


def _scale_gate(graph: ir.Graph, gated: Gated) -> None:
    """Have products that a row is multiplied by be smaller, and the row larger, by gains called after the first."""
    import onnx_ir as ir

    slot, shape = _weight(gated.products[0])
    gains = _slot(graph, side_slot(slot, GAINS), shape[:1])
    row = ir.Node("", "Mul", [gated.row, gains], name=f"{gated.gate.outputs[0].name}_gains")
    row.outputs[0].name = row.name
    graph.insert_before(gated.gate, row)
    gated.gate.replace_input_with(list(gated.gate.inputs).index(gated.row), row.outputs[0])
    for value in gated.values:
        value.name = f"{value.name}_ungated"


def _find_rows(value: ir.Value) -> tuple[ir.Node, ir.Value, ir.Value, ir.Value] | None:
    """The addition that makes x s + t, with x, s and t, where s and t have one row; None for any other value."""
    plus = value.producer()
    for shift, product in both_orders(plus, "Add"):
        for rows, norm in both_orders(product.producer(), "Mul"):
            if has_one_row(shift) and has_one_row(rows) and plus is not None:
                return plus, norm, rows, shift
    return None


def _weight(node: ir.Node) -> tuple[str, tuple[int, int]]:
    """The slot of a matmul, and its shape in torch's layout."""
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        raise CompileError(f"{node.name} has a weight without a shape")
    name, (rows, columns) = str(weight.name), _shape(weight)
    return name, (columns, rows) if name.endswith(TRANSPOSED) else (rows, columns)


def _slot(graph: ir.Graph, name: str, shape: tuple[int, ...]) -> ir.Value:
    """The input of this name, made when it is first asked for: a weight may be in several matmuls."""
    import onnx_ir as ir

    value = next((value for value in graph.inputs if value.name == name), None)
    if value is None:
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        graph.inputs.append(value)
    return value


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())


@dataclass(frozen=True, slots=True)
class _Operation:
    line: int
    result: str
    name: str
    operands: tuple[str, ...]
    attributes: str
    type: str
    loc: str

    @property
    def shape(self) -> tuple[int, ...]:
        found = _TENSOR.fullmatch(self.type)
        return tuple(int(size) for size in found[1].split("x")) if found else ()


def lean_graph(text: str, most_scores: int = MOST_SCORES) -> str:
    """A lowered graph with its inputs declared first and attention in groups of heads, which takes little memory.

    As it is, a single block of FLUX.1 at 1024x1024 takes the interpreter 9 GB: every activation is held in float32
    until the end, the scores of attention twice. The interpreter can put activations in one another's place (mode
    `reused_mem`), but then gives inputs the places of one another too, because they are declared between the
    operations: they go to the top here, unless values are integers. Neither changes a bit of the result.

    Args:
        text: a `*_tpu.mlir` of TPU-MLIR 1.30.2.
        most_scores: elements of one group's scores, where the number of heads allows.

    Raises:
        CompileError: it is no such graph.
    """
    lines = text.splitlines()
    start = next((index for index, line in enumerate(lines) if _FUNCTION in line), None)
    if start is None:
        raise CompileError("the lowered graph has no function main; pin TPU-MLIR 1.30.2")
    operations = [operation for index, line in enumerate(lines) if (operation := _parse(index, line)) is not None]
    replaced: dict[int, list[str]] = {}
    for softmax in operations:
        if softmax.name == "tpu.Softmax":
            replaced |= _by_heads(operations, softmax, most_scores)
    # what has 8-bit values is computed wrong in that mode, so such a graph keeps the order that rules it out
    movable = "!quant.uniform<" not in text
    inputs = [operation.line for operation in operations if operation.name == "top.Input" and movable]
    head = [*lines[: start + 1], *(lines[index] for index in inputs)]
    replaced |= {index: [] for index in inputs}
    body = [new for index in range(start + 1, len(lines)) for new in replaced.get(index, [lines[index]])]
    return "\n".join([*head, *body, ""])


def _parse(index: int, line: str) -> _Operation | None:
    found = _OPERATION.fullmatch(line)
    if found is None:
        return None
    operands = tuple(name.strip() for name in found["operands"].split(",")) if found["operands"] else ()
    result, name, attributes, type_, loc = found.group("result", "name", "attributes", "type", "loc")
    return _Operation(index, result, name, operands, attributes or "", type_, loc)


def _by_heads(operations: list[_Operation], softmax: _Operation, most_scores: int) -> dict[int, list[str]]:
    """Line -> what stands there instead, for softmax(query @ key) @ value with too many scores; else nothing."""
    makers = {operation.result: operation for operation in operations}
    readers = [operation for operation in operations if softmax.result in operation.operands]
    scores = makers.get(softmax.operands[0])
    if scores is None or scores.name != "tpu.MatMul" or len(readers) != 1 or readers[0].name != "tpu.MatMul":
        return {}
    (attended,) = readers
    only_here = sum(operation.operands.count(scores.result) for operation in operations) == 1
    if not only_here or attended.operands[0] != softmax.result or len(scores.shape) != 4 or scores.shape[0] != 1:
        return {}
    heads, size = scores.shape[1], math.prod(scores.shape)
    groups = next((count for count in range(1, heads) if heads % count == 0 and size <= count * most_scores), heads)
    if groups == 1:
        return {}
    lines: list[str] = []
    parts: list[tuple[str, str]] = []
    query, key, value = (makers[name] for name in (*scores.operands[:2], attended.operands[1]))
    for group in range(groups):
        span = slice(group * heads // groups, (group + 1) * heads // groups)
        tag = f"%heads{softmax.result[1:]}_{group}"
        cut = [_slice(operation, span, tag, lines) for operation in (query, key, value)]
        for operation, operands in ((scores, cut[:2]), (softmax, []), (attended, cut[2:])):
            operands = operands if operation is scores else [parts.pop(), *operands]
            parts.append(_emit(operation, operands, span, tag, lines))
    names, types = (", ".join(texts) for texts in zip(*parts, strict=True))
    lines.append(
        f'    {attended.result} = "tpu.Concat"({names}) {{axis = 1 : si32, do_relu = false, only_merge = false, '
        f"relu_limit = -1.000000e+00 : f64}} : ({types}) -> {attended.type} loc({attended.loc})"
    )
    return {scores.line: [], softmax.line: [], attended.line: lines}


def _narrow(type_: str, heads: int) -> str:
    """A tensor's type with this many heads, its second axis."""
    first, _, *rest = type_.removeprefix("tensor<").split("x")
    return "tensor<" + "x".join([first, str(heads), *rest])


def _slice(operation: _Operation, span: slice, tag: str, lines: list[str]) -> tuple[str, str]:
    """Add the slice of some heads of a tensor to `lines`; returns its name and type."""
    name, type_ = f"{tag}_of_{operation.result[1:]}", _narrow(operation.type, span.stop - span.start)
    ends = [1, span.stop, *operation.shape[2:]]
    lines.append(
        f'    {name} = "tpu.Slice"({operation.result}, %0, %0, %0, %0) {{axes = [], ends = {ends}, '
        f"hasparamConvert_axes = [1], offset = [0, {span.start}, 0, 0], steps = [1, 1, 1, 1]}} : "
        f'({operation.type}, none, none, none, none) -> {type_} loc("{name[1:]}")'
    )
    return name, type_


def _emit(
    operation: _Operation, operands: list[tuple[str, str]], span: slice, tag: str, lines: list[str]
) -> tuple[str, str]:
    """Add `operation` for some heads to `lines`; returns its result's name and type."""
    name, type_ = f"{tag}_{operation.result[1:]}", _narrow(operation.type, span.stop - span.start)
    rest = operation.operands[len(operands) :]
    if any(operand != "%0" for operand in rest):
        raise CompileError(f"{operation.name} has operands {operation.operands}; pin TPU-MLIR 1.30.2")
    names = ", ".join([*(operand for operand, _ in operands), *rest])
    types = ", ".join([*(kind for _, kind in operands), *["none"] * len(rest)])
    lines.append(
        f'    {name} = "{operation.name}"({names}) {operation.attributes}: ({types}) -> {type_} loc("{name[1:]}")'
    )
    return name, type_
