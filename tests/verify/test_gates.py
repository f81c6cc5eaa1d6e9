import math
from dataclasses import replace

import pytest

from fluxkiln.compile.toolchain import find_toolchain
from fluxkiln.patches.flux1.kinds import KINDS, SPLIT_KINDS
from fluxkiln.verify.gates import (
    DEVICE,
    HIGHER_IS_BETTER,
    PIPELINE,
    UNCOVERED,
    Gate,
    Row,
    Rung,
    first_bad_rung,
    gate_table,
    judge_row,
    rung_table,
)
from fluxkiln.verify.metrics import Metrics

GOOD = Metrics(1.0, 0.0, 0.0, 0.0, True, 1.0, 0.0, math.inf, 1.0, 1.0)
TOOLCHAINS = TPU_MLIR, NEURON, ONNXRUNTIME = tuple(map(find_toolchain, ("tpu_mlir", "neuron", "onnxruntime")))
# of a model that is cut over cores, which is stored in bfloat16
SPLIT_RUNGS = tuple(rung.name for rung in NEURON.rungs)
EVERY_GATE = {gate for toolchain in TOOLCHAINS for gate in gate_table(toolchain.gates)}


def row(kind, rung, scheme, output="hidden_states_out", vs_reference=GOOD, vs_previous=GOOD, gates=None):
    """A row of the first toolchain that has the rung."""
    toolchain = next(one for one in TOOLCHAINS if rung in rung_table(one.rungs))
    at, traits = rung_table(toolchain.rungs)[rung], {**KINDS, **SPLIT_KINDS, PIPELINE: None}[kind]
    made = Row(f"{kind}.00", traits, output, 0, at, scheme, vs_reference, "patched", vs_previous)
    return replace(made, verdicts=judge_row(made, gates or gate_table(toolchain.gates)))


def missed(judged):
    return [(verdict.gate.metric, verdict.gate.against) for verdict in judged.verdicts if not verdict.passed]


# The bounds that were required; a change that loosens one must fail here.
REQUIRED = [
    ("double", "patched", "W4BF16", "hidden_states_out", "relative_l2", 1e-6),
    ("clip", "onnxruntime", "F16", "last_hidden_state", "relative_l2", 5e-6),
    ("single", "simulator", "F32", "hidden_states_out", "relative_l2", 1e-6),
    ("clip", "simulator", "F16", "last_hidden_state", "relative_l2", 2e-3),
    ("tail", "simulator", "BF16", "sample", "relative_l2", 6e-3),
    ("head", "simulator", "BF16", "hidden_states_out", "relative_l2", 6e-3),
    ("head", "simulator", "BF16", "temb", "relative_l2", 1e-2),
    ("time_embed", "simulator", "BF16", "temb", "relative_l2", 1e-2),
    ("single_modulation", "simulator", "BF16", "modulation", "relative_l2", 6e-3),
    ("double_modulation", "simulator", "W4BF16", "modulation", "cosine", 0.99),
    ("double", "simulator", "F32", "hidden_states_out", "delta_cosine", 0.999),
    ("double", "simulator", "F16", "hidden_states_out", "delta_cosine", 0.999),
    ("double", "simulator", "BF16", "encoder_hidden_states_out", "delta_cosine", 0.999),
    ("single", "simulator", "W4BF16", "hidden_states_out", "delta_cosine", 0.99),
    ("t5_block", "simulator", "W4BF16", "hidden_states_out", "delta_cosine", 0.99),
    ("double_modulated", "simulator", "W4BF16", "encoder_hidden_states_out", "delta_cosine", 0.99),
    ("single_modulated", "patched", "BF16", "hidden_states_out", "relative_l2", 1e-6),
    ("t5", "split", "BF16", "last_hidden_state", "relative_l2", 5e-6),
    ("modulated_head", "split", "BF16", "modulation", "relative_l2", 5e-6),
    ("double_modulated", "split", "BF16", "hidden_states_out", "relative_l2", 5e-6),
]


@pytest.mark.parametrize(("kind", "rung", "scheme", "output", "metric", "bound"), REQUIRED)
def test_required_bounds(kind, rung, scheme, output, metric, bound):
    away = -1 if metric in HIGHER_IS_BETTER else 1
    at_bound = row(kind, rung, scheme, output, vs_reference=replace(GOOD, **{metric: bound}))
    beyond = row(kind, rung, scheme, output, vs_reference=replace(GOOD, **{metric: bound + away * bound * 1e-3}))
    assert at_bound.passed
    assert missed(beyond) == [(metric, "reference")]


def test_w4_is_held_to_bf16_noise_against_the_rung_before():
    noisy = row("single", "simulator", "W4BF16", vs_previous=replace(GOOD, delta_cosine=0.9989))
    assert missed(noisy) == [("delta_cosine", "previous")]


@pytest.mark.parametrize("kind", ["double", "single", "double_modulated", "single_modulated"])
def test_one_wrong_channel_of_a_block_is_seen_in_either_form(kind):
    spoilt = row(kind, "simulator", "W4BF16", vs_previous=replace(GOOD, worst_channel=0.21))
    assert missed(spoilt) == [("worst_channel", "previous")]


def test_every_part_is_covered_at_every_rung():
    for kind in KINDS.values():
        for output in kind.outputs:
            for scheme in ("F32", "F16", "BF16", "W8BF16", "W4BF16"):
                for rung in list(rung_table((*TPU_MLIR.rungs, *ONNXRUNTIME.rungs)))[1:]:
                    judged = row(kind.name, rung, scheme, output)
                    assert judged.passed, (kind.name, rung, scheme, output, missed(judged))


@pytest.mark.parametrize("rung", SPLIT_RUNGS)
def test_every_split_part_is_covered(rung):
    for kind in {**KINDS, **SPLIT_KINDS}.values():
        for output in kind.outputs:
            assert row(kind.name, rung, "BF16", output).passed


@pytest.mark.parametrize("rung", ["split", "replicas"])
def test_ranks_that_differ_by_one_bit_are_seen(rung):
    spoilt = row("double_modulated", rung, "BF16", "ranks", vs_reference=replace(GOOD, max_abs=1e-7))
    assert missed(spoilt) == [("max_abs", "reference")]


def test_splitting_must_not_add_to_the_noise_of_bfloat16():
    noisy = row("single_modulated", "replicas", "BF16", vs_previous=replace(GOOD, noise_ratio=1.26))
    assert missed(noisy) == [("noise_ratio", "previous")]


@pytest.mark.parametrize("output", ["latents", "image"])
def test_pipeline_is_covered(output):
    for scheme in ("F32", "F16", "BF16", "W8BF16", "W4BF16"):
        for rung in ("patched", "onnxruntime", "simulator"):
            assert row(PIPELINE, rung, scheme, output).passed


@pytest.mark.parametrize(
    ("at", "scheme"),
    [("simulator", "W3BF16"), (Rung("guessed", 4, "of a toolchain", "no gate"), "BF16")],
)
def test_a_row_without_a_gate_fails(at, scheme):
    judged = row("double", "simulator", scheme)
    if isinstance(at, Rung):
        judged = replace(judged, at=at)
        judged = replace(judged, verdicts=judge_row(judged, gate_table(TPU_MLIR.gates)))
    assert not judged.passed
    assert judged.worst.gate is UNCOVERED


def test_a_family_of_rungs_shares_gates_and_a_toolchain_may_except_them():
    at = Rung("guessed", 4, "another toolchain's compiled form", "it", family="scheme")
    strict = Gate("guessed", "BF16", "part", "*", "relative_l2", 1e-3, "reference", "stricter than the rule")
    spoilt = replace(row("tail", "simulator", "BF16", "sample", replace(GOOD, relative_l2=2e-3)), at=at)
    for gates, passes in ((gate_table(()), True), (gate_table((strict,)), False)):
        assert all(verdict.passed for verdict in judge_row(spoilt, gates)) is passes


def test_a_missing_delta_fails_its_gate():
    judged = row("double", "simulator", "BF16", vs_reference=replace(GOOD, delta_cosine=None, delta_relative_l2=None))
    assert missed(judged) == [("delta_cosine", "reference")]


def test_nan_passes_nothing():
    nan = Metrics(*[math.nan] * 4, False, *[math.nan] * 5)
    for gate in EVERY_GATE:
        if gate.metric != "finite":
            assert not gate.holds(getattr(nan, gate.metric)), gate
    judged = row("double", "simulator", "BF16", vs_reference=nan, vs_previous=nan)
    assert not any(verdict.passed for verdict in judged.verdicts)
    assert all(verdict.excess == math.inf for verdict in judged.verdicts if verdict.gate.metric != "finite")


def test_the_first_match_counts():
    judged = row("head", "simulator", "BF16", "temb")
    bounds = [verdict.gate.bound for verdict in judged.verdicts if verdict.gate.metric == "relative_l2"]
    assert bounds == [1e-2]


def test_excess_is_one_at_the_bound_and_grows_beyond():
    for gate in EVERY_GATE:
        if gate.metric == "finite":
            continue
        worse = gate.bound - 1e-3 if gate.metric in HIGHER_IS_BETTER else gate.bound * 1.1 + 1e-9
        # a bound of zero has no allowance to use up
        assert gate.excess(gate.bound) == pytest.approx(1.0 if gate.bound else 0.0)
        assert gate.excess(worse) > 1.0
        assert not gate.holds(worse)
        assert gate.holds(gate.bound)


def test_every_gate_has_a_reason_and_a_known_metric():
    rungs = [DEVICE, *(rung for toolchain in TOOLCHAINS for rung in rung_table(toolchain.rungs).values())]
    for gate in EVERY_GATE:
        assert len(gate.reason) > 10
        assert gate.metric in Metrics.__dataclass_fields__
        assert set(gate.rung.split("|")) <= {name for rung in rungs for name in (rung.name, rung.family)} | {"*"}


def test_first_bad_rung_is_the_lowest():
    bad = replace(GOOD, relative_l2=1.0)
    rows = [
        row("single", "simulator", "BF16", vs_reference=bad),
        row("single", "onnxruntime", "BF16", vs_reference=bad),
    ]
    assert first_bad_rung(rows) == {"single.00": "onnxruntime"}
    assert first_bad_rung([row("single", "simulator", "BF16")]) == {}


def test_another_table():
    gates = (Gate("*", "*", "*", "*", "max_abs", 0.5, "reference", "for this test only"),)
    sound = row("single", "patched", "F32", gates=gates)
    spoilt = row("single", "patched", "F32", vs_reference=replace(GOOD, max_abs=1.0), gates=gates)
    assert (sound.passed, spoilt.passed) == (True, False)
    assert "max_abs 1 against reference, must be <= 0.5" in spoilt.verdicts[0].claim
