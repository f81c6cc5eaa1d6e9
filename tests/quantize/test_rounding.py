"""Rounders by name, what they refuse, and groups that deserve a look."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.pack import empty_packed
from fluxkiln.quantize.rounding import as_compiler, inspect_groups, make_rounder, pack_matrix
from fluxkiln.quantize.schemes import parse_scheme
from tests.quantize.weights import make_weight, pack_int4, pack_int8


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


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_what_is_not_finite_is_refused(value, dtype):
    weight = make_weight("gaussian", (4, 128)).astype(dtype)
    weight[2, 77] = value
    with pytest.raises(SchemeError, match="NaN or infinite"):
        pack_matrix(weight, parse_scheme("W4BF16"))


def test_what_cannot_be_had_is_refused():
    weight = make_weight("gaussian", (4, 96))
    with pytest.raises(SchemeError, match="group size 64 does not divide 96"):
        pack_matrix(weight, parse_scheme("W4BF16"))
    with pytest.raises(SchemeError, match="W4BF16-gptq needs calibration"):
        make_rounder(parse_scheme("W4BF16-gptq"))
    for method in ("awq", "svd"):
        with pytest.raises(SchemeError, match="cannot be put into its codes; use gptq, ls, mse, rtn, rtn0"):
            make_rounder(parse_scheme(f"W4BF16-{method}"))


def test_groups_of_one_sign_are_counted():
    weight = make_weight("gaussian", (4, 256)).astype(np.float32)
    weight[0, :64] = 0.5 + 0.1 * np.random.default_rng(0).random(64)  # the compiler destroys this one
    weight[1, 64:128] = -weight[0, :64]
    weight[2, 128:192] = 0
    weight[3, 192:] = np.abs(weight[3, 192:])  # one sign, but it begins at 0
    weight[3, 192] = 0
    for given in (weight.astype(ml_dtypes.bfloat16), weight.astype(ml_dtypes.bfloat16).astype(np.float32)):
        counts = inspect_groups(given, 64)
        assert (counts.groups, counts.one_signed, counts.empty, counts.finite) == (16, 2, 1, True)
    # exactly those are far off when they are packed as the compiler does
    from fluxkiln.quantize.pack import dequantize

    off = np.abs(dequantize(pack_int4(weight, 64), 64) - weight).reshape(4, -1, 64).max(-1) > 0.2
    assert off.sum() == 2
