"""The screen of `fluxkiln plan`: a verdict first, and what is not known called so."""

from __future__ import annotations

import copy
import re

import pytest

from fluxkiln.build.make import plan
from fluxkiln.settings import Settings

WEIGHTS = 7_000_000


@pytest.fixture
def planned(tmp_path):
    """The plan of a build of which nothing is known but weights."""
    return plan(Settings("bm1684x", "full-dev", tokens=(504,), build_dir=tmp_path / "build"))


@pytest.fixture
def show(fluxkiln, monkeypatch):
    def run(planned, *arguments):
        monkeypatch.setattr("fluxkiln.build.make.plan", lambda *_: planned)
        return fluxkiln("plan", "bm1684x", *arguments)

    return run


def facts(out: str) -> dict[str, str]:
    pairs = (line.split(None, 1) for line in out.splitlines() if line[:1].isalpha())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def test_json_is_the_whole_plan(show, planned):
    assert show(planned, "--json").document == planned


def test_the_verdict_comes_first_and_the_jobs_are_asked_for(show, planned):
    out = show(planned).out
    assert out.splitlines()[2].startswith("verdict  ")
    assert "mould double" not in out
    assert "mould double" in show(planned, "--jobs-list").out
    assert len(out.splitlines()) <= 40, "one screen"


def test_what_is_not_known_is_called_unknown_with_the_command_that_finds_it(show, planned):
    found = facts(show(planned).out)
    assert found["verdict"].startswith("not known yet: weights alone take ")
    assert found["speed"] == "unknown"
    assert "`fluxkiln mould build bm1684x --model scenes-dev`" in found["figures"]
    assert "0 B" not in show(planned).out


def test_what_is_known_is_a_verdict_with_the_speed(show, planned):
    known = copy.deepcopy(planned)
    estimate = {"steps": 28, "step_ms": 6090.0, "once_ms": 4000.0, "image_ms": 174_520.0}
    for file in known["devices"]["files"]:
        file |= {"instructions": 5_000_000, "runtime": WEIGHTS, "origin": "compiled"}
    known["devices"] |= {"origin": "compiled", "estimate": estimate}
    for form in known["forms"]:
        form |= {"origin": "compiled", "estimate": estimate}
    found = facts(show(known).out)
    assert found["verdict"].startswith("fits: ")
    assert found["speed"].startswith("about 6.09 s a step, an image of 28 steps about 2 min 55 s, by the compiler's")
    assert "unknown" not in show(known).out


def test_a_machine_that_cannot_build_it_says_so(show, planned):
    run = show({**planned, "refused": "the disk is full; make room"})
    assert "a build would not start: the disk is full; make room" in run.out
    assert (run.code, run.err) == (1, "error: the disk is full; make room\n")


def test_what_does_not_fit_is_the_verdict(show, planned):
    planned["devices"]["load"] = None
    assert facts(show(planned).out)["verdict"].startswith("does not fit: it takes ")


def test_forms_are_compared_and_the_own_is_marked(show, planned):
    rows = [line for line in show(planned).out.splitlines() if line.startswith(("kl", "tiny")) and "hoist" in line]
    assert len(rows) == 2
    assert [row.endswith("this one") for row in rows] == [True, False]


def test_boards(fluxkiln, tmp_path):
    run = fluxkiln("plan", "bm1684x", "--board", "SE5")
    assert (run.code, "there are SE7-32, SM7, AIRBOX" in run.err) == (2, True)
    run = fluxkiln("plan", "bm1684x", "--device-memory", "much")
    assert (run.code, "'much' is no size of a memory" in run.err) == (2, True)
    run = fluxkiln("plan", "cpu", "--board", "SE7-32")
    assert (run.code, "target cpu is not planned for boards; leave it out" in run.err) == (2, True)


def test_chips_are_an_option(fluxkiln, monkeypatch):
    monkeypatch.setattr("fluxkiln.build.plan.free_bytes", lambda place: 10**15)
    monkeypatch.setattr("fluxkiln.build.plan.available_memory", lambda: 10**12)
    one, three = (
        fluxkiln("plan", "bm1684x", "--model", "full-dev", "--scheme", "BF16", "--board", board)
        for board in ("SE7-32", "SC7-HP75")
    )
    assert one.code == 1
    assert "transformer.bmodel takes" in one.err
    assert three.code == 0
    assert "transformer.1.bmodel" in three.out
    assert "on the fullest of" in three.out


def test_mixtures_are_shown_with_what_a_build_takes(show, planned):
    mixture = {
        "budget": 7_984_906_240, "scheme": "W4BF16,single.00-37=W8A8", "blocks": {"W8A8": 38, "W4BF16": 19},
        "bytes": 7_900_000_000, "step_ms": 4900.0, "error": 0.04567, "errors": "measured there",
    }  # fmt: skip
    unknown = {**mixture, "step_ms": None, "error": None}
    text = show({**planned, "mixtures": [mixture, unknown]}, "--budget", "7615MiB").out
    assert re.search(r"7.98 GB +7.90 GB +4.9 s +4.6 % +38 W8A8, 19 W4BF16 +W4BF16,single.00-37=W8A8", text)
    assert re.search(r"7.90 GB +unknown +unknown ", text)
    assert "what a block loses was measured there" in text
