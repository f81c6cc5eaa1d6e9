"""A module's output put together from what ranks have, on arrays whose parts are known."""

from __future__ import annotations

import numpy as np
import pytest
from fluxkiln.verify.debug.bisect import Tolerance
from fluxkiln.verify.debug.split_match import added_on_every_rank, match_split

from fluxkiln.compile.onnx.values import Operation
from fluxkiln.export.leaves import Leaf

RANKS = 2
BOUNDS = Tolerance(1e-5, 1e-4, 1e-5)


def operation(output, op_type, inputs, *slots):
    return Operation(output, op_type, inputs, slots, None)


@pytest.fixture
def numbers():
    random = np.random.default_rng(0)
    return lambda *shape: random.standard_normal(shape).astype(np.float32)


def found(operations, whole, ranks, name="ff.net.2", kind="double", results=None):
    return match_split([Leaf(name, "Linear", whole, None)], operations, ranks, kind, BOUNDS, results or {})


def test_columns_of_ranks_lie_side_by_side(numbers):
    whole = numbers(1, 5, 8)
    operations = [operation("dot", "dot", ("x",), "attn.to_q.weight")]
    ranks = [{"dot": piece} for piece in np.split(whole, RANKS, axis=2)]
    (sound,) = found(operations, whole, ranks, "attn.to_q")
    assert (sound.value, sound.missed, sound.own) == ("dot", "", 0.0)
    (swapped,) = found(operations, whole, ranks[::-1], "attn.to_q")
    assert swapped.missed == "own"


def test_heads_beyond_the_model_s_are_padding(numbers):
    whole = numbers(1, 5, 3, 4)
    padded = np.concatenate([whole, np.zeros((1, 5, 1, 4), np.float32)], axis=2)
    operations = [operation("norm", "multiply", ("q",), "attn.norm_q.weight")]
    (sound,) = found(operations, whole, [{"norm": piece} for piece in np.split(padded, RANKS, axis=2)], "attn.norm_q")
    assert sound.missed == ""


@pytest.mark.parametrize("on_every_rank", [False, True])
def test_partial_sums_are_added_with_the_bias_that_they_have(numbers, on_every_rank):
    """Before the reduction, whatever the reduction then does to two linears at once."""
    parts, bias = [numbers(1, 5, 8) for _ in range(RANKS)], numbers(8)
    whole = sum(parts) + bias
    operations = [
        operation("dot", "dot", ("x",), "ff.net.2.weight"),
        operation("add", "add", ("dot",), "ff.net.2.bias"),
        operation("sum", "all-reduce", ("add",)),
    ]
    ranks = [{"dot": part, "add": part + bias * (on_every_rank or not rank)} for rank, part in enumerate(parts)]
    (finding,) = found(operations, whole, ranks)
    assert (finding.value, finding.missed) == ("add", "own" if on_every_rank else "")
    together = sum(rank["add"] for rank in ranks)
    assert added_on_every_rank(finding, whole, together, bias, RANKS) == on_every_rank
    assert not added_on_every_rank(finding, whole, together, bias + 1, RANKS)


def test_what_was_reduced_is_whole_on_every_rank(numbers):
    whole = numbers(1, 5, 8)
    operations = [
        operation("dot", "dot", ("x",), "ff.net.2.weight"),
        operation("sum", "all-reduce", ("dot",)),
        operation("add", "add", ("sum",), "ff.net.2.bias"),
    ]
    (finding,) = found(operations, whole, [{"add": whole} for _ in range(RANKS)])
    assert (finding.value, finding.missed) == ("add", "")


def test_a_module_without_weights_is_the_nearest_value(numbers):
    whole = numbers(1, 5, 8)
    operations = [operation(name, "multiply", ("x",)) for name in "abc"]
    ranks = [{"a": numbers(1, 5, 8), "b": whole * 1.01, "c": numbers(1, 5, 4)} for _ in range(RANKS)]
    (finding,) = found(operations, whole, ranks, "norm")
    assert (finding.value, finding.missed) == ("b", "own")
    assert found(operations, numbers(1, 5, 8), ranks, "norm") == [], "nothing comes near"


def test_results_are_judged_behind_the_modules(numbers):
    whole, result = numbers(1, 5, 8), numbers(1, 5, 8)
    operations = [operation("dot", "dot", ("x",), "attn.to_q.weight"), operation("out", "add", ("dot",))]
    ranks = [{"dot": piece, "out": result} for piece in np.split(whole, RANKS, axis=2)]
    sound = found(operations, whole, ranks, "attn.to_q", results={"out": result})
    assert [(finding.value, finding.missed) for finding in sound] == [("dot", ""), ("out", "")]
    assert found(operations, whole, ranks, "attn.to_q", results={"out": result * 2})[1].missed == "own"
