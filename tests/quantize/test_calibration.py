"""Second moments of inputs, whole and cut, and the output error that follows from them."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.calibration import Statistics, output_error
from tests.quantize.weights import gather, make_inputs

INPUTS = make_inputs(500, 192, 1)


def test_moments():
    found = gather(INPUTS, 0)
    np.testing.assert_allclose(found.blocks[0], INPUTS.T @ INPUTS / 500, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.diagonal, np.square(INPUTS).mean(0), rtol=1e-4)
    np.testing.assert_allclose(found.peaks, np.abs(INPUTS).mean(0), rtol=1e-5)
    assert (found.count, found.in_features) == (500, 192)


def test_output_error_is_that_of_the_outputs():
    error = np.random.default_rng(0).standard_normal((24, 192)).astype(np.float32)
    direct = np.square(INPUTS @ error.T).sum(1).mean()
    assert output_error(error, gather(INPUTS, 0)) == pytest.approx(direct, rel=1e-4)
    # blocks leave out what far channels have in common: the diagonal alone leaves out all of it
    assert output_error(error, gather(INPUTS, 32)) == pytest.approx(direct, rel=0.5)


@pytest.mark.parametrize("block", [0, 64, 80])
@pytest.mark.parametrize(("start", "stop"), [(0, 192), (0, 64), (40, 130), (64, 192)])
def test_columns_are_cut_out_of_the_blocks(block, start, stop):
    whole = gather(INPUTS, block)
    cut = whole.columns(start, stop)
    assert cut.in_features == stop - start
    dense = np.zeros((192, 192), np.float32)
    for first, one in whole.starts():
        dense[first : first + len(one), first : first + len(one)] = one
    again = np.zeros((stop - start, stop - start), np.float32)
    for first, one in cut.starts():
        again[first : first + len(one), first : first + len(one)] = one
    np.testing.assert_array_equal(again, dense[start:stop, start:stop])
    np.testing.assert_array_equal(cut.peaks, whole.peaks[start:stop])


@pytest.mark.parametrize(
    ("blocks", "peaks", "count"),
    [
        ((np.full((4, 4), np.nan, np.float32),), np.ones(4, np.float32), 1),
        ((np.eye(4, dtype=np.float32),), np.array([1, np.inf, 1, 1], np.float32), 1),
        ((-np.eye(4, dtype=np.float32),), np.ones(4, np.float32), 1),
        ((np.eye(4, dtype=np.float32),), np.ones(4, np.float32), 0),
    ],
)
def test_unsound_moments_are_refused(blocks, peaks, count):
    with pytest.raises(SchemeError, match=r"calibration of w has NaN, infinite or negative moments"):
        Statistics(blocks, peaks, count).check("w", 4)


def test_other_widths_are_refused():
    with pytest.raises(SchemeError, match="calibration of w is for 192 input channels, the weight has 96"):
        gather(INPUTS, 0).check("w", 96)
