"""`fluxkiln report` of several builds, and bad input in words."""

from __future__ import annotations

import json
import shutil

import pytest


@pytest.fixture
def other(built, tmp_path):
    """Another build beside `built`: the same report under another name."""
    folder = shutil.copytree(built, tmp_path / "other")
    document = json.loads((folder / "report.json").read_text()) | {"title": "another"}
    (folder / "report.json").write_text(json.dumps(document))
    return folder


def test_several_builds_on_one_page(fluxkiln, built, other, tmp_path):
    run = fluxkiln("report", built, other)
    assert run.code == 0, run.err
    assert list((tmp_path / "work").iterdir()) == [], "nothing is written to where the command is called"
    page = built / "comparison.html"
    assert "comparison.html: 2 bundles compared" in run.out
    assert run.out.count("Nothing was compared.") == 2
    assert "another" in page.read_text()
    document = fluxkiln("report", built, other, "--out", tmp_path / "side.html", "--json").document
    assert document["html"] == str(tmp_path / "side.html")
    assert [verdict["passed"] for verdict in document["verdicts"]] == [False, False]
    assert (tmp_path / "side.html").read_bytes() == page.read_bytes()


def test_a_page_goes_where_it_is_asked_to(fluxkiln, built, tmp_path):
    assert fluxkiln("report", built, "--out", tmp_path / "page.html").code == 0
    assert (tmp_path / "page.html").read_bytes() == (built / "report.html").read_bytes()


def test_bad_input(fluxkiln, built, other, tmp_path):
    for arguments, sentence in (
        ((), "BUILD... is missing"),
        ((built, built / "bundle"), "was given twice"),
        ((built, tmp_path / "nowhere"), "does not exist"),
        ((built, other, "--out", tmp_path), "is a folder; give the name of a file"),
        ((built, "--out", tmp_path / "no" / "page.html"), "there is no folder"),
    ):
        run = fluxkiln("report", *arguments)
        assert run.code == 2, (arguments, run.err)
        assert sentence.lower() in run.err.lower()
    (other / "report.json").write_text('{"schema": "fluxkiln.report/2"}')
    run = fluxkiln("report", built, other)
    assert run.code == 4
    assert "is not complete" in run.err
