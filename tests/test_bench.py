"""The bench command: its list, its refusals, and how a table gets onto the page."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bench.__main__ import NAMES, main, merge
from bench.export import write_sparse_checkpoint
from bench.figure import Figure
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.patches.flux1.tensors import component_layout


def test_list_names_every_figure_and_measures_nothing(repository):
    done = subprocess.run(
        [sys.executable, "-m", "bench", "--list"], cwd=repository, capture_output=True, text=True, check=True
    )
    assert tuple(line.split()[0] for line in done.stdout.splitlines()) == NAMES
    assert {path.stem for path in (repository / "bench").glob("[a-z]*.py")} == {
        *NAMES, "figure", "reference_sample", "against", "bundles", "peers", "lives"
    }  # fmt: skip


def test_unknown_figure_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["nope"])
    assert ended.value.code == 2
    assert "no figure is called 'nope'; there are start" in capsys.readouterr().err


def test_a_table_replaces_its_own_section_only():
    def section(name: str, value: str) -> str:
        return Figure(f"Title of {name}", ("a", "b"), ((value, "x"),), ("A note.",)).to_markdown(name, "one machine")

    page = merge(merge(merge("", section("wide", "1")), section("start", "2")), section("wide", "3"))
    assert page.count("## Title of wide") == 1
    assert page.index("Title of start") < page.index("Title of wide")
    assert "| 3 | x |" in page
    assert "| 2 | x |" in page
    assert "| 1 | x |" not in page
    assert merge(page, section("wide", "3")) == page


def test_sparse_checkpoint_is_a_checkpoint_that_takes_no_room(tmp_path):
    root = write_sparse_checkpoint(tmp_path / "model", 1, 2)
    checkpoint = open_checkpoint(root)
    layout = component_layout("transformer", checkpoint.configs["transformer"])
    assert {name: ref.shape for name, ref in checkpoint.tensors["transformer"].items()} == layout
    assert sum(ref.nbytes for ref in checkpoint.tensors["transformer"].values()) > 1.3e9
    assert sum(path.stat().st_blocks * 512 for path in root.rglob("*")) < 2e6
