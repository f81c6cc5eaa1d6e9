"""Values on the way through templates and linked graphs."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.compile.onnx.values import (
    SlotWeights,
    graph_values,
    list_operations,
    local_values,
    quantized_regions,
    template_values,
)
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import probe_reader


@pytest.fixture(scope="module")
def tail(tiny_template):
    template = tiny_template("tail", "onnx17")
    slots = [spec.name for spec in template.slots]
    weights = SlotWeights(slots, probe_reader(template.slots, 0))
    random = np.random.default_rng(1)
    inputs = {spec.name: random.standard_normal(spec.shape).astype(np.float32) for spec in template.inputs}
    operations = list_operations(template.path, slots)
    values = template_values(template.path, inputs, weights, [one.output for one in operations])
    return template, inputs, weights, operations, values


def test_operations_in_order_with_what_they_read(tail):
    _, inputs, weights, operations, _ = tail
    known = set(inputs)
    for operation in operations:
        assert known >= set(operation.inputs)
        known.add(operation.output)
    assert {slot for operation in operations for slot in operation.slots} == set(weights)
    assert [one.epsilon for one in operations if one.op_type == "LayerNormalization"] == [pytest.approx(1e-6)]


def test_slots_behind_a_transpose_belong_to_the_product(tiny_template):
    template = tiny_template("tail", "onnx23")
    slots = [spec.name for spec in template.slots]
    operations = list_operations(template.path, slots)
    assert {slot for operation in operations for slot in operation.slots} == set(slots)
    assert "Transpose" not in {operation.op_type for operation in operations if operation.slots}


def test_a_value_is_what_the_graph_says(tail):
    _, inputs, weights, operations, values = tail
    temb = inputs["temb"].astype(np.float64)
    (gemm,) = (one for one in operations if one.op_type == "Gemm")
    weight, bias = (weights[slot].astype(np.float64) for slot in gemm.slots)
    np.testing.assert_allclose(values[gemm.output], temb / (1 + np.exp(-temb)) @ weight.T + bias, rtol=1e-4, atol=1e-5)


def test_local_values_are_those_of_the_operands_that_were_seen(tail):
    template, inputs, weights, operations, values = tail
    equal = local_values(template.path, {**inputs, **values}, weights)
    assert set(equal) == set(values)
    assert all(np.allclose(equal[name], values[name], rtol=1e-5, atol=1e-6) for name in values)
    norm = next(one for one in operations if one.op_type == "LayerNormalization")
    reader = next(one for one in operations if norm.output in one.inputs)
    spoilt = {**inputs, **values, norm.output: values[norm.output] * 2}
    local = local_values(template.path, spoilt, weights)
    assert np.allclose(local[norm.output], values[norm.output]), "the operation itself is sound"
    assert not np.allclose(local[reader.output], values[reader.output])


def test_some_local_values_need_their_own_weights_only(tail):
    template, inputs, weights, operations, values = tail
    (gemm,) = (one for one in operations if one.op_type == "Gemm")
    read = []

    class Watched(SlotWeights):
        def __getitem__(self, slot):
            read.append(slot)
            return super().__getitem__(slot)

    watched = Watched(tuple(weights), weights.__getitem__)
    local = local_values(template.path, {**inputs, **values}, watched, [gemm.output])
    assert list(local) == [gemm.output]
    np.testing.assert_allclose(local[gemm.output], values[gemm.output], rtol=1e-5, atol=1e-6)
    assert sorted(read) == sorted(gemm.slots)
    assert len(gemm.slots) < len(weights)
    assert local_values(template.path, {**inputs, **values}, watched, ["unknown"]) == {}


def test_weights_are_read_when_they_are_asked_for():
    calls = []

    def read(slot):
        calls.append(slot)
        return np.arange(6.0).reshape(2, 3)

    weights = SlotWeights(("a", "b__t"), read)
    assert (list(weights), len(weights), calls) == (["a", "b__t"], 2, [])
    shapes = [weights[slot].shape for slot in weights]
    assert shapes == [(2, 3), (3, 2)]
    assert calls == ["a", "b__t"]
    assert weights["a"].dtype == np.float32
    with pytest.raises(KeyError):
        weights["c"]


def test_local_values_go_through_what_was_not_seen(tail):
    template, inputs, weights, operations, values = tail
    last = operations[-1].output
    local = local_values(template.path, {**inputs, last: values[last] + 1}, weights)
    assert list(local) == [last]
    np.testing.assert_allclose(local[last], values[last], rtol=1e-4, atol=1e-5)


def test_values_of_a_linked_graph(link, tiny_checkpoint, tiny_template, tiny_parts):
    from fluxkiln.export.bindings import bind_part, weight_reader

    graph = link("tail")
    template = tiny_template("tail", "onnx23")
    slots = [spec.name for spec in template.slots]
    reader = weight_reader(bind_part(tiny_parts("tail"), template.slots, tiny_checkpoint()), tiny_checkpoint())
    inputs = {spec.name: np.ones(spec.shape, np.float32) for spec in template.inputs}
    names = [one.output for one in list_operations(template.path, slots)]
    seen = graph_values(graph, inputs, names)
    wanted = template_values(template.path, inputs, SlotWeights(slots, reader), names)
    assert len(seen) > 5
    assert all(np.allclose(seen[name], wanted[name], rtol=1e-4, atol=1e-5) for name in seen)
    assert sorted(path.name for path in graph.parent.glob("*.onnx")) == ["tail.onnx"], "nothing is left behind"


def test_products_of_a_linked_graph(tiny_template):
    template = tiny_template("single", "onnx23")
    regions = quantized_regions(template.path, [spec.name for spec in template.slots])
    assert "attn.to_q.weight" in regions
    assert sum(map(len, regions.values())) > len(regions), "a weight cut in several products"
