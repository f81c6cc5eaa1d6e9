from __future__ import annotations

import io

import pytest

from fluxkiln.cli import output as output_module
from fluxkiln.cli.output import (
    Output,
    count_text,
    fancy,
    parity_text,
    path_text,
    plain_table,
    seconds_text,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_table_aligns_and_does_not_cut():
    long = "x" * 300
    lines = plain_table(("name", ">size", "why"), [("a", "1 B", long), ("bcdefg", "12 kB", "two\nlines")])
    assert lines == ["name     size  why", f"a         1 B  {long}", "bcdefg  12 kB  two lines"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (75, "1 min 15 s"), (3725, "1 h 2 min")]
)
def test_seconds_text(seconds, text):
    assert seconds_text(seconds) == text


def test_count_text():
    assert [count_text(n, "part") for n in (0, 1, 2)] == ["0 parts", "1 part", "2 parts"]


@pytest.mark.parametrize(
    ("parity", "text"),
    [
        ({"verified": False}, "not verified"),
        ({}, "not verified"),
        (
            {"verified": True, "passed": False, "rows": 9, "failed_rows": 2, "rungs": ["a"]},
            "failed: 2 of 9 comparisons on 1 rung",
        ),
        ({"passed": True, "rows": 1}, "passed: 1 comparison, all within their gates"),
    ],
)
def test_parity_text(parity, text):
    assert parity_text(parity) == text


def test_path_text(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert path_text(tmp_path / "build" / "x") == "build/x"
    assert path_text(tmp_path.parent) == str(tmp_path.parent)


def test_document_has_no_numbers_that_json_lacks(capsys):
    Output(as_json=True).document({"worst": float("nan"), "rows": (1, float("-inf"))})
    assert '"NaN"' in (out := capsys.readouterr().out)
    assert '"-Infinity"' in out


def test_json_silences_what_is_for_people(capsys):
    output = Output(as_json=True)
    output.line("text")
    output.facts({"name": "value"})
    output.table(("name",), [("value",)])
    assert capsys.readouterr().out == ""


def test_facts_without_values_are_left_out(capsys):
    Output().facts({"bundle": "here", "much longer": "", "time": "1 s"})
    assert capsys.readouterr().out == "bundle  here\ntime    1 s\n"


def test_fancy_is_for_terminals(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    assert fancy(Terminal())
    assert not fancy(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not fancy(Terminal())


def test_table_on_a_terminal_is_drawn_and_keeps_markup_as_text(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(output_module.sys, "stdout", terminal := Terminal())
    Output().table(("patch", "state"), [("[bold]head", "changed")])
    assert "─" in terminal.getvalue()
    assert "[bold]head" in terminal.getvalue()
