"""The first value out of tolerance, on arrays whose errors are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.verify.findings import Operation, Tolerance
from fluxkiln.verify.judgement import (
    BF16,
    BUILD_AGAIN,
    DEQUANTIZED,
    MOST_NAMED,
    first_missed,
    judge_ranks,
    judge_stored,
    judge_values,
    tolerance_of,
    value_range,
)

BOUNDS = Tolerance(own=1e-2, channel=5e-2, drift=0.1)


@pytest.fixture
def values():
    random = np.random.default_rng(0)
    return {name: random.standard_normal((1, 6, 32)).astype(np.float32) for name in "abc"}


def judge(values, seen, local=None):
    return judge_values("abc", seen, values, {**values, **(local or {})}, BOUNDS)


def test_nothing_is_missed_by_equal_values(values):
    findings = judge(values, values)
    assert [finding.value for finding in findings] == list("abc")
    assert first_missed(findings) is None
    assert all(finding.own == finding.drift == 0.0 for finding in findings)


def test_the_first_in_order_is_named_and_not_the_worst(values):
    seen = {**values, "b": values["b"] * 1.02, "c": values["c"] * 2}
    first = first_missed(judge(values, seen))
    assert (first.value, first.missed) == ("b", "own")
    assert math.isclose(first.own, 0.02, rel_tol=1e-3)


def test_an_error_that_came_along_is_drift(values):
    spoilt = values["b"] + 0.5
    first = first_missed(judge(values, {**values, "b": spoilt}, {"b": spoilt}))
    assert (first.value, first.missed, first.own) == ("b", "drift", 0.0)


def test_one_channel_is_found_and_named(values):
    spoilt = values["b"].copy()
    spoilt[..., 5] *= 1.1
    first = first_missed(judge(values, {**values, "b": spoilt}))
    assert (first.missed, first.channels, first.bad_channels, first.all_channels) == ("own", (5,), 1, 32)
    small = values["b"].copy()
    small[..., 5] *= 1.001
    assert first_missed(judge(values, {**values, "b": small})) is None


def test_channels_are_named_worst_first_and_not_all(values):
    spoilt = values["b"] * np.linspace(1.2, 2.0, 32, dtype=np.float32)
    first = first_missed(judge(values, {**values, "b": spoilt}))
    assert len(first.channels) == MOST_NAMED
    assert first.bad_channels == 32
    sizes = [float(np.square(values["b"][..., c] - spoilt[..., c]).sum()) for c in first.channels]
    assert sizes == sorted(sizes, reverse=True)


def test_new_infinities_are_missed_and_those_of_a_mask_are_not(values):
    mask = values["b"].copy()
    mask[0, 0, 0] = -np.inf
    assert first_missed(judge_values("b", {"b": mask}, {"b": mask}, {"b": mask}, BOUNDS)) is None
    first = first_missed(judge(values, {**values, "b": mask}))
    assert (first.value, first.missed) == ("b", "finite")


def test_values_without_a_counterpart_are_left_out(values):
    seen = {**values, "b": values["b"][:, :3]}
    assert [finding.value for finding in judge(values, seen)] == ["a", "c"]


def test_range_of_a_value():
    range_ = value_range(np.float32([[0.0, -2.0, 1e-3]]))
    assert (range_.low, range_.high, range_.shape) == (-2.0, pytest.approx(1e-3), (1, 3))
    assert range_.smallest == pytest.approx(1e-3)
    assert value_range(np.empty((0, 4))).rms == 0.0


def test_tolerances():
    assert tolerance_of(DEQUANTIZED, "F32").own < tolerance_of(DEQUANTIZED, "F16").own
    known = {"F32": BOUNDS, "*": BF16}
    assert tolerance_of(known, "F32") == BOUNDS
    assert tolerance_of(known, "W4BF16") == tolerance_of(known, "BF16") == BF16
    with pytest.raises(SchemeError, match="no tolerance is known for W2BF16; there are F32, F16"):
        tolerance_of(DEQUANTIZED, "W2BF16")


def test_what_is_stored_wrongly_is_named_with_its_rank():
    operations = [Operation("a", "MatMul", (), ("one",)), Operation("b", "Add", (), ("two", "three"))]
    shares = {"one": {0: 0.0}, "two": {0: 0.0, 3: 0.25}, "three": {0: 0.0}}
    found = judge_stored("checkpoint", operations, shares, lambda wrong: repr(dict(wrong)))
    assert [(finding.value, finding.own, finding.rank) for finding in found.findings] == [("a", 0.0, 0), ("b", 0.25, 3)]
    assert (found.culprit.finding.value, found.culprit.operation, found.culprit.slots) == ("b", "Add", ("two",))
    assert (found.culprit.remedy.cause, found.culprit.remedy.advice) == ("{'two': {3: 0.25}}", BUILD_AGAIN)
    sound = judge_stored("checkpoint", operations, {"one": {-1: 0.0}}, repr)
    assert sound.culprit is None
    assert [finding.value for finding in sound.findings] == ["a"], "of what was read back alone"


def test_one_rank_of_many_is_named(values):
    """Of 32 ranks one: in the norm of all it would be a sixth of what it is."""
    wrong = {**values, "b": values["b"] * 1.02}
    ranks = [values] * 20 + [wrong] + [values] * 11
    first = first_missed(judge_ranks("abc", ranks, [values] * 32, [values] * 32, BOUNDS))
    assert (first.value, first.rank, first.missed) == ("b", 20, "own")
    assert first_missed(judge_ranks("abc", [values] * 32, [values] * 32, [values] * 32, BOUNDS)) is None
