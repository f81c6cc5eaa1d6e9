"""W8A8 in texts and bytes: what the compiler is told, what it is held to, and the forms that it stores."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.compile.toolchains.tpu_mlir.forms import (
    BIAS,
    CODES,
    MULTIPLIER,
    Form,
    FormMaker,
    integer_candidates,
    likely_shifts,
    whole_rows,
)
from fluxkiln.compile.toolchains.tpu_mlir.integers import (
    ask_for_integers,
    check_integers,
    same_but_for_shifts,
    set_multipliers,
)
from fluxkiln.errors import CompileError, SchemeError
from fluxkiln.quantize.integer import INPUT_SCALE, OUTPUT_SCALE, integer_multipliers, pack_integer
from tests.quantize.weights import make_weight

WEIGHT, BIAS_VALUES = make_weight("student", (96, 64)), make_weight("gaussian", (96,))
TOP = """    %0 = "top.None"() : () -> none loc(#loc)
    %1 = "top.Input"(%arg0) {} : (tensor<1x4xf32>) -> tensor<1x4xf32> loc(#loc1)
    %2 = "top.Weight"() : () -> tensor<4x4xf32> loc(#loc2)
    %3 = "top.MatMul"(%1, %2, %0) {output_transpose = false} : (tensor<1x4xf32>) -> tensor<1x4xf32> loc(#loc3)
    %4 = "top.MatMul"(%3, %2, %0) {output_transpose = false} : (tensor<1x4xf32>) -> tensor<1x4xf32> loc(#loc4)
#loc1 = loc("x")
#loc2 = loc("w")
#loc3 = loc("first")
#loc4 = loc("second")
"""
LOWERED = """    %5 = "tpu.MatMul"(%1, %2, %0, %3, %0) {{multipliers = [1, 2], rshifts = [9, 9]}} : (tensor<1x4x!quant.uniform<i8:bf16, 2.0157480>>, tensor<4x2xi8>, none, tensor<2xsi32>, none) -> tensor<1x2x!quant.uniform<{0}:f32, 0.0078433776>> loc(#loc5)
#loc5 = loc("first")
"""  # noqa: E501  # as the compiler writes it


SCORES = """    %9 = "tpu.MatMul"(%7, %8, %0, %0, %0) {{multipliers = [3], rshifts = [9]}} : (tensor<1x2x4x8x!quant.uniform<i8:bf16, {0}>>, tensor<1x2x8x4x!quant.uniform<i8:bf16, {1}>>, none, none, none) -> tensor<1x2x4x4x!quant.uniform<i16:f32, {2}>> loc(#loc9)
"""  # noqa: E501  # as the compiler writes it


def test_what_the_compiler_is_told(tmp_path):
    (tmp_path / "top.mlir").write_text(TOP)
    arguments = ask_for_integers(tmp_path, {"first"}, (), 0, "BF16")
    lines = (tmp_path / "top.mlir").read_text().splitlines()
    assert [line.count("output_int16 = true") for line in lines][3:5] == [1, 0]
    assert (tmp_path / "table").read_text() == "x BF16\nsecond BF16\n"
    thresholds = (tmp_path / arguments[arguments.index("--calibration_table") + 1]).read_text()
    assert thresholds == "".join(f"{name} 256.0 -256.0 256.0\n" for name in ("x", "first", "second"))


def test_queries_keys_and_their_views_have_a_limit_of_their_own(tmp_path):
    lines = [
        f'    %{place} = "top.{name}"({operands}) {{output_transpose = false}} : (...) -> ... loc(#loc{place})'
        for place, (name, operands) in enumerate(
            [("None", ""), ("Input", "%arg0"), ("Rope", "%1, %0"), ("Concat", "%2, %2"), ("Permute", "%3, %0"),
             ("Rope", "%1"), ("MatMul", "%4, %5, %0"), ("Softmax", "%6")]
        )
    ]  # fmt: skip
    names = [f'#loc{place} = loc("v{place}")' for place in range(8)]
    (tmp_path / "top.mlir").write_text("\n".join([*lines, *names, ""]))
    ask_for_integers(tmp_path, (), {"v6"}, 4, "BF16")
    found = dict(line.split()[:2] for line in (tmp_path / "thresholds").read_text().splitlines())
    small = {"v2": "4.0", "v3": "4.0", "v4": "4.0", "v5": "4.0", "v6": "16.0"}
    assert found == {"v1": "256.0", "v7": "256.0", **small}
    assert "v6" not in (tmp_path / "table").read_text()
    assert (tmp_path / "top.mlir").read_text().count("output_int16 = true") == 1


def test_products_of_8_bits_are_missed():
    assert check_integers(LOWERED.format("i16"), 1, 0, 0, "net") == (1, 8)
    with pytest.raises(CompileError, match="1 of 1 matmuls take 8 bits and 0 of them hand on 16"):
        check_integers(LOWERED.format("i8"), 1, 0, 0, "net")
    with pytest.raises(CompileError, match="1 of 2 matmuls take 8 bits"):
        check_integers(LOWERED.format("i16"), 2, 0, 0, "net")


def test_a_scale_that_was_not_asked_for_is_missed():
    """As of a view that has another threshold than its producer."""
    for sound, spoilt, what in (("2.0157480", "1.0", "input"), ("0.0078433776", "0.5", "output")):
        with pytest.raises(CompileError, match=rf"net: the {what} of a matmul has .*{spoilt}>.*wants its producer's"):
            check_integers(LOWERED.format("i16").replace(sound, spoilt), 1, 0, 0, "net")
    scales = [6 / 127, 6 / 127, 36 / 32639]
    assert check_integers(SCORES.format(*scales), 0, 1, 6, "net") == (0, 0)
    with pytest.raises(CompileError, match="1 of 2 products of queries and keys are in 8 bits"):
        check_integers(SCORES.format(*scales), 0, 2, 6, "net")
    for place, what in enumerate(("query", "key", "output")):
        spoilt = [scale * (1 + (index == place)) for index, scale in enumerate(scales)]
        with pytest.raises(CompileError, match=f"net: the {what} of a matmul"):
            check_integers(SCORES.format(*spoilt), 0, 1, 6, "net")


def test_the_interpreter_gets_the_multipliers_of_the_weights():
    made = set_multipliers(LOWERED.format("i16"), {"first_multi_int32": np.array([7, 8], np.int32)})
    assert made == LOWERED.format("i16").replace("[1, 2]", "[7, 8]")
    with pytest.raises(CompileError, match="has no first_multi_int32"):
        set_multipliers(LOWERED.format("i16"), {})


def shifted(*numbers: int) -> list[int]:
    """Bytes as instructions have them: left shifts."""
    return [-number % 256 for number in numbers]


def test_shells_may_differ_in_shifts_alone(tmp_path):
    (tmp_path / "ours").write_bytes(bytes(shifted(1, 25, 3, 25, 26, 9)))

    def same(*theirs: int) -> bool:
        (tmp_path / "theirs").write_bytes(bytes(shifted(*theirs)))
        return same_but_for_shifts(tmp_path / "ours", tmp_path / "theirs", [(25, 24), (25, 25), (26, 23)])

    assert same(1, 24, 3, 25, 23, 9)
    assert not same(1, 25, 3, 25, 23, 9)
    assert not same(1, 24, 3, 25, 22, 9)
    assert not same(1, 24, 3, 25, 23, 8)
    assert not same(1, 24, 3, 25, 23, 9, 0)


def test_forms_of_a_weight():
    rows = {"w": whole_rows(WEIGHT), "b": whole_rows(BIAS_VALUES)}
    maker = FormMaker(0, 8, rows_of=rows.__getitem__)
    bias = maker.make(Form("b", BIAS, weight="w"), rows["b"]).view(np.int32)
    packed = pack_integer(WEIGHT)
    np.testing.assert_array_equal(maker.make(Form("w", CODES), rows["w"]).view(np.int8), packed.codes_OI.T.ravel())
    np.testing.assert_allclose(bias * packed.scales_O * INPUT_SCALE, BIAS_VALUES.astype(float), atol=INPUT_SCALE * 2e-3)
    multiplier = maker.make(Form("w", MULTIPLIER, shift=25), rows["w"]).view(np.int32)
    np.testing.assert_allclose(multiplier / 2**25, packed.scales_O * INPUT_SCALE / OUTPUT_SCALE, rtol=1e-5)
    np.testing.assert_allclose(packed.dequantize(), WEIGHT.astype(np.float32), atol=float(packed.scales_O.max()) / 2)
    names = [form.name for form in integer_candidates("w", (96, 64), {"w": packed.scales_O})]
    assert (names[0], set(names[1:]), len(names)) == (CODES, {MULTIPLIER}, 1 + len(likely_shifts(packed.scales_O)))
    (form,) = integer_candidates("b", (96,), {"w": packed.scales_O, "v": packed.scales_O[:3]})
    assert form == Form("b", BIAS, weight="w")


def test_a_multiplier_that_does_not_fit_is_refused():
    scales = pack_integer(WEIGHT).scales_O
    shift = likely_shifts(scales)[-1]
    assert integer_multipliers(scales, shift, "w").max() > 2**30
    with pytest.raises(SchemeError, match=r"w needs the multiplier .* at shift \d+, and a multiplier has 32 bits"):
        integer_multipliers(scales * 2, shift, "w")
