"""Packed products in integers: nearly the same, never by default, and only packed ones."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from fluxkiln.compile.onnx.external_data import Sidecar
from fluxkiln.compile.onnx.products import CONTRIB, packed_matmul, quantize_activations
from fluxkiln.compile.onnx.session import make_session, open_session
from fluxkiln.quantize.pack import empty_packed
from fluxkiln.quantize.rounders import make_rounder
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.quantize.side_tensors import SidedWeight

RNG = np.random.default_rng(7)
ROWS, WIDTH = 96, 256
WEIGHT = RNG.standard_normal((ROWS, WIDTH)).astype(np.float32)
X = RNG.standard_normal((8, WIDTH)).astype(np.float32)


@pytest.fixture
def graph(tmp_path):
    """scheme -> a graph that multiplies with WEIGHT, packed."""

    def make(name):
        scheme = parse_scheme(name)
        packed = empty_packed(WEIGHT.shape, scheme.group_size, scheme.weight_bits)
        make_rounder(scheme)(WEIGHT, scheme.weight_bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
        sidecar = Sidecar(tmp_path / f"{name}.bin")
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        nodes = packed_matmul(node, SidedWeight(packed), scheme, sidecar, "w")
        values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, X.shape)]
        results = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [8, ROWS])]
        made = helper.make_graph(nodes, "packed", values, results, list(sidecar.take().values()))
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
        path = tmp_path / f"{name}.onnx"
        onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=11), path)
        return path

    return make


def rel_l2(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("scheme", ["W4BF16", "W8BF16"])
def test_integers_are_near_and_only_where_asked_for(graph, scheme):
    path = graph(scheme)
    exact = make_session(path, "test", threads=1).run(["y"], {"x": X})[0]
    default, fast = (open_session(path, threads=1, fast=wanted).run(["y"], {"x": X})[0] for wanted in (False, True))
    np.testing.assert_array_equal(default, exact)
    assert 1e-4 < rel_l2(fast, exact) < 0.015  # it is another arithmetic, and no other result
    assert rel_l2(exact, X @ WEIGHT.T) < {"W4BF16": 0.15, "W8BF16": 0.01}[scheme]


def test_other_nodes_and_attributes_stay(graph):
    model = onnx.load(graph("W4BF16"), load_external_data=False)
    before = {attribute.name: attribute.i for attribute in model.graph.node[0].attribute}
    assert quantize_activations(model) == 1
    after = {attribute.name: attribute.i for attribute in model.graph.node[0].attribute}
    assert after == {**before, "accuracy_level": 4}
    model.graph.node[0].op_type = "MatMul"
    plain = model.SerializeToString(deterministic=True)
    assert quantize_activations(model) == 0
    assert model.SerializeToString(deterministic=True) == plain
