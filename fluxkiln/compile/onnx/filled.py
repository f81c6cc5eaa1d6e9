"""A template's slots filled with weights, as an ONNX file that a compiler reads; and its products with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fluxkiln.errors import CompileError
from fluxkiln.types import TRANSPOSED, WeightReader

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 8
_ALIGNMENT = 64
# elements that are in float32 at a time
_BLOCK = 1 << 22


def fill(
    template: Path,
    activations: set[str],
    read_weight: WeightReader,
    target: Path,
    rewrites: Iterable[Callable[[ir.Model], object]] = (),
) -> None:
    """Write `target`: the template with every slot turned from an input into a float32 initializer.

    The weights go to `<target>.data` one after the other, some rows at a time: a part of any size takes the memory of
    its largest weight as it is read.

    Args:
        template: of opset 17; activations: its inputs that stay inputs.
        read_weight: slot -> weight in torch's layout.
        rewrites: what else is done to the graph before it is written, in order.
    """
    import onnx_ir as ir

    model = ir.load(template)
    graph = model.graph
    beside = target.with_name(f"{target.name}.data")
    with beside.open("wb") as file:
        for value in [value for value in graph.inputs if str(value.name) not in activations]:
            name = str(value.name)
            weight = read_weight(name)
            if name.endswith(TRANSPOSED):
                weight = weight.T
            if value.shape is None or tuple(value.shape.numpy()) != weight.shape:
                raise CompileError(
                    f"slot {name} has shape {value.shape} in the template, its weight has {weight.shape}"
                )
            file.write(b"\0" * (-file.tell() % _ALIGNMENT))
            value.const_value = ir.ExternalTensor(
                beside.name, file.tell(), 4 * weight.size, ir.DataType.FLOAT,
                shape=ir.Shape(weight.shape), name=name, base_dir=target.parent,
            )  # fmt: skip
            graph.initializers[name] = value
            rows = max(1, _BLOCK * len(weight) // max(1, weight.size))
            for start in range(0, len(weight), rows):
                file.write(np.ascontiguousarray(weight[start : start + rows], np.float32).data)
    graph.inputs[:] = [value for value in graph.inputs if str(value.name) in activations]
    for rewrite in rewrites:
        rewrite(model)
    model.ir_version = IR_VERSION
    ir.save(model, target)


@dataclass(frozen=True, slots=True)
class WeightMatMul:
    """A node that multiplies with a slot.

    Attributes:
        output, operation: its output's name; `MatMul` or `Gemm`.
        source: what is multiplied.
        slot, in_features: the weight and its input channels.
        sums: the outputs of additions that read its own: its bias may be among them.
    """

    output: str
    operation: str
    source: str
    slot: str
    in_features: int
    sums: tuple[str, ...] = ()


def weight_matmuls(template: Path, activations: set[str]) -> list[WeightMatMul]:
    """The matmuls of a template that have a weight, in the order of the graph."""
    import onnx_ir as ir

    model = ir.load(template)
    slots = {id(value): value for value in model.graph.inputs if str(value.name) not in activations}
    return [
        WeightMatMul(
            str(node.outputs[0].name),
            node.op_type,
            str(node.inputs[0].name) if node.inputs[0] is not None else "",
            str(slots[id(node.inputs[1])].name),
            _in_features(node),
            tuple(str(user.outputs[0].name) for user in node.outputs[0].consumers() if user.op_type == "Add"),
        )
        for node in model.graph
        if node.op_type in ("MatMul", "Gemm") and len(node.inputs) > 1 and id(node.inputs[1]) in slots
    ]


def _in_features(node: ir.Node) -> int:
    weight = node.inputs[1]
    if weight is None or weight.shape is None:
        raise CompileError(f"{node.name} has a weight without a shape")
    attribute = node.attributes.get("transB")
    transposed = node.op_type == "Gemm" and attribute is not None and attribute.as_int() != 0
    return int(weight.shape.numpy()[1 if transposed else 0])
