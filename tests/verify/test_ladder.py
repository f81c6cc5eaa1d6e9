import math

import numpy as np
import pytest

from fluxkiln.errors import ParityError, UsageError
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.verify.gates import first_bad_rung
from fluxkiln.verify.ladder import Ladder, explain_failure, row_to_dict
from tests.builds import chip_ladder


def failed(ladder):
    return {(row.part, row.output, row.step, row.rung) for row in ladder.rows if not row.passed}


def test_a_sound_recording_passes(recording):
    ladder = recording.compare()
    assert failed(ladder) == set()
    assert len(ladder.rows) == len(recording.parts) * 2 * 5
    ladder.raise_if_failed("report.html")


def test_rows_compare_with_the_rung_before(recording):
    rows = [row for row in recording.compare().rows if row.part == "single.01" and row.step == 0]
    assert [row.previous for row in rows] == ["reference", "patched", "onnxruntime", "dequantized", "interpreter"]
    quantization, lowering = rows[2].vs_previous, rows[3].vs_previous
    assert quantization.delta_relative_l2 > 0.05
    assert lowering.delta_relative_l2 < 0.02
    assert rows[3].vs_reference.delta_relative_l2 > 0.05


# Negative controls: what is spoilt, and the one rung that must be named.


def test_swapped_outputs(recording):
    for output in ("hidden_states_out", "encoder_hidden_states_out"):
        for step in range(2):
            a, b = (recording.outputs[part, output, step] for part in ("double.00", "double.01"))
            a["simulator"], b["simulator"] = b["simulator"], a["simulator"]
    ladder = recording.compare()
    assert first_bad_rung(ladder.rows) == {"double.00": "simulator", "double.01": "simulator"}
    assert {rung for *_, rung in failed(ladder)} == {"simulator"}


def test_swapped_weights_are_caught_where_they_enter(recording):
    part, other = recording.part("single.00"), recording.part("single.01")
    part.weights = other.weights
    for rung in ("onnxruntime", "dequantized", "interpreter", "simulator"):
        recording.outputs["single.00", "hidden_states_out", 0][rung] = part.run(rung, 0)
    assert first_bad_rung(recording.compare().rows) == {"single.00": "onnxruntime"}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_fails_its_own_rung_only(recording, bad):
    recording.outputs["single.01", "hidden_states_out", 1]["interpreter"][2, 3] = bad
    ladder = recording.compare()
    assert failed(ladder) == {("single.01", "hidden_states_out", 1, "interpreter")}
    above = next(row for row in ladder.rows if (row.part, row.step, row.rung) == ("single.01", 1, "simulator"))
    assert above.previous == "dequantized"


def test_nan_in_the_reference_blames_the_reference(recording):
    recording.outputs["tail", "sample", 0]["reference"][0, 0] = np.nan
    assert first_bad_rung(recording.compare().rows) == {"tail": "reference"}


def test_one_scale_doubled_in_the_binary(recording):
    part = recording.part("single.02")
    for step in range(2):
        recording.outputs["single.02", "hidden_states_out", step]["simulator"] = part.run("simulator", step, (1, 5))
    ladder = recording.compare()
    assert failed(ladder) == {("single.02", "hidden_states_out", step, "simulator") for step in range(2)}


def test_a_scale_doubled_when_quantizing(recording):
    arrays = recording.outputs["double.01", "hidden_states_out", 0]
    base = recording.part("double.01").base(0)
    arrays["dequantized"] = base + (arrays["dequantized"] - base) * np.where(np.arange(64) < 8, 2, 1)
    ladder = recording.compare()
    assert first_bad_rung(ladder.rows) == {"double.01": "dequantized"}


def test_a_patch_that_forgets_a_bias(recording):
    part = recording.part("double.00")
    recording.outputs["double.00", "hidden_states_out", 0]["patched"] = part.run("patched", 0, forget_bias=True)
    ladder = recording.compare()
    assert failed(ladder) == {("double.00", "hidden_states_out", 0, "patched")}


def test_time_embedding_in_bf16(recording):
    """sin and cos of timestep * frequency, with the product rounded to bfloat16 as the naive head does."""
    frequency = np.exp(-math.log(10000) * np.arange(32) / 32)
    angle = (731.0 * frequency).astype(np.float32)
    rounded = (angle.view(np.uint32) + 0x8000 & np.uint32(0xFFFF0000)).view(np.float32)
    exact, lost = (np.concatenate([np.cos(a), np.sin(a)])[None] for a in (angle, rounded))
    ladder = chip_ladder()
    rungs = [("patched", exact), ("onnxruntime", exact), ("dequantized", exact), ("interpreter", lost)]
    ladder.compare("head", KINDS["head"], "temb", 0, exact, None, rungs, "BF16")
    assert first_bad_rung(ladder.rows) == {"head": "interpreter"}


def test_wrong_shape_fails_and_does_not_stop_the_rest(recording):
    arrays = recording.outputs["tail", "sample", 0]
    arrays["onnxruntime"] = arrays["onnxruntime"][:-1]
    ladder = recording.compare()
    assert failed(ladder) == {("tail", "sample", 0, "onnxruntime")}
    row = next(row for row in ladder.rows if not row.passed)
    assert "(11, 64)" in row.note
    assert "(12, 64)" in row.note


def test_failure_names_everything_once(recording):
    recording.outputs["double.00", "hidden_states_out", 1]["onnxruntime"] *= 1.01
    recording.outputs["single.02", "hidden_states_out", 0]["simulator"] *= 3
    ladder = recording.compare()
    with pytest.raises(ParityError) as raised:
        ladder.raise_if_failed("build/report.html")
    message = str(raised.value)
    assert raised.value.exit_code == 3
    for words in (
        "first bad rung: onnxruntime",
        "double.00",
        "step 1",
        "relative_l2 0.0",
        "5e-06",
        "build/report.html",
    ):
        assert words in message
    assert "2 of 13 parts" in message
    assert len(ladder.rows) == len(recording.parts) * 2 * 5


def test_no_rows_is_no_proof():
    with pytest.raises(ParityError, match="nothing is proven"):
        Ladder().raise_if_failed("report.html")
    assert explain_failure([]).startswith("no row was compared")


def test_unknown_rung_and_wrong_order():
    array = np.ones((2, 2))
    with pytest.raises(UsageError, match=r"no rung is called 'simulater'.*patched, onnxruntime"):
        Ladder().compare("tail", KINDS["tail"], "sample", 0, array, None, [("simulater", array)])
    with pytest.raises(UsageError, match="patched was given after onnxruntime"):
        Ladder().compare("tail", KINDS["tail"], "sample", 0, array, None, [("onnxruntime", array), ("patched", array)])
    with pytest.raises(UsageError, match="no rung is called 'simulator'"):  # it comes with a toolchain
        Ladder().compare("tail", KINDS["tail"], "sample", 0, array, None, [("simulator", array)])


def test_rungs_may_come_from_a_generator():
    array = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
    rows = chip_ladder().compare(
        "tail", KINDS["tail"], "sample", 0, array, None, ((r, array) for r in ("patched", "simulator")), "F32"
    )
    assert [(row.rung, row.previous, row.passed) for row in rows] == [
        ("patched", "reference", True),
        ("simulator", "patched", True),
    ]


def test_pipeline_rows(pictures):
    reference, actual = pictures
    latents = np.random.default_rng(0).standard_normal((1, 16, 64)).astype(np.float32)
    ladder = chip_ladder()
    ladder.compare(
        "pipeline",
        None,
        "latents",
        -1,
        latents,
        None,
        [("onnxruntime", latents), ("simulator", latents * 1.01)],
        "W4BF16",
    )
    ladder.compare(
        "pipeline", None, "image", -1, reference, None, [("onnxruntime", reference), ("simulator", actual)], "W4BF16"
    )
    assert failed(ladder) == set()
    assert ladder.rows[-1].vs_reference.psnr == pytest.approx(34, abs=2)
    ladder.compare("pipeline", None, "image", -1, reference, None, [("simulator", reference[::-1])], "W4BF16")
    ladder.compare("pipeline", None, "latents", -1, latents, None, [("simulator", latents[:, ::-1])], "W4BF16")
    assert {(row.output, row.passed) for row in ladder.rows[-2:]} == {("image", False), ("latents", False)}


def test_row_to_dict_leaves_out_what_does_not_apply(recording):
    ladder = recording.compare()
    rows = [row_to_dict(row, ladder.gates) for row in ladder.rows]
    tail = next(row for row in rows if row["part"] == "tail")
    assert "delta_cosine" not in tail["vs_reference"]
    assert "psnr" not in tail["vs_reference"]
    judged = [ladder.gates[verdict["gate"]] for verdict in tail["verdicts"]]
    assert [(gate.rung, gate.metric) for gate in judged] == [("*", "finite"), ("patched", "relative_l2")]
