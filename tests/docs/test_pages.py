"""The pages themselves: length, words, links, imports, and what they show of the tree."""

from __future__ import annotations

import ast
import importlib
import re
import textwrap
from pathlib import Path

import pytest

import fluxkiln
from tests.docs.pages import PAGES, ROOT, code_blocks, words_per_sentence

README = ROOT / "README.md"
MOST_LINES, MOST_WORDS, MOST_AVERAGE = 150, 15, 18
# Pages of figures, which a benchmark writes.
WRITTEN = ("benchmarks.md",)
_ANCHOR_DROPPED = re.compile(r"[^\w\- ]")


def glossary(text: str) -> dict[str, str]:
    """Word -> meaning of the table that is headed so."""
    table = text.partition("| word | meaning |\n|---|---|\n")[2].partition("\n\n")[0]
    return dict(line.strip("| ").split(" | ", 1) for line in table.splitlines())


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def test_the_glossary_is_in_the_first_screen_and_in_the_package():
    text = README.read_text(encoding="utf-8")
    words = glossary(text)
    assert 10 <= len(words) <= MOST_WORDS
    assert text[: text.index(f"| {list(words)[-1]} |")].count("\n") < 40
    assert fluxkiln.__doc__ is not None
    points = textwrap.dedent(fluxkiln.__doc__.split("\n\n", 1)[1])
    said = re.sub(r"\n +", " ", points).strip().splitlines()
    assert said == [f"{word}: {meaning}." for word, meaning in words.items()]


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WRITTEN], ids=lambda page: page.name)
def test_sentences_are_short(page):
    assert words_per_sentence(page) <= MOST_AVERAGE


def test_long_sentences_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# Title\n\nOne two three. " + "word " * 35 + "end.\n\n    code is not counted\n\n| nor | a table |\n"
    )
    assert words_per_sentence(page) == (3 + 36) / 2


def anchors(page: Path) -> set[str]:
    """As GitHub makes them from headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {_ANCHOR_DROPPED.sub("", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links to files or headings that are not there."""
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "other.md").write_text("# A heading: one\n")
    page = tmp_path / "page.md"
    page.write_text("[a](other.md) [b](other.md#a-heading-one) [c](gone.md) [d](other.md#two) [e](https://x.example)")
    assert broken_links(page) == ["gone.md", "other.md#two"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_package_that_a_page_names_exist(page):
    named = re.findall(r"`(fluxkiln/[\w./]+|tests/[\w./]+)`", page.read_text(encoding="utf-8"))
    assert [path for path in named if not (ROOT / path).exists()] == []


def imports(source: str) -> list[tuple[str, str]]:
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [(node.module or "", alias.name) for node in found for alias in node.names]


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "commands.md"], ids=lambda page: page.name)
def test_what_the_pages_import_is_there(page):
    for source in code_blocks(page, "python"):
        for module, name in imports(source):
            if module.startswith("fluxkiln"):
                assert hasattr(importlib.import_module(module), name), f"{module} has no {name}"


# what was measured has a unit; what a command measured it with is code
MEASURED = re.compile(r"(?<![\w.-])\d[\d,.]*\s?(?:s|ms|min|h|GB|MB|kB|%|dB)(?!\w)|\b\d+\s+times as")
COMMAND = re.compile(r"python -m bench|bench \w+|fluxkiln [a-z]+|make [a-z0-9]+|tests/|--[a-z]+")
NOT_MEASURED = {"10 %": "an example of what a block may add to its stream"}


def figures_alone(page: Path) -> dict[str, list[str]]:
    """Sections that have figures and name no command that gives them -> the figures."""
    found = {}
    for section in re.split(r"^(?=#)", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        code = re.findall(r"`([^`]+)`|^    (.*)", section, re.MULTILINE)
        figures = [one for one in MEASURED.findall(re.sub(r"`[^`]*`", "", section)) if one not in NOT_MEASURED]
        if figures and not any(COMMAND.search(span or line) for span, line in code):
            found[section.splitlines()[0]] = figures
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_have_the_command_that_gives_them_beside_them(page):
    assert figures_alone(page) == {}


def test_figures_without_a_command_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# One\n\nIt takes 3.5 s and 39 times as much.\n\n# Two\n\n7 GB, by `python -m bench full`\n\n"
        "# Three\n\n19 blocks of width 3072, `--size 8` and 4-bit codes.\n\n# Four\n\n| 81 MB |\n\n    not a command\n"
    )
    assert figures_alone(page) == {"# One": ["3.5 s", "39 times as"], "# Four": ["81 MB"]}
