"""Products in ranges of rows: the same bits, less float32 at once, and nothing rewritten that is something else."""

from __future__ import annotations

from itertools import pairwise

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from fluxkiln.compile.onnx.external_data import Sidecar, external_range
from fluxkiln.compile.onnx.products import CONTRIB, RANGE_BYTES, split_products
from fluxkiln.compile.onnx.session import make_session, open_session
from fluxkiln.errors import IntegrityError

ROWS, WIDTH, TOKENS = 640, 96, 5
RANGE = 4 * WIDTH * 128
RNG = np.random.default_rng(5)
WEIGHT = RNG.standard_normal((ROWS, WIDTH)).astype(ml_dtypes.bfloat16)
BIAS = RNG.standard_normal(ROWS).astype(np.float32)


def bounds(start, stop, axis):
    return [from_array(np.array([number]), name) for name, number in zip("abcd", (start, stop, axis, 1), strict=True)]


def build(folder, nodes, x_shape, y_shape, constants=(), weight=WEIGHT):
    sidecar = Sidecar(folder / "weights.bin")
    sidecar.append("pad", np.zeros(7, np.float32))  # so that no offset is 0
    sidecar.append("w", weight)
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
        [*constants, sidecar.take()["w"]],
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=11)


def cast(source="w"):
    return helper.make_node("Cast", [source], ["wide"], to=TensorProto.FLOAT)


def product(inputs=("x", "wide"), **attributes):
    return helper.make_node("FusedMatMul", inputs, ["y"], domain=CONTRIB, **{"transB": 1, **attributes})


def run(model, folder, x):
    session = make_session(model.SerializeToString(), "test", threads=1, weights=folder)
    return session.run(["y"], {"x": x})[0]


def both(model, folder, x):
    """Outputs as it was and split, and how many were split."""
    before = run(model, folder, x)
    count = split_products(model, RANGE)
    return before, run(model, folder, x), count


def operations(model):
    return [node.op_type for node in model.graph.node]


def largest_range(model):
    return max(tensor.dims[0] for tensor in model.graph.initializer if tensor.name.startswith("w"))


def test_a_product_is_the_same_bits_in_ranges(tmp_path):
    x = RNG.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    model = build(tmp_path, [cast(), product()], x.shape, [1, TOKENS, ROWS])
    before, after, count = both(model, tmp_path, x)
    assert (count, operations(model)) == (1, ["Cast", "FusedMatMul"] * 5 + ["Concat"])
    assert largest_range(model) == 128
    assert np.array_equal(before, after)
    assert np.abs(before[0] - x[0] @ WEIGHT.astype(np.float32).T).max() < 1e-4


@pytest.mark.parametrize(("start", "stop", "axis"), [(64, 600, 0), (16, 80, 1)])
def test_a_cut_weight_too(tmp_path, start, stop, axis):
    width = WIDTH if axis == 0 else stop - start
    rows = stop - start if axis == 0 else ROWS
    nodes = [helper.make_node("Slice", ["w", *"abcd"], ["cut"]), cast("cut"), product()]
    x = RNG.standard_normal((1, TOKENS, width)).astype(np.float32)
    model = build(tmp_path, nodes, x.shape, [1, TOKENS, rows], bounds(start, stop, axis))
    before, after, count = both(model, tmp_path, x)
    assert count == 1
    assert largest_range(model) < rows
    assert operations(model).count("Slice") == (0 if axis == 0 else 4)
    assert np.array_equal(before, after)
    cut = WEIGHT.astype(np.float32)[
        (slice(start, stop), slice(None)) if axis == 0 else (slice(None), slice(start, stop))
    ]
    assert np.abs(after[0] - x[0] @ cut.T).max() < 1e-4


def test_a_gemm_keeps_its_bias(tmp_path):
    node = helper.make_node("Gemm", ["x", "wide", "b"], ["y"], transB=1, alpha=1.0, beta=1.0)
    x = RNG.standard_normal((TOKENS, WIDTH)).astype(np.float32)
    model = build(tmp_path, [cast(), node], x.shape, [TOKENS, ROWS], [from_array(BIAS, "b")])
    before, after, count = both(model, tmp_path, x)
    assert count == 1
    assert np.linalg.norm(after - before) / np.linalg.norm(before) <= 5e-7
    assert np.abs(after - (x @ WEIGHT.astype(np.float32).T + BIAS)).max() < 1e-4


def test_a_range_one_row_off_is_seen(tmp_path):
    """Negative control: the comparison above would notice a wrong place."""
    x = RNG.standard_normal((1, TOKENS, WIDTH)).astype(np.float32)
    model = build(tmp_path, [cast(), product()], x.shape, [1, TOKENS, ROWS])
    before = run(model, tmp_path, x)
    split_products(model, RANGE)
    moved = next(tensor for tensor in model.graph.initializer if tensor.name == "w__128_256")
    for entry in moved.external_data:
        if entry.key == "offset":
            entry.value = str(int(entry.value) + 2 * WIDTH)
    assert not np.array_equal(before, run(model, tmp_path, x))


def test_ranges_cover_the_rows_once(tmp_path):
    model = build(tmp_path, [cast(), product()], [1, TOKENS, WIDTH], [1, TOKENS, ROWS])
    _, offset, length = external_range(model.graph.initializer[0])
    split_products(model, RANGE)
    places = sorted(external_range(tensor)[1:] for tensor in model.graph.initializer)
    assert places[0][0] == offset
    assert sum(size for _, size in places) == length
    assert all(first + size == second for (first, size), (second, _) in pairwise(places))


@pytest.mark.parametrize(
    ("nodes", "tokens"),
    [
        ([cast(), product()], WIDTH),  # its results are larger than its weight
        ([cast(), product(alpha=2.0)], TOKENS),
        ([cast(), product(transB=0)], TOKENS),
        ([cast(), helper.make_node("Relu", ["wide"], ["other"]), product()], TOKENS),  # somebody else reads it
        ([helper.make_node("Neg", ["w"], ["n"]), cast("n"), product()], TOKENS),
        ([product(("x", "w"))], TOKENS),
    ],
)
def test_what_is_something_else_stays(tmp_path, nodes, tokens):
    model = build(tmp_path, nodes, [1, tokens, WIDTH], [1, tokens, ROWS])
    before = model.SerializeToString(deterministic=True)
    assert split_products(model, RANGE) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_small_weights_and_weights_in_the_graph_stay(tmp_path):
    model = build(tmp_path, [cast(), product()], [1, TOKENS, WIDTH], [1, TOKENS, ROWS])
    assert split_products(model, 4 * ROWS * WIDTH) == 0
    inline = helper.make_tensor("w", TensorProto.BFLOAT16, WEIGHT.shape, WEIGHT.tobytes(), raw=True)
    model.graph.initializer[0].CopyFrom(inline)
    assert split_products(model, RANGE) == 0


def test_sessions_split_by_themselves_and_still_name_a_short_file(tmp_path):
    rows, width = 1088, RANGE_BYTES // 4096
    weight = np.zeros((rows, width), ml_dtypes.bfloat16)
    weight[np.arange(rows), np.arange(rows)] = 1 + np.arange(rows) % 7
    model = build(tmp_path, [cast(), product()], [1, 2, width], [1, 2, rows], weight=weight)
    graph = tmp_path / "part.onnx"
    onnx.save(model, graph)
    assert split_products(model) == 1
    x = RNG.standard_normal((1, 2, width)).astype(np.float32)
    found = open_session(graph, threads=1).run(["y"], {"x": x})[0]
    assert np.array_equal(found[0], x[0, :, :rows] * (1 + np.arange(rows, dtype=np.float32) % 7))
    file = tmp_path / "weights.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(IntegrityError, match=r"weights\.bin has \d+ bytes, part\.onnx reads"):
        open_session(graph)
