"""The gates of blocks on trained weights, where a few channels of the stream are massive."""

import numpy as np
import pytest
from ml_dtypes import bfloat16

from fluxkiln.build.make import prepare
from fluxkiln.build.verification import record
from fluxkiln.compile.toolchain import find_toolchain
from fluxkiln.settings import Settings
from fluxkiln.verify.ladder import Ladder

BLOCK, OTHER, STEP = "single.02", "single.01", 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What diffusers' run of the weights that ship handed to a block, what it and another one added, and its kind."""
    folder = tmp_path_factory.mktemp("trained")
    prepared = prepare(Settings("cpu", "scenes-dev", steps=STEP + 1, build_dir=folder))
    recording = record(prepared)
    [part] = [part for part in prepared.plan.parts if part.name == BLOCK]
    read = {name: np.array(recording.inputs(name, STEP)["hidden_states"]) for name in (BLOCK, OTHER)}
    written = {name: np.array(recording.outputs(name, STEP)["hidden_states_out"]) for name in (BLOCK, OTHER)}
    return read[BLOCK], written[BLOCK] - read[BLOCK], written[OTHER] - read[OTHER], part.traits


def stored(array):
    return array.astype(bfloat16).astype(np.float32)


def judge(base, delta, wrong, traits):
    """The rows of an interpreter whose arithmetic is exact, but that the stream is read and written in BF16."""
    toolchain = find_toolchain("tpu_mlir")
    ladder = Ladder(toolchain.rungs, toolchain.gates)
    expected, actual = base + delta, stored(stored(base) + wrong)
    rungs = [("dequantized", expected), ("interpreter", actual)]
    ladder.compare(BLOCK, traits, "hidden_states_out", STEP, expected, base, rungs, "W4BF16")
    return ladder.rows[-1]


def doubled(delta):
    """One channel twice what it should be: that in the middle by what is added to it."""
    channels = np.argsort(np.square(delta).sum(axis=(0, 1)))
    wrong = delta.copy()
    wrong[..., channels[len(channels) // 2]] *= 2
    return wrong


def test_rounding_in_massive_channels_passes(made):
    base, delta, _, traits = made
    assert np.abs(base).max() > 100 * np.sqrt(np.square(delta).mean())
    row = judge(base, delta, delta, traits)
    assert row.passed, row.worst
    # without weights it would not
    assert row.vs_previous.delta_relative_l2 > np.sqrt(2 * (1 - 0.999))


@pytest.mark.parametrize(
    "change",
    [
        lambda delta, other: other,
        lambda delta, other: np.zeros_like(delta),
        lambda delta, other: np.roll(delta, 1, axis=1),
        lambda delta, other: doubled(delta),
    ],
    ids=["another block's", "nothing", "a token further", "one channel doubled"],
)
def test_what_is_wrong_in_the_block_is_found(made, change):
    base, delta, other, traits = made
    row = judge(base, delta, change(delta, other), traits)
    assert not row.passed
    assert {verdict.gate.metric for verdict in row.verdicts if not verdict.passed} <= {"delta_cosine", "worst_channel"}
