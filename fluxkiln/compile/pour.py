"""Pouring: a template's slots filled with weights, as the ONNX file that the compiler reads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxkiln.compile.mould import TRANSPOSED, WeightReader
from fluxkiln.errors import CompileError

if TYPE_CHECKING:
    import onnx_ir as ir

# protobuf's limit is 2 GiB; beyond this the weights lie beside the graph
INLINE_BYTES = 1_500_000_000
IR_VERSION = 8


def pour(template: Path, activations: set[str], read_weight: WeightReader, target: Path) -> None:
    """Write `target`: the template with every slot turned from an input into a float32 initializer.

    Args:
        template: an opset 17 template.
        activations: the graph inputs that stay inputs.
        read_weight: slot -> weight in torch's layout.
        target: an `.onnx` path; large weights lie beside it in `<target>.data`.
    """
    import onnx_ir as ir

    model = ir.load(template)
    graph = model.graph
    total = 0
    for value in list(graph.inputs):
        name = str(value.name)
        if name in activations:
            continue
        weight = read_weight(name).astype(np.float32)
        if name.endswith(TRANSPOSED):
            weight = np.ascontiguousarray(weight.T)
        if value.shape is None or tuple(value.shape.numpy()) != weight.shape:
            raise CompileError(f"slot {name} has shape {value.shape} in the template, its weight has {weight.shape}")
        total += weight.nbytes
        value.const_value = ir.tensor(weight, name=name)
        graph.initializers[name] = value
    graph.inputs[:] = [value for value in graph.inputs if str(value.name) in activations]
    model.ir_version = IR_VERSION
    external = f"{target.name}.data" if total > INLINE_BYTES else None
    ir.save(model, target, external_data=external)


def quantized_matmuls(template: Path, activations: set[str]) -> list[tuple[str, int]]:
    """The matmuls of a template that have a weight: slot and input width. W4BF16 must quantize every one of them."""
    import onnx_ir as ir

    model = ir.load(template)
    slots = {id(value): value for value in model.graph.inputs if str(value.name) not in activations}
    found = []
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1 and id(node.inputs[1]) in slots:
            found.append((str(slots[id(node.inputs[1])].name), _in_features(node)))
    return found


def _in_features(node: ir.Node) -> int:
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        raise CompileError(f"{node.name} has a weight without a shape")
    transposed = node.op_type == "Gemm" and node.attributes.get_int("transB", 0)
    return int(weight.shape.numpy()[1 if transposed else 0])
