"""The pages of the documentation as tests read them: blocks of code, links, prose and its sentences."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_blocks(page: Path, language: str) -> list[str]:
    """The page's fenced blocks of a language, in order."""
    return [text for found, text in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def without_fences(page: Path) -> str:
    """The page without its fenced blocks."""
    return _BLOCK.sub("\n\n", page.read_text(encoding="utf-8"))


def sentences(page: Path) -> list[str]:
    """The sentences of a page's prose: no code, tables, headings or pictures; a point of a list ends a sentence."""
    text = without_fences(page)
    lines = []
    for line in text.splitlines():
        if line.startswith(("    ", "|", "#", "![")) and not line.startswith("    - "):
            line = ""
        lines.append(re.sub(r"^\s*(- |\d+\. )", "\n", line))
    found = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        plain = re.sub(r"`[^`]*`", "code", paragraph)
        plain = re.sub(r"\]\([^)]*\)", "]", plain)
        found += [one for one in re.split(r"(?<=[.!?])[\"')\]*]*\s+", plain.strip()) if words(one)]
    return found


def words(text: str) -> int:
    return len(re.findall(r"[\w'][\w'.,/x-]*", text))


def words_per_sentence(page: Path) -> float:
    counts = [words(one) for one in sentences(page)]
    return sum(counts) / len(counts)
