"""Pouring: every slot's weight lies beside the graph, as float32 and in the graph's layout."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fluxkiln.compile.onnx import filled as filling
from fluxkiln.compile.onnx.filled import fill
from fluxkiln.errors import CompileError

RANDOM = np.random.default_rng(0)
# as the checkpoint has them
WEIGHTS = {
    "up.weight__t": RANDOM.standard_normal((24, 16)).astype(ml_dtypes.bfloat16),
    "up.bias": RANDOM.standard_normal(24).astype(ml_dtypes.bfloat16),
    "table": RANDOM.standard_normal((24, 5, 3)).astype(np.float32),
}
SHAPES = {"x": [1, 8, 16], "up.weight__t": [16, 24], "up.bias": [24], "table": [24, 5, 3]}


@pytest.fixture
def template(tmp_path):
    """x @ up.weight__t + up.bias, and a slot that is handed through."""
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()}
    nodes = [
        helper.make_node("MatMul", ["x", "up.weight__t"], ["product"]),
        helper.make_node("Add", ["product", "up.bias"], ["y"]),
        helper.make_node("Identity", ["table"], ["z"]),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "yz"]
    graph = helper.make_graph(nodes, "linear", list(values.values()), outputs)
    path = tmp_path / "template.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize("block", [1, 100, 1 << 22])
def test_weights_lie_beside_the_graph_however_they_are_cut(template, tmp_path, monkeypatch, block):
    monkeypatch.setattr(filling, "_BLOCK", block)
    fill(template, {"x"}, WEIGHTS.__getitem__, tmp_path / "filled.onnx")
    assert (tmp_path / "filled.onnx").stat().st_size < 2000
    model = onnx.load(tmp_path / "filled.onnx")  # with what lies beside it
    assert [value.name for value in model.graph.input] == ["x"]
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert found.keys() == WEIGHTS.keys()
    for name, weight in WEIGHTS.items():
        expected = weight.astype(np.float32)
        assert found[name].dtype == np.float32
        assert np.array_equal(found[name], expected.T if name.endswith("__t") else expected), name


def test_a_weight_of_another_shape_is_refused(template, tmp_path):
    wrong = WEIGHTS | {"up.weight__t": WEIGHTS["up.weight__t"][:, :8]}
    with pytest.raises(CompileError, match=r"slot up.weight__t has shape .* in the template, its weight has \(8, 24\)"):
        fill(template, {"x"}, wrong.__getitem__, tmp_path / "filled.onnx")
