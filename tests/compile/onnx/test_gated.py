"""Sums of products that a row is multiplied by: found, and nothing else taken for one."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from fluxkiln.compile.onnx.gated import find_gated

SHAPES = {"x": (1, 5, 4), "w": (4, 4), "v": (4, 4), "b": (4,), "row": (1, 1, 4), "other": (1, 5, 4)}


def gated(*nodes, outputs=("y",)):
    """(weights, biases, values between) of each."""
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()]
    made = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (1, 5, 4)) for name in outputs]
    graph = helper.make_graph([helper.make_node(one, given, [name]) for name, one, *given in nodes], "g", inputs, made)
    model = ir.from_proto(helper.make_model(graph))
    found = find_gated(model, {"x", "row", "other"})
    return [(set(one.slots), set(one.biases), {value.name for value in one.values}) for one in found]


def test_a_product_and_a_sum_of_two_are_found():
    product, biased = ("p", "MatMul", "x", "w"), ("s", "Add", "p", "b")
    assert gated(product, biased, ("y", "Mul", "row", "s")) == [({"w"}, {"b"}, {"p", "s"})]
    both = product, biased, ("q", "MatMul", "x", "v"), ("t", "Add", "s", "q"), ("y", "Mul", "t", "row")
    assert gated(*both) == [({"w", "v"}, {"b"}, {"p", "s", "q", "t"})]


@pytest.mark.parametrize(
    ("nodes", "outputs"),
    [
        ((("p", "MatMul", "x", "w"), ("y", "Mul", "p", "other")), ("y",)),  # a gate for each token
        ((("p", "MatMul", "x", "w"), ("y", "Mul", "p", "row"), ("z", "Add", "p", "b")), ("y", "z")),  # read elsewhere
        ((("p", "MatMul", "x", "other"), ("y", "Mul", "p", "row")), ("y",)),  # no weight
        ((("p", "MatMul", "x", "w"), ("s", "Add", "p", "other"), ("y", "Mul", "s", "row")), ("y",)),  # a stream in it
    ],
)
def test_what_a_gate_cannot_take_over(nodes, outputs):
    assert gated(*nodes, outputs=outputs) == []
