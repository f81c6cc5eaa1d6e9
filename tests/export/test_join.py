"""Feed-forwards that a template has in halves, in one piece: the same numbers from fewer products."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fluxkiln.export.join import join_halves
from fluxkiln.export.trace import export_template
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.types import Shapes

SHAPES = Shapes(height=32, width=32, tokens=16)


def fill(template, weights=None):
    """Random weights; of a joined template those of the halves, one behind the other."""
    rng, made = np.random.default_rng(0), {}
    for spec in template.slots:
        found = re.fullmatch(r"(.+__s[01]\.)(\d+)\.(\d+)(.*)", spec.name)
        if weights is None:
            made[spec.name] = (0.1 * rng.standard_normal(spec.shape)).astype(np.float32)
        elif spec.name in weights:
            made[spec.name] = weights[spec.name]
        else:
            base, start, stop, rest = found.groups()
            half = (int(start) + int(stop)) // 2
            parts = [weights[f"{base}{first}.{last}{rest}"] for first, last in ((start, half), (half, stop))]
            axis = int(np.argmax(np.array(spec.shape) - parts[0].shape))
            made[spec.name] = np.concatenate(parts, axis)
    return made


@pytest.mark.parametrize(("kind", "feed_forwards"), [("single_modulated", 1), ("double_modulated", 2)])
def test_one_piece_computes_what_two_halves_do(tiny_checkpoint, tmp_path, kind, feed_forwards):
    import onnx
    import onnxruntime

    template = export_template(MODEL, kind, tiny_checkpoint().configs, SHAPES, "onnx17", tmp_path)
    joined = join_halves(template, tmp_path / "joined.onnx")
    products = [sum(node.op_type == "MatMul" for node in onnx.load(one.path).graph.node) for one in (template, joined)]
    assert products[0] - products[1] == 2 * feed_forwards
    assert len(template.slots) - len(joined.slots) == 3 * feed_forwards
    rng = np.random.default_rng(1)
    inputs = {spec.name: rng.standard_normal(spec.shape).astype(np.float32) for spec in template.inputs}
    weights = fill(template)
    halves = onnxruntime.InferenceSession(template.path).run(None, inputs | weights)
    whole = onnxruntime.InferenceSession(joined.path).run(None, inputs | fill(joined, weights))
    for one, other in zip(halves, whole, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * np.abs(one).max())


def test_a_template_without_halves_stays_as_it_is(tiny_checkpoint, tmp_path):
    template = export_template(MODEL, "token_embed", tiny_checkpoint().configs, SHAPES, "onnx17", tmp_path)
    assert join_halves(template, tmp_path / "joined.onnx").slots == template.slots
