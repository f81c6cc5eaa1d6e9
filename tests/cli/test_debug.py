"""`fluxkiln debug`: what it says, and bad input in words."""

from __future__ import annotations

import pytest

SHARED = ("--target", "cpu", "--components", "transformer")


@pytest.fixture(scope="module")
def shared(tiny_checkpoint, tmp_path_factory):
    """The options of a small build whose store the tests of this file share."""
    return (*SHARED, "--model", tiny_checkpoint().root, "--build-dir", tmp_path_factory.mktemp("build"))


def test_a_sound_part_is_said_to_be(fluxkiln, shared):
    run = fluxkiln("debug", "tail", "--values", *shared)
    assert run.code == 0, run.err
    assert "every operation stays within its tolerance" in run.out
    assert "noisiest at rung executed: " in run.out
    assert "step    0\n" in run.out
    assert "onnxruntime" in run.out
    assert "executed" in run.out
    assert "sample" in run.out
    document = fluxkiln("debug", "tail", "--json", *shared).document
    assert document["culprit"] is None
    assert [rung["rung"] for rung in document["rungs"]] == ["onnxruntime", "executed"]
    assert document["rungs"][0]["values"][0]["own"] < 2e-5


def test_a_culprit_ends_with_3_and_a_sentence(fluxkiln, shared, monkeypatch):
    from fluxkiln.compile import rungs
    from fluxkiln.verify.findings import Tolerance

    monkeypatch.setattr(rungs, "REORDERED", Tolerance(0.0, 0.0, 0.0))
    run = fluxkiln("debug", "tail", *shared)
    assert run.code == 3
    assert "tail, rung onnxruntime: the first operation out of tolerance is" in run.err
    for word in ("first out", "errors", "cause", "remedy", "makes", "reads"):
        assert word in run.out
    document = fluxkiln("debug", "tail", "--json", *shared).document
    assert document["culprit"]["rung"] == "onnxruntime"
    assert document["culprit"]["remedy"]["advice"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("tails",), "no part is called 'tails'; this model has"),
        (("tail", "--step", "7"), "step 7 was not recorded, there are 0 to 1; --steps gives the reference run more"),
        (("tail", "--step", "-1"), "step -1 was not recorded"),
        (("double_modulation.00", "--step", "2"), "step 2 was not recorded"),
        (("double.00-01", "--target", "trn1", "--granularity", "group:2"), "one is looked into at a time"),
        (("tail", "--target", "gpu"), "gpu"),
    ],
)
def test_bad_input(fluxkiln, shared, arguments, sentence):
    run = fluxkiln("debug", *shared, *arguments)
    assert run.code == 2
    assert sentence in run.err
    assert "Traceback" not in run.err
