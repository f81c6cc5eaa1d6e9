"""Figures of a matrix against the same worked out whole."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize import figures
from fluxkiln.quantize.figures import count_groups, measure
from fluxkiln.quantize.formats import FILE_FORMATS
from fluxkiln.quantize.pack import dequantize
from fluxkiln.quantize.schemes import parse_scheme, stored_size
from tests.quantize.weights import gather, make_inputs, make_weight, pack_int4, relative_error

SHAPE = (320, 256)
INPUTS = make_inputs(512, 256, 1)


def of(weight, name, statistics=None):
    return measure(lambda start, stop: weight[start:stop], weight.shape, parse_scheme(name), statistics)


@pytest.mark.parametrize("name", ["W4BF16", "W4BF16-rtn", "W4BF16-g32", "W8BF16", "W4BF16-gptq"])
def test_errors(name, monkeypatch):
    monkeypatch.setattr(figures, "_BLOCK", 64 * 256)  # five blocks of rows
    weight, statistics = make_weight("student", SHAPE), gather(INPUTS, 0)
    found = of(weight, name, statistics)
    known = statistics if "gptq" in name else None
    assert found.weight_error == pytest.approx(relative_error(weight, name, known), rel=1e-4)
    assert found.output_error == pytest.approx(relative_error(weight, name, known, INPUTS), rel=1e-3)
    assert found.error == found.output_error
    if known is None:
        plain = of(weight, name)
        assert math.isnan(plain.output_error)
        assert plain.error == plain.weight_error == pytest.approx(found.weight_error)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "MLX4"])
def test_formats_of_files_are_measured_as_files_have_them(name):
    weight = make_weight("student", SHAPE)
    exact, stored = weight.astype(np.float32), FILE_FORMATS[name].unpack(FILE_FORMATS[name].pack(weight))
    assert of(weight, name).weight_error == pytest.approx(np.linalg.norm(stored - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize(
    ("name", "bits"),
    [("W4BF16", 4.375), ("W4BF16-g32", 4.75), ("W4BF16-g128", 4.1875), ("W8BF16", 8.375), ("BF16", 16), ("F32", 32)],
)
def test_bits_a_weight(name, bits):
    assert of(make_weight("gaussian", SHAPE), name).bits_per_weight == bits


def test_what_a_low_rank_branch_costs_is_counted():
    scheme = parse_scheme("W4BF16-svd")
    assert stored_size(SHAPE, scheme) - stored_size(SHAPE, parse_scheme("W4BF16")) == 2 * 32 * (320 + 256)
    weight, statistics = make_weight("gaussian", SHAPE), gather(INPUTS, 0)
    assert of(weight, "W4BF16-svd", statistics).size == stored_size(SHAPE, scheme)
    assert of(weight, "W4BF16-svd", statistics).output_error < of(weight, "W4BF16", statistics).output_error
    assert of(weight, "W4BF16-awq", statistics).output_error < of(weight, "W4BF16", statistics).output_error


def test_groups_of_one_sign_and_empty_ones_are_counted_over_all_rows(monkeypatch):
    monkeypatch.setattr(figures, "_BLOCK", 64 * 256)
    weight = make_weight("gaussian", SHAPE)
    weight[5, :64], weight[300, 64:128] = 0.5, -0.5
    weight[100, 128:192] = 0
    found = of(weight, "W4BF16-rtn")
    assert (found.one_signed, found.empty) == (2, 1)


def test_unquantized_weights_have_no_error_of_their_own():
    assert of(make_weight("gaussian", SHAPE), "BF16").weight_error == 0
    assert 0 < of(make_weight("gaussian", SHAPE) * np.float32(1.1), "BF16").weight_error < 3e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_refused(value, dtype):
    weight = make_weight("gaussian", SHAPE).astype(dtype)
    weight[200, 3] = value
    with pytest.raises(SchemeError, match="NaN or infinite"):
        of(weight, "W4BF16")


def test_a_method_without_its_calibration_is_refused():
    for name in ("W4BF16-gptq", "W4BF16-awq"):
        with pytest.raises(SchemeError, match="needs calibration"):
            of(make_weight("gaussian", SHAPE), name)


def test_groups_of_one_sign_are_counted():
    weight = make_weight("gaussian", (4, 256)).astype(np.float32)
    weight[0, :64] = 0.5 + 0.1 * np.random.default_rng(0).random(64)  # the compiler destroys this one
    weight[1, 64:128] = -weight[0, :64]
    weight[2, 128:192] = 0
    weight[3, 192:] = np.abs(weight[3, 192:])  # one sign, but it begins at 0
    weight[3, 192] = 0
    for given in (weight.astype(ml_dtypes.bfloat16), weight.astype(ml_dtypes.bfloat16).astype(np.float32)):
        assert count_groups(given, 64) == (2, 1)
    # exactly those are far off when they are packed as the compiler does
    off = np.abs(dequantize(pack_int4(weight, 64), 64) - weight).reshape(4, -1, 64).max(-1) > 0.2
    assert off.sum() == 2
