"""Templates fed with weights: the same numbers as poured files, one part's weights at a time, nothing on disk."""

from __future__ import annotations

import gc
import weakref
from functools import partial

import numpy as np
import onnx
import pytest

from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.onnx.runner import Filling, TemplateRunner, attention_by_heads, weights_as_inputs
from fluxkiln.compile.onnx.session import open_session, run_session
from fluxkiln.errors import CheckpointError, CompileError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.quantize.schemes import parse_scheme
from tests.quantize.weights import stored_as

PARITY = 5e-6
KINDS_OF_ONE_FORM = [kind for kind in KINDS if not kind.endswith(("_modulation", "_modulated", "_embed"))] + [
    "t5_embed"
]


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(
        np.linalg.norm(found[name] - values) / np.linalg.norm(values.astype(np.float64))
        for name, values in expected.items()
    )


@pytest.fixture
def fill(tiny_checkpoint, tiny_template, tiny_parts):
    """(graph format, weights of) -> what fills parts of tiny-dev."""

    def make(graph_format="onnx17", weights_of=None):
        def filling(name):
            part = tiny_parts((weights_of or {}).get(name, name))
            template = tiny_template(part.kind, graph_format)
            return Filling(
                template, weight_reader(bind_part(part, template.slots, tiny_checkpoint()), tiny_checkpoint())
            )

        return filling

    return make


@pytest.mark.parametrize("graph_format", ["onnx17", "onnx23"])
@pytest.mark.parametrize("kind", KINDS_OF_ONE_FORM)
def test_every_kind_equals_the_reference(fill, part_of_kind, kind, graph_format):
    part, recording = part_of_kind(kind)
    run = TemplateRunner(fill(graph_format))
    assert worst(run(part.name, recording.inputs(part.name)), recording.outputs(part.name)) <= PARITY


@pytest.mark.parametrize("scheme", ["W4BF16", "W4BF16-g32", "W8BF16"])
@pytest.mark.parametrize("name", ["double.00", "single.00", "t5_block.01"])
def test_dequantized_weights_equal_the_quantized_graph(fill, link, tiny_recording, name, scheme):
    """Two ways to the same numbers: opset 17 fed with dequantized weights, opset 23 with codes.

    The norm weights of q and k have the softmax scale in them, and the chip rounds their product, the linked graph the
    norm weights alone. Nothing else differs.
    """

    def stored(untouched=()):
        def filling(name):
            made = fill()(name)
            matmuls = weight_matmuls(made.template.path, {spec.name for spec in made.template.inputs})
            quantized = {one.slot for one in matmuls}

            def read(slot):
                weight = made.read_weight(slot)
                if slot.startswith(untouched):
                    return weight
                return stored_as(parse_scheme(scheme), weight, slot in quantized)

            return Filling(made.template, read)

        return TemplateRunner(filling)(name, inputs)

    inputs = tiny_recording().inputs(name)
    linked = run_session(open_session(link(name, scheme)), "linked", inputs)
    assert worst(linked, stored(untouched=("attn.norm_",))) <= PARITY
    assert worst(linked, stored()) <= 1e-3


@pytest.mark.parametrize("graph_format", ["onnx17", "onnx23"])
def test_no_matrix_is_transposed(fill, graph_format):
    """Neither by the graph nor for it: that would take longer than the product."""
    template = fill(graph_format)("double.00").template
    model, transposed = weights_as_inputs(template.path)
    assert transposed == frozenset()
    operations = [node.op_type for node in model.graph.node]
    # q, k, v, out; mlp in and out: both streams; in opset 17 the feed-forward is in halves there
    assert operations.count("FusedMatMul") >= 12
    assert [list(attribute.ints) for node in model.graph.node for attribute in node.attribute
            if node.op_type == "Transpose" and attribute.name == "perm" and len(attribute.ints) == 2] == []  # fmt: skip
    onnx.checker.check_model(model)


def test_a_transposed_matrix_with_another_use_is_fed_as_the_template_has_it(tmp_path):
    from onnx import TensorProto, helper

    from fluxkiln.types import Template, TensorSpec

    shapes = {"x": [1, 4, 3], "w__t": [3, 3], "y": [1, 4, 3]}
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()}
    nodes = [helper.make_node("MatMul", ["x", "w__t"], ["p"]), helper.make_node("Add", ["p", "w__t0"], ["y"])]
    nodes.insert(1, helper.make_node("ReduceSum", ["w__t"], ["w__t0"], keepdims=0))
    graph = helper.make_graph(nodes, "g", [values["x"], values["w__t"]], [values["y"]])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "t.onnx")
    template = Template(
        "k", "onnx17", tmp_path / "t.onnx", "", (TensorSpec("x", (1, 4, 3)),), (TensorSpec("y", (1, 4, 3)),),
        (TensorSpec("w__t", (3, 3)),),
    )  # fmt: skip
    rng = np.random.default_rng(0)
    weight, x = rng.standard_normal((3, 3)).astype(np.float32), rng.standard_normal((1, 4, 3)).astype(np.float32)
    assert weights_as_inputs(template.path)[1] == {"w__t"}
    made = TemplateRunner(lambda _: Filling(template, lambda slot: weight))("p", {"x": x})["y"]
    np.testing.assert_allclose(made, x @ weight.T + weight.sum(), rtol=1e-5)


def test_one_parts_weights_are_in_memory(fill, tiny_recording):
    alive = []
    filling = fill()

    def watched(name):
        made = filling(name)

        def read(slot):
            weight = made.read_weight(slot).astype(np.float32)
            alive.append(weakref.ref(weight))
            return weight

        return Filling(made.template, read)

    def count():
        gc.collect()
        return sum(ref() is not None for ref in alive)

    recording, run = tiny_recording(), TemplateRunner(watched)
    run("single.00", recording.inputs("single.00"))
    first = len(alive)
    assert count() == first
    run("single.00", recording.inputs("single.00", 1))
    assert len(alive) == first, "the weights stay for another call of the same part"
    run("single.01", recording.inputs("single.01"))
    assert len(alive) == 2 * first
    assert count() == first
    run.close()
    assert count() == 0
    assert run("single.01", recording.inputs("single.01")).keys() == {"hidden_states_out"}


def test_the_weights_are_the_parts_own(fill, tiny_recording):
    """A session serves a whole kind, so a part that is given another's weights must show."""
    recording = tiny_recording()
    run = TemplateRunner(fill(weights_of={"single.01": "single.02"}))
    for name, equal in (("single.00", True), ("single.01", False), ("single.02", True)):
        error = worst(run(name, recording.inputs(name)), recording.outputs(name))
        assert (error <= PARITY) == equal, name


def test_a_graph_may_be_rewritten_first(fill, tiny_recording):
    def drop_a_bias(model):
        node = next(node for node in model.graph.node if node.op_type == "Add" and "proj_out" in "".join(node.input))
        node.input[0] = node.input[1]

    recording = tiny_recording()
    run = TemplateRunner(fill(), rewrite=drop_a_bias)
    assert worst(run("tail", recording.inputs("tail")), recording.outputs("tail")) > PARITY


def softmaxes(template, most_scores):
    model, _ = weights_as_inputs(template.path)
    attention_by_heads(model, most_scores)
    return sum(node.op_type == "Softmax" for node in model.graph.node)


@pytest.mark.parametrize("name", ["single.00", "double.01"])
def test_attention_by_heads_computes_the_same(fill, tiny_recording, name):
    """2 heads, 48 tokens: 4608 scores."""
    recording, template = tiny_recording(), fill()(name).template
    assert [softmaxes(template, most) for most in (4608, 4607, 2304, 1)] == [1, 2, 2, 2]
    whole, grouped = TemplateRunner(fill()), TemplateRunner(fill(), rewrite=partial(attention_by_heads, most_scores=1))
    expected, found = (run(name, recording.inputs(name)) for run in (whole, grouped))
    assert worst(found, expected) <= 1e-6


def test_attention_that_is_something_else_is_left_alone(fill):
    """T5 adds its position bias to the scores; a decoder has one head and three axes."""
    assert softmaxes(fill()("t5_block.00").template, 1) == 1
    assert softmaxes(fill()("vae_decoder").template, 1) == 1


def test_wrong_requests_are_refused(fill, tiny_recording, tiny_checkpoint):
    recording = tiny_recording()
    inputs = recording.inputs("tail")
    run = TemplateRunner(fill())
    with pytest.raises(CompileError, match="part tail takes hidden_states, temb: temb is missing or one too many"):
        run("tail", {"hidden_states": inputs["hidden_states"]})
    with pytest.raises(CompileError, match=r"input hidden_states has shape \[1, 8, 256\]"):
        run("tail", {**inputs, "hidden_states": inputs["hidden_states"][:, :8]})

    def narrow(name):
        made = fill()(name)
        return Filling(made.template, lambda slot: made.read_weight(slot)[:1])

    with pytest.raises(CompileError, match=r"slot .* of part tail takes"):
        TemplateRunner(narrow)("tail", inputs)

    def missing(name):
        raise CheckpointError(f"no tensors of {name}")

    with pytest.raises(CheckpointError, match="no tensors of tail"):
        TemplateRunner(missing)("tail", inputs)
