"""Searched scales and zero points against trying everything, and against the compiler's own rounding."""

from __future__ import annotations

import ml_dtypes
import numba
import numpy as np
import pytest

from fluxkiln.quantize.pack import bf16_to_float32, dequantize
from fluxkiln.quantize.schemes import parse_scheme
from tests.quantize.weights import make_weight, pack_matrix, relative_error

SHAPE = (64, 1024)
DISTRIBUTIONS = ("gaussian", "uniform", "student", "cauchy", "channels")


@numba.njit
def try_everything(groups, scales):
    """The least squared error of each group over all 16 zero points and some scales of its range."""
    found = np.empty(len(groups))
    for g in range(len(groups)):
        values = groups[g].astype(np.float64)
        span = (max(values.max(), 0.0) - min(values.min(), 0.0)) / 15.0
        found[g] = np.inf
        for zero in range(16):
            for part in scales:
                error = 0.0
                for value in values:
                    code = min(max(np.floor(value / (span * part) + zero + 0.5), 0.0), 15.0)
                    error += ((code - zero) * span * part - value) ** 2
                found[g] = min(found[g], error)
    return found


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_least_squares_is_next_to_trying_everything(kind):
    """The bound of the format: no scale and no zero point of 0 to 15 leaves less, so no method without data can."""
    weight = make_weight(kind, SHAPE)
    groups = weight.astype(np.float32).reshape(-1, 64)
    least = np.sqrt(try_everything(groups, np.linspace(0.5, 1.1, 61)).sum()) / np.linalg.norm(groups)
    found = relative_error(weight, "W4BF16-ls")
    assert found <= 1.005 * least
    compilers = relative_error(weight, "W4BF16-rtn")
    assert found <= 0.98 * compilers
    assert least >= 0.94 * compilers


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("groups", ["-g32", "", "-g128"])
def test_order_of_the_methods(kind, groups):
    errors = {method: relative_error(make_weight(kind, SHAPE), f"W4BF16{groups}-{method}") for method in
              ("ls", "mse", "rtn0", "rtn", "ls-sym", "mse-sym")}  # fmt: skip
    assert errors["ls"] < errors["mse"] < errors["rtn0"]
    assert errors["rtn0"] <= errors["rtn"] * (1 + 1e-6)
    assert errors["ls"] < errors["ls-sym"]
    assert errors["ls-sym"] <= errors["mse-sym"] * 1.001


def test_eight_bits():
    weight = make_weight("student", SHAPE)
    errors = [relative_error(weight, f"W8BF16-{method}") for method in ("ls", "rtn")]
    assert errors[0] <= errors[1] < 0.01


@pytest.mark.parametrize("method", ["rtn0", "mse", "ls", "mse-sym", "ls-sym"])
def test_groups_of_one_sign_survive(method):
    """The compiler clips their zero point: 0.5 to 0.6 comes back near 0.1."""
    rng = np.random.default_rng(0)
    weight = (0.5 + 0.1 * rng.random((4, 128))).astype(ml_dtypes.bfloat16)
    for sign in (1, -1):
        signed = (weight.astype(np.float32) * sign).astype(ml_dtypes.bfloat16)
        assert relative_error(signed, "W4BF16-rtn") > 0.7
        assert relative_error(signed, f"W4BF16-{method}") < 0.06


@pytest.mark.parametrize("method", ["rtn", "rtn0", "mse", "ls", "ls-sym"])
def test_zeros_come_back_as_zeros(method):
    weight = make_weight("gaussian", (4, 256))
    weight[:, 64:128] = 0
    weight[1] = 0
    scheme = parse_scheme(f"W4BF16-{method}")
    packed = pack_matrix(weight, scheme)
    stored = dequantize(packed, 64)
    assert np.isfinite(stored).all()
    assert not stored[:, 64:128].any()
    assert not stored[1].any()
    assert stored[0, :64].any()


def test_codes_are_the_nearest_to_the_scale_as_it_is_stored():
    weight = make_weight("student", SHAPE)
    packed = pack_matrix(weight, parse_scheme("W4BF16-ls"))
    scales, zeros = bf16_to_float32(packed.scales_OG), packed.zeros_OG.astype(np.float32)
    codes = np.stack([packed.codes_OI & 15, packed.codes_OI >> 4], -1).reshape(len(weight), -1, 64)
    values = weight.astype(np.float32).reshape(codes.shape)
    for other in (codes - 1.0, codes + 1.0):
        legal = (other >= 0) & (other <= 15)
        moved = np.abs((other - zeros[..., None]) * scales[..., None] - values)
        kept = np.abs((codes - zeros[..., None]) * scales[..., None] - values)
        assert (kept <= moved * (1 + 1e-4))[legal].all()


@pytest.mark.parametrize("method", ["mse", "ls", "ls-sym"])
def test_rows_and_dtypes_do_not_matter(method):
    weight = make_weight("student", (24, 256))
    scheme = parse_scheme(f"W4BF16-{method}")
    whole = pack_matrix(weight, scheme)
    for part in (slice(0, 8), slice(8, 24)):
        for given in (weight[part], weight[part].astype(np.float32)):
            some = pack_matrix(given, scheme)
            np.testing.assert_array_equal(some.codes_OI, whole.codes_OI[part])
            np.testing.assert_array_equal(some.scales_OG, whole.scales_OG[part])
            np.testing.assert_array_equal(some.zeros_OG, whole.zeros_OG[part])


def test_symmetric_zero_points_are_in_the_middle():
    weight = make_weight("student", (8, 256))
    assert (pack_matrix(weight, parse_scheme("W4BF16-ls-sym")).zeros_OG == 8).all()
    assert (pack_matrix(weight, parse_scheme("W8BF16-mse-sym")).zeros_OG == 128).all()
    assert len(np.unique(pack_matrix(weight, parse_scheme("W4BF16-ls")).zeros_OG)) > 2
