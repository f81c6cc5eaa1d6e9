"""A module's output put together from what ranks have, on arrays whose parts are known."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.patches.parts import Leaf
from fluxkiln.verify.findings import Operation, Tolerance
from fluxkiln.verify.judgement import judge_output, match_leaves

RANKS = 2
BOUNDS = Tolerance(1e-5, 1e-4, 1e-5)


def operation(output, op_type, inputs, *slots):
    return Operation(output, op_type, inputs, slots)


@pytest.fixture
def numbers():
    random = np.random.default_rng(0)
    return lambda *shape: random.standard_normal(shape).astype(np.float32)


def found(operations, whole, ranks, name="ff.net.2", is_partial=lambda _: False):
    return match_leaves([Leaf(name, "Linear", whole, None)], operations, ranks, BOUNDS, is_partial)


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


def test_partial_sums_are_added(numbers):
    parts = [numbers(1, 5, 8) for _ in range(RANKS)]
    operations = [operation("dot", "dot", ("x",), "ff.net.2.weight")]
    ranks = [{"dot": part} for part in parts]
    assert found(operations, sum(parts), ranks)[0].missed == "own"
    assert found(operations, sum(parts), ranks, is_partial=lambda one: one.output == "dot")[0].missed == ""


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_factor_in_the_weight_and_an_epsilon_are_the_module_s(numbers, factor):
    whole = numbers(1, 5, 8)
    operations = [operation("dot", "dot", ("x",), f"attn.to_q.weight__f{factor.hex().replace('.', '_')}__t")]
    (finding,) = found(operations, whole, [{"dot": whole / 2}], "attn.to_q")
    assert finding.missed == ("" if factor == 0.5 else "own")
    norm = Operation("norm", "LayerNormalization", ("x",), ("norm.weight",), 1e-5)
    for epsilon in (1e-5, 1e-6):
        leaf = Leaf("norm", "LayerNorm", whole, epsilon)
        (finding,) = match_leaves([leaf], [norm], [{"norm": whole}], BOUNDS)
        assert (finding.missed, finding.bad_channels) == ("" if epsilon == 1e-5 else "epsilon", 0)


def test_pieces_of_a_module_are_not_judged(numbers):
    whole = numbers(1, 5, 8)
    operations = [operation("dot", "dot", ("x",), "attn.to_q.weight__s0.0.8")]
    assert found(operations, whole, [{"dot": whole}], "attn.to_q") == []
    assert found(operations, whole, [{}], "attn.to_q") == []


def test_a_module_without_weights_is_the_nearest_value(numbers):
    whole = numbers(1, 5, 8)
    operations = [operation(name, "multiply", ("x",)) for name in "abc"]
    ranks = [{"a": numbers(1, 5, 8), "b": whole * 1.01, "c": numbers(1, 5, 4)} for _ in range(RANKS)]
    (finding,) = found(operations, whole, ranks, "norm")
    assert (finding.value, finding.missed) == ("b", "own")
    assert found(operations, numbers(1, 5, 8), ranks, "norm") == [], "nothing comes near"


def test_results_are_judged_as_a_whole(numbers):
    result = numbers(1, 5, 8)
    assert judge_output("out", result.reshape(5, 8), result, BOUNDS).missed == ""
    wrong = judge_output("out", result * 2, result, BOUNDS)
    assert (wrong.missed, wrong.bad_channels, wrong.all_channels) == ("own", 8, 8)
    assert judge_output("out", result * np.nan, result, BOUNDS).missed == "finite"
