"""The compiler's estimate: read from what it writes, absent when it is not there, summed over an image."""

from __future__ import annotations

import pytest

from fluxkiln.compile.toolchains.tpu_mlir.compiler import PROFILE, read_estimate
from fluxkiln.compile.toolchains.tpu_mlir.devices import estimate_pipeline
from fluxkiln.patches.flux1.kinds import make_part

HEAD = "s: start time, b: bd_id, g: gdma_id, e: end time, t: cmd cost time, dr: direction, sz: memsize, bw: bandwidth"
# two commands of the tensor unit and two of the memory unit, one of each on one line
COMMANDS = """
                                        Load_1|GDMA_TENSOR|s:0|b:0|g:1|e:453|t:454|dr:0|sz:24576|bw:50.41
LayerNorm_30|AR|s:454|b:1|g:1|e:469|t:16
Mul_2|AR|s:470|b:2|g:1|e:569|t:100      Store_3|GDMA_TENSOR|s:470|b:2|g:2|e:999|t:530|dr:1|sz:24576|bw:38.21
"""
TOTAL = "API_END total_cycle:1000|b:2|g:2\nTCYC : 1000\n"
RUNTIME = "flops: 79432192, runtime: 0.001000ms, ComputationAbility: 1.146108T"


def profile(folder, text):
    (folder / PROFILE).write_text(text)
    return folder


def test_cycles_of_both_units_and_their_overlap(tmp_path):
    found = read_estimate(profile(tmp_path, HEAD + COMMANDS + TOTAL + RUNTIME), "bm1684x")
    assert found["estimate_ms"] == pytest.approx(1e-3)
    assert found["estimate_tensor_ms"] == pytest.approx(116e-6)
    assert found["estimate_memory_ms"] == pytest.approx(984e-6)
    # they overlap by 100 cycles, so together they are longer than the whole
    assert found["estimate_tensor_ms"] + found["estimate_memory_ms"] > found["estimate_ms"]


def test_a_net_without_arithmetic_has_no_runtime_line(tmp_path):
    found = read_estimate(profile(tmp_path, HEAD + COMMANDS + TOTAL), "bm1684x")
    assert found["estimate_ms"] == pytest.approx(1e-3)


def test_each_chip_has_its_clock(tmp_path):
    text = HEAD + COMMANDS + "TCYC : 1000. (bdc_cycle:116, gdma_cycle:984)\n" + RUNTIME.replace("0.001000", "0.001111")
    found = read_estimate(profile(tmp_path, text), "bm1688")
    assert found["estimate_ms"] == pytest.approx(1 / 900)
    assert found["estimate_tensor_ms"] == pytest.approx(116 / 900_000)


@pytest.mark.parametrize(
    ("text", "chip"),
    [
        ("", "bm1684x"),
        (HEAD + COMMANDS, "bm1684x"),  # ended in the middle
        (TOTAL.replace("1000", "0"), "bm1684x"),
        (TOTAL + TOTAL, "bm1684x"),
        (TOTAL + RUNTIME.replace("0.001000", "0.002000"), "bm1684x"),  # another clock
        (TOTAL, "sg2380"),
    ],
)
def test_what_is_not_understood_is_no_estimate(tmp_path, text, chip):
    assert set(read_estimate(profile(tmp_path, text), chip).values()) == {None}


def test_no_file_is_no_estimate(tmp_path):
    assert set(read_estimate(tmp_path, "bm1684x").values()) == {None}


def part(name, kind=""):
    return make_part(name, kind or name.partition(".")[0])


PARTS = {
    part("clip"): 4.0,
    part("t5_embed"): 0.5,
    part("head"): 3.0,
    part("double.00"): 110.0,
    part("double.01"): 111.0,
    part("single.00"): 107.0,
    part("tail"): 2.0,
    part("vae_decoder"): 1318.0,
}


def test_an_image_is_its_steps_and_what_runs_once():
    found, missing = estimate_pipeline(PARTS, steps=28)
    assert found["step_ms"] == pytest.approx(333.0)
    assert found["once_ms"] == pytest.approx(1322.5)
    assert found["image_ms"] == pytest.approx(1322.5 + 28 * 333.0)
    assert found["by_kind"]["double"] == {"parts": 2, "ms": 221.0}
    assert missing == []


def test_a_part_without_an_estimate_is_named_and_not_0():
    once, missing = estimate_pipeline(PARTS | {part("t5_embed"): None}, steps=2)
    assert missing == ["t5_embed"]
    assert once["once_ms"] == pytest.approx(1322.0)
    assert once["image_ms"] == pytest.approx(1322.0 + 2 * 333.0)
    step, missing = estimate_pipeline(PARTS | {part("single.00"): None}, steps=2)
    assert missing == ["single.00"]
    assert step["step_ms"] is None
    assert step["image_ms"] is None
    assert "single" not in step["by_kind"]
    decoder, missing = estimate_pipeline({part("vae_decoder"): 1318.0}, steps=28)
    assert (decoder["once_ms"], decoder["step_ms"], decoder["image_ms"], missing) == (1318.0, None, None, [])


def test_hoisted_modulation_is_paid_once():
    plain, _ = estimate_pipeline(PARTS, steps=10)
    for kind in ("time_embed", "double_modulation", "single_modulation", "tail_modulation"):
        hoisted, _ = estimate_pipeline({**PARTS, part("hoisted", kind): 5.0}, steps=10)
        assert hoisted["step_ms"] == plain["step_ms"]
        assert hoisted["image_ms"] == pytest.approx(plain["image_ms"] + 5.0)
    # the control: blocks that take the hoisted rows still run at every step
    more, _ = estimate_pipeline({**PARTS, part("more", "single_modulated"): 5.0}, steps=10)
    assert more["step_ms"] == pytest.approx(plain["step_ms"] + 5.0)


@pytest.mark.tpu_mlir
def test_the_compiler_leaves_an_estimate(compile_matmul):
    facts = {width: compile_matmul(width, "F32")[1].facts for width in (128, 256)}
    for found in facts.values():
        assert 0 < found["estimate_tensor_ms"] <= found["estimate_ms"]
        assert 0 < found["estimate_memory_ms"] <= found["estimate_ms"]
    # twice the weight to load
    assert facts[256]["estimate_memory_ms"] > facts[128]["estimate_memory_ms"]
