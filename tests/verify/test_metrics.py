import math
import tracemalloc

import numpy as np
import pytest
from ml_dtypes import bfloat16

from fluxkiln.errors import ParityError
from fluxkiln.verify import metrics
from fluxkiln.verify.metrics import compare, compare_images, gain_of

_FIGURES = (
    "cosine", "relative_l2", "max_abs", "worst_channel", "delta_cosine", "delta_relative_l2", "delta_weight",
)  # fmt: skip


@pytest.fixture
def arrays():
    rng = np.random.default_rng(7)
    base = rng.standard_normal((3, 5, 16)).astype(np.float32) * 10
    expected = base + rng.standard_normal(base.shape).astype(np.float32)
    return expected + 0.01 * rng.standard_normal(base.shape).astype(np.float32), expected, base


def test_formulas(arrays):
    actual, expected, base = (array.astype(np.float64) for array in arrays)
    got = compare(*arrays)
    error = actual - expected
    assert got.finite
    assert got.relative_l2 == pytest.approx(np.linalg.norm(error) / np.linalg.norm(expected), rel=1e-12)
    assert got.max_abs == np.abs(error).max()
    cosine = (actual * expected).sum() / np.linalg.norm(actual) / np.linalg.norm(expected)
    assert got.cosine == pytest.approx(cosine, rel=1e-14)
    da, de = actual - base, expected - base
    assert got.delta_relative_l2 == pytest.approx(np.linalg.norm(error) / np.linalg.norm(de), rel=1e-12)
    assert got.delta_cosine == pytest.approx((da * de).sum() / np.linalg.norm(da) / np.linalg.norm(de), rel=1e-14)
    channel = np.sqrt((error**2).sum((0, 1)).max() / (de**2).sum((0, 1)).mean())
    assert got.worst_channel == pytest.approx(channel, rel=1e-12)


def test_full_output_flatters_and_delta_does_not(arrays):
    _, expected, base = arrays
    got = compare(base, expected, base)  # a block that adds nothing
    assert got.cosine > 0.99
    assert got.delta_cosine == 0.0
    assert got.delta_relative_l2 == 1.0


def stored(array):
    return array.astype(bfloat16).astype(np.float32)


@pytest.fixture
def stream():
    """A stream with three massive channels, in BF16: (truth, what a block reads, the two as arrays of one delta)."""
    rng = np.random.default_rng(3)
    base = rng.standard_normal((88, 128)).astype(np.float32)
    base[:, [5, 40, 77]] *= 400
    return base, rng.standard_normal(base.shape).astype(np.float32)


def test_rounding_of_massive_channels_is_no_error_of_the_block(stream):
    base, delta = stream
    expected = base + delta
    actual = stored(stored(base) + delta)
    got = compare(actual, expected, base)
    plain = np.vdot(actual - base, delta) / np.linalg.norm(actual - base) / np.linalg.norm(delta)
    assert plain < 0.995
    assert got.delta_cosine > 0.9997
    # three of 128 channels say nothing
    assert 0.95 < got.delta_weight < 0.98
    assert got.worst_channel < 0.12
    # and what is not weighted has all of it
    assert got.delta_relative_l2 == pytest.approx(np.linalg.norm(actual - expected) / np.linalg.norm(delta), rel=1e-6)
    assert got.delta_relative_l2 > 0.1


@pytest.mark.parametrize(
    "change",
    [
        lambda delta: delta * 0.0,
        lambda delta: np.roll(delta, 1, axis=0),
        lambda delta: delta + 0.06 * np.roll(delta, 1, axis=1),
    ],
)
def test_an_error_below_that_rounding_is_found(stream, change):
    base, delta = stream
    wrong = stored(stored(base) + change(delta))
    assert compare(wrong, base + delta, base).delta_cosine < 0.999


def test_one_wrong_channel_beside_massive_ones_is_found(stream):
    base, delta = stream
    expected = base + delta
    delta = delta.copy()
    delta[:, 17] *= 1.3
    assert compare(stored(stored(base) + delta), expected, base).worst_channel > 0.25


def test_a_stream_that_is_too_coarse_everywhere_does_not_pass(stream):
    base, delta = stream
    base = base * 50
    assert compare(stored(stored(base) + delta), base + delta, base).delta_cosine < 0.998


def test_no_result_weighs_itself(stream):
    base, delta = stream
    wrong = stored(stored(base) + delta)
    wrong[:, 17] *= 400  # as if it were one of those that say nothing
    assert compare(wrong, base + delta, base).worst_channel > 100
    # a float32 result is stored finely everywhere
    assert compare(base + delta * np.float32(1.01), base + delta, base).delta_weight == pytest.approx(1.0, abs=1e-6)


def test_worst_channel_sees_what_the_norm_dilutes():
    expected = np.random.default_rng(0).standard_normal((64, 3072)).astype(np.float32)
    actual = expected.copy()
    actual[:, 17] *= 2
    got = compare(actual, expected)
    assert got.relative_l2 < 0.03
    assert got.worst_channel > 0.7


def test_chunks_do_not_change_the_result(arrays, monkeypatch):
    whole = compare(*arrays)
    monkeypatch.setattr(metrics, "_CHUNK", 40)
    pieces = compare(*arrays)
    for name in _FIGURES:
        assert getattr(pieces, name) == pytest.approx(getattr(whole, name), rel=1e-13), name


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.int32, np.uint8])
def test_any_real_dtype(dtype):
    expected = np.arange(1, 13).reshape(3, 4).astype(dtype)
    assert compare(expected, expected).relative_l2 == 0.0
    assert compare(expected * 2, expected).relative_l2 == 1.0


def test_unsigned_difference_does_not_wrap():
    assert compare(np.array([1], np.uint8), np.array([2], np.uint8)).max_abs == 1.0


@pytest.mark.parametrize("shape", [(), (4,), (2, 3, 4, 5)])
def test_any_rank(shape):
    got = compare(np.full(shape, 1.5), np.full(shape, 1.0))
    assert got.relative_l2 == pytest.approx(0.5)
    assert got.cosine == pytest.approx(1.0)


def test_non_contiguous():
    expected = np.random.default_rng(0).standard_normal((6, 8))
    assert compare(np.asfortranarray(expected), expected[::1, ::1]).relative_l2 == 0.0
    assert compare(expected.T.copy().T, expected).max_abs == 0.0


def test_zero_expected():
    zero, one = np.zeros((2, 4)), np.ones((2, 4))
    same, different, gone = compare(zero, zero), compare(one, zero), compare(zero, one)
    assert (same.relative_l2, same.cosine, same.worst_channel) == (0.0, 1.0, 0.0)
    assert (different.relative_l2, different.cosine) == (math.inf, 0.0)
    assert (gone.relative_l2, gone.cosine) == (1.0, 0.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1, 2])
def test_one_bad_element_spoils_every_number(arrays, bad, side):
    arrays[side][1, 2, 3] = bad
    got = compare(*arrays)
    assert not got.finite
    for name in _FIGURES:
        assert math.isnan(getattr(got, name)), name


def test_infinity_on_both_sides_is_no_agreement():
    array = np.array([1.0, np.inf])
    assert not compare(array, array).finite


def test_opposite_infinities_in_base_and_output():
    assert not compare(np.array([np.inf]), np.array([np.inf]), np.array([np.inf])).finite


def test_float32_overflow_is_no_problem_in_float64():
    large = np.full(8, 3e38, np.float32)
    assert compare(large, large).relative_l2 == 0.0


def test_shape_mismatch_names_both():
    with pytest.raises(ParityError, match=r"\(2, 3\).*\(3, 2\)"):
        compare(np.zeros((2, 3)), np.zeros((3, 2)))
    with pytest.raises(ParityError, match=r"residual input has shape \(1, 3\).*\(2, 3\)"):
        compare(np.zeros((2, 3)), np.zeros((2, 3)), np.zeros((1, 3)))


def test_empty_is_refused():
    with pytest.raises(ParityError, match="holds no element"):
        compare(np.zeros((0, 3)), np.zeros((0, 3)))


def test_memory_stays_bounded():
    expected = np.ones((2048, 3072), np.float32)
    actual = expected + 1
    tracemalloc.start()
    compare(actual, expected, expected * 0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # The base made here is 25 MB; in float64 the three arrays would be 150 MB.
    assert peak < 25e6 + 9 * 8 * metrics._CHUNK


def test_images(pictures):
    from skimage.metrics import peak_signal_noise_ratio

    expected, actual = pictures
    got = compare_images(actual, expected)
    assert got.psnr == pytest.approx(peak_signal_noise_ratio(expected, actual), rel=1e-9)
    assert 0.7 < got.ssim < 1.0
    as_floats = compare_images(actual / 255, expected / 255)
    assert as_floats.psnr == pytest.approx(got.psnr, rel=1e-9)
    assert as_floats.ssim == pytest.approx(got.ssim, rel=1e-6)


def test_identical_images(pictures):
    got = compare_images(pictures[0], pictures[0])
    assert got.psnr == math.inf
    assert got.ssim == pytest.approx(1.0)


def test_image_with_nan(pictures):
    image = pictures[0] / 255
    spoilt = image.copy()
    spoilt[0, 0, 0] = np.nan
    got = compare_images(spoilt, image)
    assert not got.finite
    assert math.isnan(got.psnr)
    assert math.isnan(got.ssim)


def test_image_refusals(pictures):
    image = pictures[0]
    with pytest.raises(ParityError, match="uint8"):
        compare_images(image / 255, image)
    with pytest.raises(ParityError, match="7 x 7"):
        compare_images(image[:5], image[:5])


def test_a_difference_is_amplified_as_far_as_it_fits():
    difference = np.full((10, 10, 3), 7, np.uint8)
    assert gain_of(difference) == 32
    assert gain_of(difference * 0) == 1
    assert gain_of(difference * 36) == 1
    # one wrong pixel among many others does not hide them, alone it counts
    spoilt = np.pad(difference, ((0, 90), (0, 0), (0, 0)), constant_values=7)
    spoilt[5, 5] = 255
    assert gain_of(spoilt) == 32
    alone = np.zeros((100, 100, 3), np.int16)
    alone[5, 5] = 60
    assert gain_of(alone) == 4
