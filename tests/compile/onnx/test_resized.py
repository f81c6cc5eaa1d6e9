"""A graph at another size is what linking it afresh gives, on the same bytes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest

from fluxkiln.compile.onnx.link import link_weights
from fluxkiln.compile.onnx.resized import resize_graph
from fluxkiln.compile.onnx.session import open_session, run_session
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.weights import part_packers
from fluxkiln.errors import CompileError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.types import Shapes, find_part

OTHER = Shapes(height=48, width=80, tokens=24)


def linked(build, shapes, name, target):
    plan = replace(build.plan, shapes=shapes)
    part = find_part(plan.parts, name)
    template = make_template(build.checkpoint, plan, build.cache, part.kind, "onnx23")
    binding = bind_part(part, template.slots, build.checkpoint)
    reader = weight_reader(binding, build.checkpoint)
    packer_of = part_packers(build.checkpoint, plan, build.cache, part, "onnx23")
    return template, link_weights(template, binding, {}, reader, plan.scheme(part), target, packer_of)


def test_resizing_is_linking_without_reading(small_build, tmp_path):
    build = small_build(target="cpu")
    own, first = linked(build, build.plan.shapes, "double.01", tmp_path / "double.onnx")
    (tmp_path / "fresh").mkdir()
    other, fresh = linked(build, OTHER, "double.01", tmp_path / "fresh" / "double.onnx")
    made = resize_graph(first, own.path, other.path, tmp_path / "double@other.onnx")
    random = np.random.default_rng(0)
    inputs = {spec.name: random.standard_normal(spec.shape).astype(np.float32) for spec in other.inputs}
    results = [run_session(open_session(graph), "double.01", inputs) for graph in (made, fresh)]
    for name, array in results[1].items():
        np.testing.assert_array_equal(results[0][name], array)
    ranges = [
        {
            tensor.name: str(tensor.external_data)
            for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        }
        for graph in (first, made)
    ]
    shared = {name: place for name, place in ranges[0].items() if place != "[]"}
    assert shared
    assert shared == {name: place for name, place in ranges[1].items() if place != "[]"}


def test_another_kind_is_not_another_size(small_build, tmp_path):
    build = small_build(target="cpu")
    own, first = linked(build, build.plan.shapes, "double.01", tmp_path / "double.onnx")
    other = make_template(build.checkpoint, replace(build.plan, shapes=OTHER), build.cache, "single", "onnx23")
    with pytest.raises(CompileError, match="other operations than at the first"):
        resize_graph(first, own.path, other.path, tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()
