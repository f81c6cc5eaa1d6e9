"""MatMulNBits against the dequantized product, and what it makes of codes that were packed wrongly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import helper

from fluxkiln.compile.onnx.external_data import Sidecar
from fluxkiln.compile.onnx.products import CONTRIB, packed_matmul
from fluxkiln.compile.onnx.session import make_session
from fluxkiln.quantize.pack import dequantize
from fluxkiln.quantize.rounders import pack_sided
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.quantize.side_tensors import SidedWeight
from tests.quantize.weights import gather, make_inputs, make_weight, pack_matrix

SHAPE = (96, 320)
X = make_inputs(16, 320, 3) / 8


def run(folder, build, bias=None):
    """y of a graph that `build(node, sidecar)` makes of one product."""
    inputs = ["x", "w", *(["b"] if bias is not None else [])]
    node = helper.make_node("Gemm" if bias is not None else "MatMul", inputs, ["y"])
    sidecar = Sidecar(folder / "w.bin")
    nodes = build(node, sidecar)
    tensors = list(sidecar.take().values())
    if bias is not None:
        tensors.append(onnx.numpy_helper.from_array(bias, "b"))
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, X.shape)],
        [helper.make_tensor_value_info("y", 1, [len(X), SHAPE[0]])], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    path = folder / "g.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return make_session(path, "test").run(["y"], {"x": X})[0]


def off(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


@pytest.mark.parametrize("name", ["W4BF16", "W4BF16-g32-rtn", "W4BF16-ls-sym", "W8BF16", "W8BF16-ls"])
def test_equals_the_dequantized_product(tmp_path, name):
    scheme, bias = parse_scheme(name), np.arange(SHAPE[0], dtype=np.float32) / 8
    packed = pack_matrix(make_weight("student", SHAPE), scheme)
    exact = X.astype(np.float64) @ dequantize(packed, scheme.group_size).T.astype(np.float64)
    for b in (None, bias):
        made = run(tmp_path, lambda node, sidecar: packed_matmul(node, SidedWeight(packed), scheme, sidecar, "w"), b)
        assert off(made, exact if b is None else exact + b) <= 2e-6


def spoilt(packed):
    codes, scales, zeros = packed.codes_OI, packed.scales_OG.copy(), packed.zeros_OG.copy()
    scales[:, [0, 1]] = scales[:, [1, 0]]
    zeros[:, 0] ^= 1
    return {
        "nibbles": replace(packed, codes_OI=(codes >> 4) | (codes << 4)),
        "zero point": replace(packed, zeros_OG=zeros),
        "scales": replace(packed, scales_OG=scales),
    }


@pytest.mark.parametrize("what", ["nibbles", "zero point", "scales"])
def test_wrong_packing_shows(tmp_path, what):
    """The control, against the gate of 2e-3 between this rung and the dequantized one."""
    weight, scheme = make_weight("channels", SHAPE), parse_scheme("W4BF16")
    packed = pack_matrix(weight, scheme)
    exact = X @ dequantize(packed, 64).T
    wrong = SidedWeight(spoilt(packed)[what])
    assert off(run(tmp_path, lambda node, sidecar: packed_matmul(node, wrong, scheme, sidecar, "w")), exact) > 2e-3


@pytest.mark.parametrize("method", ["awq", "svd"])
def test_products_with_side_tensors(tmp_path, method):
    weight, statistics = make_weight("student", SHAPE), gather(make_inputs(1024, 320, 1), 0)
    scheme, bias = parse_scheme(f"W4BF16-{method}"), np.arange(SHAPE[0], dtype=np.float32) / 8
    made = pack_sided(weight, scheme, statistics)
    exact = X.astype(np.float64) @ made.dequantize(64).T.astype(np.float64)
    for b in (None, bias):
        got = run(tmp_path, lambda node, sidecar: packed_matmul(node, made, scheme, sidecar, "w"), b)
        assert off(got, exact if b is None else exact + b) <= 2e-6
    without = run(tmp_path, lambda node, sidecar: packed_matmul(node, SidedWeight(made.packed), scheme, sidecar, "w"))
    assert off(without, exact) > 0.05
