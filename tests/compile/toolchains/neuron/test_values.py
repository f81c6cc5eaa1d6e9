"""Values inside lowered modules: which there are, what they are, and what their operations make of others."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile.toolchains.neuron.hlo_module import ELEMENTS, parse_module
from fluxkiln.compile.toolchains.neuron.values import list_values, recompute_values, show_values, widen
from fluxkiln.errors import CompileError

pytest.importorskip("jax")


@pytest.fixture
def names(lower_block):
    """The names of the block's parameters: its input, its weights."""
    return ["x"], [spec.name for spec in lower_block(2)[0].parameters[1:]]


def run(process, proto, arguments):
    return process.run(process.load(proto), arguments)


def narrow(arguments):
    return [[array.astype(ml_dtypes.bfloat16) for array in rank] for rank in arguments]


def test_operations_and_what_they_read(lower_block, names):
    found = {operation.output: operation for operation in list_values(lower_block(2)[1], *names)}
    products = [operation for operation in found.values() if operation.op_type == "dot"]
    weights = [slot for operation in products for slot in operation.slots]
    assert weights == ["qkv.weight", "out.weight", "up.weight", "down.weight", "gate.weight"]
    reduced = [operation for operation in found.values() if operation.op_type == "all-reduce"]
    assert [found[operation.inputs[0]].slots for operation in reduced] == [("out.weight",), ("down.weight",)]
    assert {name for operation in found.values() for name in operation.inputs} <= {"x", *found}
    assert not any(name.startswith(("reshape", "parameter", "broadcast")) for name in found)


def test_values_are_shown_in_order(lower_block, names, replicas, block_arguments):
    proto, arguments = lower_block(2)[1], block_arguments(2)
    order = [operation.output for operation in list_values(proto, *names)]
    shown = run(replicas(2), show_values(proto, order), arguments)
    up = [operation for operation in list_values(proto, *names) if "up.weight" in operation.slots]
    (first,) = [operation for operation in list_values(proto, *names) if "norm.bias" in operation.slots]
    normed = shown[0][order.index(first.output)]
    x = arguments[0][0].astype(np.float64)
    standard = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    weight, bias = (dict(zip(names[1], arguments[0][1:], strict=True))[f"norm.{name}"] for name in ("weight", "bias"))
    np.testing.assert_allclose(normed, standard * weight + bias, atol=1e-5)
    assert len({rank[order.index(up[0].output)].tobytes() for rank in shown}) == 2, "each rank has columns of its own"
    again = run(replicas(2), show_values(proto, order[::-1]), arguments)
    assert [array.tobytes() for array in again[1]] == [array.tobytes() for array in shown[1][::-1]]


def test_widened_it_has_no_bfloat16_left_and_computes_in_float32(lower_block, names, replicas, block_arguments):
    proto = lower_block(2, "bfloat16")[1]
    wide = parse_module(widen(proto))
    kinds = {
        ELEMENTS[instruction.shape.element_type][0]
        for computation in wide.computations
        for instruction in computation.instructions
        if instruction.opcode != "constant"
    }
    assert "f32" in kinds
    assert "bf16" not in kinds
    arguments = block_arguments(2)
    found = run(replicas(2), widen(proto), arguments)
    for one, other in zip(found, run(replicas(2), lower_block(2)[1], arguments), strict=True):
        for a, b in zip(one, other, strict=True):
            assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-3, "constants of the module are bfloat16 still"


def test_an_error_that_came_along_is_not_the_operation_s_own(lower_block, names, replicas, block_arguments):
    proto, arguments = lower_block(2)[1], block_arguments(2)
    order = [operation.output for operation in list_values(proto, *names)]
    seen = run(replicas(2), show_values(proto, order), arguments)
    local = recompute_values(proto, order)
    same = run(replicas(2), local, [[*own, *values] for own, values in zip(arguments, seen, strict=True)])
    for one, other in zip(same, seen, strict=True):
        for name, a, b in zip(order, one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5, err_msg=name)
    spoilt = order.index(next(o.output for o in list_values(proto, *names) if "up.weight" in o.slots))
    changed = [[array * (1 + (place == spoilt)) for place, array in enumerate(rank)] for rank in seen]
    made = run(replicas(2), local, [[*own, *values] for own, values in zip(arguments, changed, strict=True)])
    differing = [
        name
        for name, a, b in zip(order, made[0], changed[0], strict=True)
        if not np.allclose(a, b, rtol=1e-3, atol=1e-4)
    ]
    # it is not what its operands give, and who reads it gives something else than was seen
    readers = [o.output for o in list_values(proto, *names) if order[spoilt] in o.inputs]
    assert set(differing) == {order[spoilt], *readers}


def test_what_is_no_module_is_refused():
    with pytest.raises(CompileError):
        list_values(b"no module", ["x"], [])
