"""The pages on adding a target and a model show the examples as they stand, and name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fluxkiln.compile.toolchain import Toolchain
from fluxkiln.patches.model import Model
from fluxkiln.plugins import _holes
from tests.docs.pages import ROOT, code_blocks

PAGES = {"adding-a-target.md": "toy_target", "adding-a-model.md": "toy_model"}


def example(name: str) -> str:
    """All files of an example."""
    files = sorted(path for path in (ROOT / "tests" / "examples" / name).rglob("*") if path.suffix in (".py", ".toml"))
    return "\n".join(path.read_text(encoding="utf-8") for path in files)


def not_in(page: Path, source: str) -> list[str]:
    """Blocks of code of a page that do not stand in a source as they are, but for how far they are indented."""
    shown, bare = [*code_blocks(page, "python"), *code_blocks(page, "toml")], unindented(source)
    return [block for block in shown if any(unindented(piece) not in bare for piece in block.split("\n\n"))]


def unindented(text: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines())


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_shows_is_the_example(page):
    assert len(code_blocks(ROOT / "docs" / page, "python")) >= 3
    assert not_in(ROOT / "docs" / page, example(PAGES[page])) == []


def test_code_that_is_no_longer_so_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\nTOOLCHAIN = OnnxReference()\n```\n\n```python\nTOOLCHAIN = Other()\n```\n")
    assert not_in(page, example("toy_target")) == ["TOOLCHAIN = Other()\n"]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_a_page(page):
    assert len((ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()) <= 110


def first_column(page: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)


def test_the_methods_without_a_default_are_those_of_the_protocol():
    assert sorted(first_column("adding-a-target.md")) == sorted(_holes(Toolchain))


def test_what_the_toy_model_says_is_of_the_protocol():
    text = (ROOT / "docs" / "adding-a-model.md").read_text(encoding="utf-8")
    named = {name for line in re.findall(r"^\| .* \| (.*) \|$", text, re.MULTILINE)
             for name in re.findall(r"`(\w+)`", line)}  # fmt: skip
    assert len(named) > 8
    assert {name for name in named if not hasattr(Model, name) and name not in Model.__annotations__} == set()
