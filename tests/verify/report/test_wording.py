"""How the pages write numbers and names."""

import math

import pytest

from fluxkiln.verify.report.page import bound, cosine, number, seconds, size, word


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (number, 0.0024, "2.40e-3"), (number, 0.25, "0.25"), (number, 36.123, "36.1"), (number, 0, "0"),
        (number, math.nan, "NaN"), (number, "Infinity", "∞"), (number, 12345.6, "1.23e4"),
        (bound, 1e-6, "1e-6"), (bound, 0.006, "0.006"), (bound, 18.0, "18"),
        (cosine, 0.99999949, "0.999999"), (cosine, "NaN", "NaN"),
        (size, 940, "940 B"), (size, 23_400, "23.4 kB"), (size, 97e6, "97 MB"), (size, 6.48e9, "6.48 GB"),
        (size, 0, "0 B"), (size, 999, "999 B"), (size, 999_999, "1 MB"),
        (seconds, 0.0079, "7.9 ms"), (seconds, 0.1, "0.1 s"), (seconds, 8.52, "8.5 s"), (seconds, 24.2, "24 s"),
        (seconds, 343.0, "5.7 min"),
        (word, "hidden_states_out", "hidden states out"), (word, "delta_relative_l2", "delta relative L2"),
        (word, "psnr", "PSNR"), (word, "ssim", "SSIM"),
    ],
)  # fmt: skip
def test_as_people_write_it(write, value, text):
    assert write(value) == text
