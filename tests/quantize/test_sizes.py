"""Sizes of inputs in bins: each number in its own, and quantiles that are known afterwards."""

from __future__ import annotations

import numpy as np

from fluxkiln.quantize.sizes import SIZE_BINS, bin_edges, count_sizes, largest, middles
from tests.quantize.weights import make_inputs

INPUTS = make_inputs(3000, 64, 1)


def test_every_number_is_in_the_bin_that_holds_it():
    numbers = np.array([[0.0], [-0.3], [1.0], [-1.124], [1.126], [1e-9], [1e9]], np.float32)
    ends = bin_edges()
    for number in numbers.ravel():
        place = int(np.argmax(count_sizes(np.array([[number]], np.float32))[0]))
        assert place in (0, SIZE_BINS - 1) or ends[place - 1] <= abs(number) < ends[place]
    counts = count_sizes(numbers)
    assert (counts.sum(), counts[0, 0], counts[0, -1]) == (7, 2, 1)
    inside = (middles()[1:] < ends[1:]) & (middles()[1:] > ends[:-1])
    assert inside.all()


def test_counts_of_rows_add_up():
    np.testing.assert_array_equal(count_sizes(INPUTS), count_sizes(INPUTS[:1000]) + count_sizes(INPUTS[1000:]))


def test_the_largest_is_known_to_an_eighth():
    exact, found = np.abs(INPUTS).max(0), largest(count_sizes(INPUTS))
    assert ((found > exact) & (found <= exact * 1.125)).all()
