"""Channel scales for 8-bit inputs: they leave less error than none, and say what they cannot do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.calibration import Statistics
from fluxkiln.quantize.integer import INPUT_SCALE, LEVELS, THRESHOLD, pack_integer
from fluxkiln.quantize.methods import Source
from fluxkiln.quantize.sizes import count_sizes
from fluxkiln.quantize.smoothing import check_limit, find_gains, find_smoothing, smooth
from tests.quantize.weights import gather, make_inputs, make_weight

WEIGHT = make_weight("student", (96, 192)).astype(np.float32)
SEEN, OTHERS = make_inputs(4000, 192, 1), make_inputs(1000, 192, 2)


def known(inputs=SEEN) -> Statistics:
    return replace(gather(inputs, 0), sizes=count_sizes(inputs))


def product_error(divisors, inputs=OTHERS) -> float:
    """Relative L2 of the product in integers."""
    packed = pack_integer(WEIGHT * divisors)
    codes = np.clip(np.rint(inputs / divisors / INPUT_SCALE), -LEVELS - 1, LEVELS)
    exact = inputs @ WEIGHT.T
    return np.linalg.norm(codes @ packed.dequantize().T * np.float32(INPUT_SCALE) - exact) / np.linalg.norm(exact)


def test_the_search_beats_no_smoothing_and_comes_near_every_fixed_choice():
    sizes = count_sizes(SEEN)
    found = product_error(find_smoothing(WEIGHT, sizes))
    plain = product_error(np.full(192, np.abs(SEEN).max() / THRESHOLD, np.float32))
    assert found < 0.5 * plain
    for exponent in (0.5, 0.65, 0.9):
        assert found < 1.1 * product_error(find_smoothing(WEIGHT, sizes, [exponent]))


def test_what_was_seen_and_a_quarter_more_fits():
    scaled = np.abs(SEEN / find_smoothing(WEIGHT, count_sizes(SEEN)))
    assert 0.6 * THRESHOLD < 1.25 * scaled.max() < 1.01 * THRESHOLD


def test_gains_leave_room_and_are_exact():
    gains = find_gains(np.array([0, 0.01, 64, 64.1, 1e6], np.float32))
    np.testing.assert_array_equal(gains, [2**-4, 2**-4, 1, 2, 2**14])
    np.testing.assert_array_equal(find_gains(np.array([64, 64, 64], np.float32)), [2, 1, 1])


def test_a_divisor_is_the_reciprocal_of_a_bfloat16_number():
    reciprocals = 1 / find_smoothing(WEIGHT, count_sizes(SEEN))
    assert not (reciprocals.astype(np.float32).view(np.uint32) & 0xFFFF).astype(bool).all()
    rounded = (reciprocals.astype(np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000
    np.testing.assert_allclose(rounded.view(np.float32), reciprocals, rtol=1e-6)


def test_weights_of_one_input_share_its_divisors():
    first, second = smooth([Source(lambda: WEIGHT, known()), Source(lambda: WEIGHT * 3, known())], 0, 8, 0, 64)
    assert first.divisors.tobytes() == second.divisors.tobytes()


def test_what_was_not_seen_is_refused():
    with pytest.raises(SchemeError, match="W8A8 needs calibration"):
        smooth([Source(lambda: WEIGHT)], 0, 8, 0, 0)
    dead = SEEN.copy()
    dead[:, 17] = 0
    with pytest.raises(SchemeError, match="input channel 17 was 0 whenever it was calibrated"):
        smooth([Source(lambda: WEIGHT, known(dead))], 0, 8, 0, 0)


def test_a_channel_that_was_small_so_far_may_become_as_large_as_others():
    few = SEEN[:200].copy()
    few[:, 5] *= 0.01
    sizes = count_sizes(few)
    others = OTHERS.copy()
    found = find_smoothing(WEIGHT, sizes)
    assert (np.abs(others / found)[:, 5] < THRESHOLD).mean() > 0.9
    assert product_error(found, others) < 0.1


def test_no_token_makes_a_query_that_is_larger_than_its_norm_says():
    random = np.random.default_rng(0)
    tokens = random.standard_normal((500, 64)) * np.exp(3 * random.standard_normal(64))
    normed = tokens / np.sqrt(np.mean(np.square(tokens), axis=-1, keepdims=True))
    weight = np.abs(random.standard_normal(64)) / 4
    pairs = np.linalg.norm((normed * weight).reshape(500, 32, 2), axis=-1)
    most = 8 * weight.max()
    assert 0.4 * most < pairs.max() <= most
    check_limit({"q": weight}, int(np.ceil(most)))


def test_larger_queries_and_keys_are_refused_with_what_holds_them():
    norms = {"q": np.ones(64), "k": np.full(64, -1.4)}
    check_limit(norms, 12)
    with pytest.raises(SchemeError, match=r"may reach 11.2 with k, W8A8-qk8 holds 8; ask for W8A8-qk12 there"):
        check_limit({**norms, "q": np.zeros(64)}, 8)
