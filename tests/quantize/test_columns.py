"""GPTQ against its slow restatement, and what calibration gains on inputs that it has not seen."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.calibration import Statistics
from fluxkiln.quantize.columns import BELIEF, DAMPING, ColumnRounder
from fluxkiln.quantize.pack import bf16_to_float32, dequantize, empty_packed
from fluxkiln.quantize.schemes import parse_scheme
from tests.quantize.weights import gather, make_inputs, make_weight, pack_matrix, relative_error

WIDTH = 256
SEEN, UNSEEN = make_inputs(2048, WIDTH, 1), make_inputs(512, WIDTH, 2)
GPTQ = parse_scheme("W4BF16-gptq")


def test_equals_the_restated_rule():
    """Column by column in float64, with the scales and zero points that were found."""
    weight = make_weight("student", (6, WIDTH)).astype(np.float32)
    statistics = gather(SEEN, 0)
    packed = pack_matrix(weight, GPTQ, statistics)
    (moments,) = (block.astype(np.float64) for block in statistics.blocks)
    shrunk = moments * BELIEF * len(SEEN) / (WIDTH + BELIEF * len(SEEN))
    shrunk[np.diag_indices(WIDTH)] = np.diag(moments)
    moments = shrunk
    moments[np.diag_indices(WIDTH)] += DAMPING * np.trace(moments) / WIDTH
    factor = np.linalg.cholesky(np.linalg.inv(moments)).T
    left, codes = weight.astype(np.float64), np.empty(weight.shape, np.int64)
    for i in range(WIDTH):
        scale, zero = bf16_to_float32(packed.scales_OG)[:, i // 64], packed.zeros_OG[:, i // 64].astype(float)
        codes[:, i] = np.clip(np.floor(left[:, i] / scale + zero + 0.5), 0, 15)
        error = (left[:, i] - (codes[:, i] - zero) * scale) / factor[i, i]
        left[:, i + 1 :] -= error[:, None] * factor[i, i + 1 :]
    made = np.stack([packed.codes_OI & 15, packed.codes_OI >> 4], -1).reshape(weight.shape)
    assert (made != codes).mean() < 0.01  # ties, and what float32 makes of them further on
    assert np.abs(made - codes).max() <= 1


@pytest.mark.parametrize("kind", ["gaussian", "student", "channels"])
@pytest.mark.parametrize("block", [0, 128])
def test_output_error_on_unseen_inputs(kind, block):
    weight = make_weight(kind, (192, WIDTH))
    statistics = gather(SEEN, block)
    compilers = relative_error(weight, "W4BF16-rtn", inputs=UNSEEN)
    plain = relative_error(weight, "W4BF16", inputs=UNSEEN)
    ours = relative_error(weight, "W4BF16-gptq", statistics, UNSEEN)
    assert ours <= (0.65 if block == 0 else 0.8) * compilers
    assert ours < plain < compilers


def test_shuffled_calibration_shows():
    """Statistics of other channels are worse than none."""
    weight = make_weight("student", (192, WIDTH))
    shuffled = gather(SEEN[:, np.random.default_rng(0).permutation(WIDTH)], 0)
    assert relative_error(weight, "W4BF16-gptq", shuffled, UNSEEN) > 1.2 * relative_error(
        weight, "W4BF16", inputs=UNSEEN
    )


@pytest.mark.parametrize("name", ["W4BF16-gptq", "W4BF16-g32-gptq", "W8BF16-gptq"])
def test_rows_may_be_given_some_at_a_time(name):
    """A cast reads blocks of rows, the reference whole matrices: the codes must be the same."""
    scheme, weight = parse_scheme(name), make_weight("student", (45, WIDTH))
    statistics = gather(SEEN, 0)
    whole = pack_matrix(weight, scheme, statistics)
    rounder, packed = ColumnRounder(statistics), empty_packed(weight.shape, scheme.group_size, scheme.weight_bits)
    for start, stop in ((0, 7), (7, 8), (8, 45)):
        rounder(weight[start:stop].astype(np.float32), scheme.weight_bits,
                packed.codes_OI[start:stop], packed.scales_OG[start:stop], packed.zeros_OG[start:stop])  # fmt: skip
    assert packed.codes_OI.tobytes() == whole.codes_OI.tobytes()
    assert packed.scales_OG.tobytes() == whole.scales_OG.tobytes()
    assert packed.zeros_OG.tobytes() == whole.zeros_OG.tobytes()


def test_blocks_that_cut_groups():
    """Statistics of a slice of channels have blocks that do not end where groups do."""
    statistics = gather(make_inputs(2048, WIDTH, 1), 96).columns(32, 224)
    assert [len(block) for block in statistics.blocks] == [64, 96, 32]
    weight = make_weight("student", (32, 192))
    stored = dequantize(pack_matrix(weight, GPTQ, statistics), 64)
    assert np.isfinite(stored).all()
    assert np.linalg.norm(stored - weight.astype(np.float32)) < 0.3 * np.linalg.norm(weight.astype(np.float32))


def test_few_rows_are_not_believed():
    """Fewer rows than channels: what they seem to say of products must not make the unseen worse."""
    weight = make_weight("student", (192, WIDTH))
    for count in (32, 128):
        few = gather(make_inputs(count, WIDTH, 1), 0)
        assert relative_error(weight, "W4BF16-gptq", few, UNSEEN) < relative_error(weight, "W4BF16", inputs=UNSEEN)


def test_uncorrelated_inputs_leave_nothing_to_make_up_for():
    weight = make_weight("gaussian", (64, 128))
    plain = Statistics((np.eye(128, dtype=np.float32),), np.ones(128, np.float32), 1)
    ours, theirs = pack_matrix(weight, GPTQ, plain), pack_matrix(weight, parse_scheme("W4BF16-ls"))
    assert (ours.codes_OI != theirs.codes_OI).mean() < 0.001


def test_channels_that_were_never_seen_are_no_trouble():
    inputs = SEEN.copy()
    inputs[:, ::7] = 0
    stored = dequantize(pack_matrix(make_weight("gaussian", (16, WIDTH)), GPTQ, gather(inputs, 0)), 64)
    assert np.isfinite(stored).all()
    silent = Statistics((np.zeros((WIDTH, WIDTH), np.float32),), np.zeros(WIDTH, np.float32), 5)
    assert relative_error(make_weight("gaussian", (16, WIDTH)), "W4BF16-gptq", silent) < 0.1


def test_other_widths_and_impossible_moments_are_refused():
    with pytest.raises(SchemeError, match="calibration is for 256 input channels, the weight has 128"):
        pack_matrix(make_weight("gaussian", (4, 128)), GPTQ, gather(SEEN, 0))
    negative = Statistics((-np.eye(64, dtype=np.float32),), np.ones(64, np.float32), 1)
    with pytest.raises(SchemeError, match="no Cholesky factor"):
        ColumnRounder(negative)
