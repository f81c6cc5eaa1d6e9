"""Tanh GELU as one operation of the compiler.

ONNX has no GELU before opset 20, so a template spells it with Tanh, as torch's exporter does. The chip has it as one
operation (`top.GELU`, approx_mode "tanh"), but TPU-MLIR's ONNX converter knows only the erf GELU: left alone, the chain
becomes eleven passes over the widest tensor of a block, each rounded to 16 bits. Here the filled graph gets ONNX
Runtime's own name for it, `FastGelu`, and so can still be run; `transform.py` teaches the converter to read it.

Source: `torch.onnx.symbolic_opset9.gelu`; onnxruntime, docs/ContribOperators.md; TPU-MLIR 1.30.2,
`OnnxConverter.convert_gelu_op`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

OPERATION, DOMAIN = "FastGelu", "com.microsoft"
CUBIC = 0.044715
INNER = math.sqrt(2 / math.pi)


def fuse_tanh_gelu(model: ir.Model) -> int:
    """Replace every x * 0.5 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))) of `model` by one node; how many there were.

    A tanh that is anything else is left as it is.
    """
    import onnx_ir as ir

    found = 0
    for tanh in [node for node in model.graph if node.op_type == "Tanh"]:
        if (source := _source(tanh)) is None or (result := _result(tanh, source)) is None:
            continue
        gelu = ir.Node(DOMAIN, OPERATION, [source], name=f"{result.name}_gelu")
        model.graph.insert_after(tanh, gelu)
        ir.convenience.replace_all_uses_with(result, gelu.outputs[0], replace_graph_outputs=True)
        gelu.outputs[0].shape, gelu.outputs[0].type, gelu.outputs[0].name = result.shape, result.type, result.name
        _remove_unused(result, source)
        found += 1
    if found:
        model.graph.opset_imports[DOMAIN] = 1
    return found


def count_gelus(graph: Path) -> int:
    """How many fused GELUs a filled graph has."""
    import onnx_ir as ir

    return sum(node.op_type == OPERATION for node in ir.load(graph).graph)


def _source(tanh: ir.Node) -> ir.Value | None:
    """x, when the argument of `tanh` is sqrt(2/pi) * (x + 0.044715 * x * x * x)."""
    total = _other_factor(tanh.inputs[0], INNER)
    for x, cubic in _operands(total, "Add"):
        cube = _other_factor(cubic, CUBIC)
        for one, square in _operands(cube, "Mul"):
            if one is x and _operands(square, "Mul")[:1] == [(x, x)]:
                return x
    return None


def _result(tanh: ir.Node, source: ir.Value) -> ir.Value | None:
    """What 0.5 * (x * (1 + tanh)) is called, when that is what becomes of `tanh`."""
    for plus in tanh.outputs[0].consumers():
        if not any(_is_close(one, 1.0) for one, _ in _operands(plus.outputs[0], "Add")):
            continue
        for times in plus.outputs[0].consumers():
            if not any(one is source for one, _ in _operands(times.outputs[0], "Mul")):
                continue
            for half in times.outputs[0].consumers():
                if any(_is_close(one, 0.5) for one, _ in _operands(half.outputs[0], "Mul")):
                    return half.outputs[0]
    return None


def _operands(value: ir.Value | None, op_type: str) -> list[tuple[ir.Value, ir.Value]]:
    """The two operands of the `op_type` that makes `value`, in both orders; nothing when another node makes it."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or len(node.inputs) != 2:
        return []
    first, second = node.inputs
    return [] if first is None or second is None else [(first, second), (second, first)]


def _other_factor(value: ir.Value | None, factor: float) -> ir.Value | None:
    return next((other for one, other in _operands(value, "Mul") if _is_close(one, factor)), None)


def _is_close(value: ir.Value, number: float) -> bool:
    constant = value.const_value
    if constant is None or constant.size != 1:
        return False
    return math.isclose(float(constant.numpy().reshape(())), number, rel_tol=1e-6)


def _remove_unused(value: ir.Value, source: ir.Value) -> None:
    """Remove the node that makes `value` when nothing reads it any more, and then what only it has read."""
    node = value.producer()
    if value is source or node is None or node.graph is None or value.uses() or value.is_graph_output():
        return
    inputs = [one for one in node.inputs if one is not None]
    node.graph.remove(node, safe=True)
    for one in inputs:
        _remove_unused(one, source)
