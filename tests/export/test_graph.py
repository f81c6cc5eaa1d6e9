from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fluxkiln.errors import ExportError
from fluxkiln.export.graph import MAX_CONSTANT_BYTES, check_template, finish_graph, slot_transforms
from fluxkiln.types import TensorSpec, Transform

X, Y = TensorSpec("x", (1, 8)), TensorSpec("y", (1, 4))


def build(nodes, slots, constants=(), out=(1, 4)):
    """A graph of x [1, 8] and slots to y."""
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in slots.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, out)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants]
    graph = helper.make_graph(nodes, "g", inputs, [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(model))


def test_transposes_slices_and_factors_become_slots():
    model = build(
        [
            helper.make_node("Slice", ["w", "start", "stop", "axis"], ["part"]),
            helper.make_node("Mul", ["part", "half"], ["scaled"]),
            helper.make_node("Transpose", ["scaled"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["y"]),
        ],
        {"w": [4, 16]},
        [("start", np.int64([-8])), ("stop", np.int64([99])), ("axis", np.int64([1])), ("half", np.float32(0.5))],
    )
    (slot,) = finish_graph(model, (X,), (Y,))
    assert slot == TensorSpec("w__s1.8.16__f0x1_0000000000000p-1__t", (8, 4))
    assert [node.op_type for node in model.graph] == ["MatMul"]
    base, transforms = slot_transforms(slot.name)
    assert base == "w"
    assert transforms == (
        Transform("slice", dim=1, start=8, stop=16), Transform("scale", factor=0.5), Transform("transpose"),
    )  # fmt: skip
    check_template(model, 17, (X,), (slot,), (Y,))


def test_a_slot_used_twice_stays_beside_its_transpose():
    model = build(
        [
            helper.make_node("Transpose", ["w"], ["turned"], perm=[1, 0]),
            helper.make_node("MatMul", ["x", "turned"], ["a"]),
            helper.make_node("ReduceSum", ["w", "axis"], ["b"], keepdims=0),
            helper.make_node("Add", ["a", "b"], ["y"]),
        ],
        {"w": [4, 8]},
        [("axis", np.int64([1]))],
    )
    assert {spec.name: spec.shape for spec in finish_graph(model, (X,), (Y,))} == {"w": (4, 8), "w__t": (8, 4)}


def test_activations_are_left_alone():
    model = build(
        [
            helper.make_node("Mul", ["x", "two"], ["double"]),
            helper.make_node("MatMul", ["double", "w"], ["y"]),
        ],
        {"w": [8, 4]},
        [("two", np.float32(2))],
    )
    assert [spec.name for spec in finish_graph(model, (X,), (Y,))] == ["w"]
    assert [node.op_type for node in model.graph] == ["Mul", "MatMul"]


def test_slot_names_there_and_back():
    assert slot_transforms("ff.net.0.proj.weight") == ("ff.net.0.proj.weight", ())
    assert slot_transforms("w__s0.3.7") == ("w", (Transform("slice", dim=0, start=3, stop=7),))
    factor = slot_transforms("w__f" + (0.1).hex().replace(".", "_"))[1][0].factor
    assert factor == 0.1
    with pytest.raises(ExportError, match=r"slot 'w__q': 'q' is no transform"):
        slot_transforms("w__q")


def test_templates_that_are_not_what_they_must_be_are_refused():
    model = build([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": [8, 4]})
    slot = TensorSpec("w", (8, 4))
    check_template(model, 17, (X,), (slot,), (Y,))
    with pytest.raises(ExportError, match="wrote opset 17, opset 23 was asked for"):
        check_template(model, 23, (X,), (slot,), (Y,))
    with pytest.raises(ExportError, match="inputs differ from what the part declares: w"):
        check_template(model, 17, (X,), (), (Y,))
    with pytest.raises(ExportError, match="their order"):
        check_template(model, 17, (slot,), (X,), (Y,))
    with pytest.raises(ExportError, match="outputs are"):
        check_template(model, 17, (X,), (slot,), (X,))


def test_weight_data_in_a_template_is_refused():
    big = np.ones((8, MAX_CONSTANT_BYTES // 32 + 1), np.float32)
    nodes = [helper.make_node("MatMul", ["x", "big"], ["y"])]
    model = build(nodes, {}, [("big", big)], out=(1, big.shape[1]))
    with pytest.raises(ExportError, match=r"constant big has \d+ bytes: a template holds no weight data"):
        check_template(model, 17, (X,), (), (Y,))
