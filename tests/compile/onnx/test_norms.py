"""Group norms by rows: what they compute, at any size, with ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fluxkiln.compile.onnx.norms import precise_group_norms
from fluxkiln.compile.onnx.session import make_session

CHANNELS, GROUPS, EPSILON = 8, 2, 1e-6
# float32 rounds to 6e-8; norms that add up in one sum are off by more than ten times this from 512x512 on
MOST = 5e-7


@pytest.fixture
def make():
    rng = np.random.default_rng(0)

    def make(shape):
        scale, bias = (rng.standard_normal(CHANNELS).astype(np.float32) for _ in range(2))
        made = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=GROUPS, epsilon=EPSILON)
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in "xy"]
        weights = [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(bias, "bias")]
        graph = helper.make_graph([made], "norm", values[:1], values[1:], weights)
        x = (rng.standard_normal(shape) + 0.7).astype(np.float32)
        exact = torch.nn.functional.group_norm(
            *(
                torch.from_numpy(one).double() if isinstance(one, np.ndarray) else one
                for one in (x, GROUPS, scale, bias)
            ),
            eps=EPSILON,
        ).numpy()
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), x, exact

    return make


def error_of(model, x, exact):
    (made,) = make_session(model.SerializeToString(), "norm", threads=1).run(None, {"x": x})
    return np.linalg.norm(made - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize(
    "shape", [(1, CHANNELS, 6, 10), (2, CHANNELS, 5, 7), (1, CHANNELS, 4096), (1, CHANNELS, 512, 512)]
)
def test_norms_by_rows_are_exact_to_the_rounding(make, shape):
    model, *data = make(shape)
    before = error_of(model, *data)
    precise_group_norms(model)
    assert "GroupNormalization" not in {node.op_type for node in model.graph.node}
    assert error_of(model, *data) < MOST
    if shape[-1] == 512:
        assert before > 10 * MOST, "ONNX Runtime's own are as good now: nothing has to be put in their place"


def test_what_is_added_does_not_know_the_size(make):
    """A graph of a further size has the constants of the first one."""
    small, large = make((1, CHANNELS, 6, 10))[0], make((1, CHANNELS, 12, 4))[0]
    for model in (small, large):
        precise_group_norms(model)
    assert list(small.graph.node) == list(large.graph.node)
    names = {node.name for model in (small, large) for node in model.graph.initializer} - {"scale", "bias"}
    tensors = [{one.name: one for one in model.graph.initializer if one.name in names} for model in (small, large)]
    assert tensors[0] == tensors[1]
