"""Rounders by name and what they refuse; what a scheme stores of a matrix: its arithmetic's own rounding, or codes."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.pack import dequantize, empty_packed
from fluxkiln.quantize.rounders import as_compiler, make_rounder, plain_packer, stored_weight
from fluxkiln.quantize.schemes import SCHEME_NAMES, parse_scheme
from tests.quantize.weights import make_weight, pack_int4, pack_int8, pack_matrix, stored_as

WEIGHT = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)


@pytest.mark.parametrize(("name", "pack"), [("W4BF16-rtn", pack_int4), ("W8BF16", pack_int8)])
def test_rtn_is_the_compilers(name, pack):
    weight = make_weight("student", (8, 256))
    ours, theirs = pack_matrix(weight, parse_scheme(name)), pack(weight, 64)
    assert ours.codes_OI.tobytes() == theirs.codes_OI.tobytes()
    assert ours.scales_OG.tobytes() == theirs.scales_OG.tobytes()
    assert ours.zeros_OG.tobytes() == theirs.zeros_OG.tobytes()
    packed = empty_packed(weight.shape, 64, theirs.bits)
    as_compiler("any slot", (0, 256))(weight, theirs.bits, packed.codes_OI, packed.scales_OG, packed.zeros_OG)
    assert packed.codes_OI.tobytes() == theirs.codes_OI.tobytes()


def test_what_cannot_be_had_is_refused():
    weight = make_weight("gaussian", (4, 96))
    with pytest.raises(SchemeError, match="group size 64 does not divide 96"):
        pack_matrix(weight, parse_scheme("W4BF16"))
    with pytest.raises(SchemeError, match="W4BF16-gptq needs calibration"):
        make_rounder(parse_scheme("W4BF16-gptq"))
    for method in ("awq", "svd"):
        with pytest.raises(SchemeError, match="cannot be put into codes; use gptq, ls, mse, rtn, rtn0"):
            make_rounder(parse_scheme(f"W4BF16-{method}"))


@pytest.mark.parametrize("name", SCHEME_NAMES)
def test_float32_in_the_same_layout(name):
    for quantized in (False, True):
        stored = stored_as(parse_scheme(name), WEIGHT, quantized)
        assert stored.dtype == np.float32
        assert stored.shape == WEIGHT.shape


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F32", np.float32), ("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("W4BF16", ml_dtypes.bfloat16)],
)
def test_unquantized_weights_have_the_rounding_of_the_arithmetic(name, dtype):
    for given in (WEIGHT, WEIGHT.astype(ml_dtypes.bfloat16), WEIGHT[0], WEIGHT.reshape(32, 16, 4, 4)):
        expected = given.astype(np.float32).astype(dtype).astype(np.float32)
        np.testing.assert_array_equal(stored_weight(given, parse_scheme(name)), expected)


def test_schemes_without_codes_do_not_look_at_quantized():
    for name in ("F32", "F16", "BF16"):
        scheme = parse_scheme(name)
        np.testing.assert_array_equal(stored_as(scheme, WEIGHT), stored_weight(WEIGHT, scheme))


@pytest.mark.parametrize("name", ["W4BF16-rtn", "W4BF16-g32-rtn", "W4BF16-g128-rtn", "W8BF16"])
def test_quantized_weights_are_dequantized_codes(name):
    scheme = parse_scheme(name)
    pack = pack_int8 if scheme.weight_bits == 8 else pack_int4
    expected = dequantize(pack(WEIGHT, scheme.group_size), scheme.group_size)
    np.testing.assert_array_equal(stored_as(scheme, WEIGHT), expected)
    assert not np.array_equal(expected, stored_weight(WEIGHT, scheme))


def test_storing_twice_is_storing_once():
    """Groups that reach zero from both sides come back with the same codes."""
    for name in ("F16", "BF16", "W4BF16-rtn", "W8BF16"):
        once = stored_as(parse_scheme(name), WEIGHT)
        np.testing.assert_array_equal(stored_as(parse_scheme(name), once), once)


def test_the_scheme_says_how_codes_are_found():
    packed = pack_matrix(WEIGHT, parse_scheme("W4BF16"))
    np.testing.assert_array_equal(stored_as(parse_scheme("W4BF16-ls"), WEIGHT), dequantize(packed, 64))
    by_hand = plain_packer(parse_scheme("W4BF16-ls"), as_compiler)("any", None)(WEIGHT).dequantize(64)
    np.testing.assert_array_equal(by_hand, stored_as(parse_scheme("W4BF16-rtn"), WEIGHT))
    assert not np.array_equal(by_hand, dequantize(packed, 64))


def test_groups_that_do_not_divide_are_refused():
    with pytest.raises(SchemeError, match="64"):
        stored_as(parse_scheme("W4BF16"), WEIGHT[:, :96])
