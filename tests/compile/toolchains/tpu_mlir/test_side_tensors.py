"""Rewritten templates: they compute what the method says, share what has one input, and keep the template's names."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.onnx.session import make_session
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import probe_reader
from fluxkiln.compile.toolchains.tpu_mlir.graphs import add_side_tensors
from fluxkiln.errors import SchemeError
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.quantize.side_tensors import DOWN, RECIPROCALS, UP, side_slot


def run(path, inputs, weights):
    """The outputs of a template whose slots are inputs, its weights in torch's layout."""
    session = make_session(path, "test", threads=1)
    feeds = {name: np.asarray(value) for name, value in inputs.items()}
    for value in session.get_inputs():
        if value.name not in feeds:
            weight = weights(value.name).astype(np.float32)
            feeds[value.name] = np.ascontiguousarray(weight.T if value.name.endswith("__t") else weight)
    return dict(zip((value.name for value in session.get_outputs()), session.run(None, feeds), strict=True))


@pytest.mark.parametrize("kind", ["single", "double"])
@pytest.mark.parametrize("name", ["W4BF16-svd-r8", "W4BF16-awq", "W4BF16-awq-bf16:attn.to_q"])
def test_it_computes_what_the_method_says(kind, name, tiny_template, tmp_path):
    """With S = W - up down, or W / reciprocals, it is the template with W; with another S it is not."""
    scheme, template = parse_scheme(name), tiny_template(kind, "onnx17")
    made = add_side_tensors(template, scheme, tmp_path / "corrected.onnx")
    onnx.checker.check_model(onnx.load(made.path))
    assert made.slots[: len(template.slots)] == template.slots
    assert (made.inputs, made.outputs, made.kind) == (template.inputs, template.outputs, template.kind)
    plain = probe_reader(made.slots)
    activations = {spec.name for spec in template.inputs}
    matmuls = [one for one in weight_matmuls(template.path, activations) if scheme.in_codes(one.slot)]
    shared = {one.source: next(two.slot for two in matmuls if two.source == one.source) for one in matmuls}

    def weights(slot, wrong=False):
        found = [one for one in matmuls if one.slot == slot]
        if not found or wrong:
            return plain(slot)
        weight = plain(slot).astype(np.float32)
        if scheme.method == "awq":
            return weight / plain(side_slot(shared[found[0].source], RECIPROCALS)).astype(np.float32)
        down, up = side_slot(slot, DOWN), side_slot(slot, UP)
        return weight - plain(up).astype(np.float32) @ plain(down).astype(np.float32)

    random = np.random.default_rng(0)
    inputs = {spec.name: random.standard_normal(spec.shape).astype(np.float32) for spec in template.inputs}
    expected = run(template.path, inputs, plain)
    actual = run(made.path, inputs, weights)
    wrong = run(made.path, inputs, lambda slot: weights(slot, wrong=True))
    for output, value in expected.items():
        scale = np.abs(value).max()
        assert np.abs(actual[output] - value).max() <= 1e-4 * scale
        assert np.abs(wrong[output] - value).max() > 1e-2 * scale
    added = len(made.slots) - len(template.slots)
    assert added == (2 * len(matmuls) if scheme.method == "svd" else len(shared)) > 0
    assert len(shared) < len(matmuls)
    # what is found by name elsewhere is still called the same
    names = {output for node in onnx.load(made.path).graph.node for output in node.output}
    assert {one.output for one in matmuls} <= names


def test_a_rank_that_a_weight_does_not_have(tiny_template, tmp_path):
    with pytest.raises(SchemeError, match=r"rank 500: .* of \d+ x \d+ has 1 to"):
        add_side_tensors(tiny_template("single", "onnx17"), parse_scheme("W4BF16-svd-r500"), tmp_path / "c.onnx")
