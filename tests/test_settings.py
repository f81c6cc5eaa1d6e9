"""Each option of a build is described once: command line, make and documentation say the same."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from fluxkiln.cli.options import settings_options
from fluxkiln.errors import UsageError
from fluxkiln.settings import DEFAULT_PROMPT, OPTIONS, Settings, parse_bytes, read_settings

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
HEADING = "| variable |"
# setting -> what is written, what it means
GIVEN = {
    "model": ("wide-dev", "wide-dev"),
    "statistics": ("flux", "flux"),
    "size": ("64x32,32x48", ((64, 32), (32, 48))),
    "tokens": ("16,24", (16, 24)),
    "scheme": ("F32", "F32"),
    "vae": ("tiny", "tiny"),
    "components": ("transformer, vae", ("transformer", "vae")),
    "loras": ("a.safetensors:0.5,b.safetensors", ((Path("a.safetensors"), 0.5), (Path("b.safetensors"), 1.0))),
    "modulation": ("inline", "inline"),
    "instance": ("big", "big"),
    "tp_degree": ("2", 2),
    "granularity": ("group:2", "group:2"),
    "flags": ("published", "published"),
    "board": ("SE7-32", "SE7-32"),
    "device_memory": ("1.5GiB", 3 << 29),
    "devices": ("3", 3),
    "jobs": ("3", 3),
    "build_dir": ("there", Path("there")),
    "store": ("shared", Path("shared")),
    "seed": ("7", 7),
    "steps": ("5", 5),
    "prompt": ("a river", "a river"),
    "prompts": ("prompts.txt", ("one", "two")),
    "seeds": ("0-1,3", (0, 1, 3)),
    "verify": (None, False),
    "recording": ("double, tail", ("double", "tail")),
    "force": (None, True),
    "prove": (None, True),
}  # fmt: skip


def settings_of(*words: str) -> Settings:
    """What a command with the options of a build is handed."""
    seen = []

    @click.command()
    @settings_options
    def command(settings_for):
        seen.append(settings_for("cpu"))

    done = CliRunner().invoke(command, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return seen[0]


def test_every_setting_but_the_target_is_described():
    assert ["target", *OPTIONS] == [one.name for one in fields(Settings)] == ["target", *GIVEN]
    assert len({option.flag for option in OPTIONS.values()}) == len(OPTIONS)


def test_without_options_the_defaults():
    assert settings_of() == Settings("cpu") == read_settings("cpu", {})
    assert settings_of("--prompt=").prompt == DEFAULT_PROMPT


@pytest.mark.parametrize("name", GIVEN)
def test_an_option_sets_its_setting_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("one\ntwo\n")
    Path("a.safetensors").touch()
    Path("b.safetensors").touch()
    text, value = GIVEN[name]
    flag = f"--{OPTIONS[name].flag}"
    found, default = settings_of(flag if text is None else f"{flag}={text}"), Settings("cpu")
    changed = {one.name for one in fields(Settings) if getattr(found, one.name) != getattr(default, one.name)}
    assert changed == {name}
    assert getattr(found, name) == value


def make_pairs(text: str) -> dict[str, dict[str, str]]:
    """The Makefile's lists of variable:option."""
    joined = text.replace("\\\n", " ")
    lists = dict(re.findall(r"^(MODELS|NAMES) = (.*)$", joined, re.MULTILINE))
    return {name: dict(pair.split(":") for pair in words.split() if ":" in pair) for name, words in lists.items()}


def make_differences(text: str) -> list[str]:
    """Where the Makefile's lists and its help are not as the settings are described."""
    described = {option.flag.upper(): option for option in OPTIONS.values() if option.make}
    built = {name: one.flag for name, one in described.items() if one.make == "build"}
    images = {name: one.flag for name, one in described.items() if one.make == "images"}
    pairs = make_pairs(text)
    shown = text.partition('"Variables: ')[2].partition("Of images:")[0]
    named = dict(re.findall(r'(?<![^\s"])([A-Z]+)(?:=([^\s"]+))?(?![^\s"])', shown))
    metavars = {name: one.metavar or "" for name, one in described.items()}
    compared = {
        "what is built": (pairs["MODELS"], built),
        "the images": (pairs["NAMES"], images),
        "help": (named, metavars),
    }
    return [
        f"{place}: {name} is {found.get(name)!r}, not {wanted.get(name)!r}"
        for place, (found, wanted) in compared.items()
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]


def test_make_has_the_variables_that_are_described():
    assert make_differences(MAKEFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        (" VAE:vae", "", ["what is built: VAE is None, not 'vae'"]),
        (" VAE:vae", " VAE:vae LNC:lnc", ["what is built: LNC is 'lnc', not None"]),
        ("TP:tp", "TP:tp-degree", ["what is built: TP is 'tp-degree', not 'tp'"]),
        (" SEEDS:seeds", "", ["the images: SEEDS is None, not 'seeds'"]),
        (" JOBS=N", "", ["help: JOBS is None, not 'N'"]),
        ("VAE=kl|tiny", "VAE=kl LNC=N", ["help: LNC is 'N', not None", "help: VAE is 'kl', not 'kl|tiny'"]),
    ],
)
def test_a_makefile_that_says_otherwise_is_seen(old, new, seen):
    assert old in MAKEFILE
    assert make_differences(MAKEFILE.replace(old, new)) == seen


def variables_table() -> str:
    """The documentation's table of make's variables; there is one."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [
        table
        for page in pages
        for table in re.findall(r"(?:^\|.*\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
        if table.startswith(HEADING)
    ]
    (table,) = found
    return table


def table_differences(table: str) -> list[str]:
    """Variables that are not in both, and legal values and defaults that a row leaves out."""
    described = {option.flag.upper(): option for option in OPTIONS.values() if option.make}
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]
    listed = {name: row for row in rows for name in re.findall(r"`([A-Z_]+)`", row[0])}
    differences = [f"{name} is in one place only" for name in sorted(listed.keys() ^ described.keys())]
    for name in sorted(listed.keys() & described.keys()):
        option, row = described[name], listed[name]
        values = (option.metavar or "").split("|") if "|" in (option.metavar or "") else []
        words = set(re.findall(r"`([^`]+)`", " ".join(row[1:])))
        differences += [f"{name} may be {value}" for value in values if value not in words]
        if isinstance(option.default, int | str) and not re.search(rf"\b{option.default}\b", row[-1]):
            differences.append(f"{name} is {option.default} by default")
    return differences


def test_the_documentation_lists_the_variables_that_are_described():
    assert table_differences(variables_table()) == []


@pytest.mark.parametrize(
    ("old", "new", "seen"),
    [
        ("`VAE`", "`VEA`", ["VAE is in one place only", "VEA is in one place only"]),
        ("`JOBS`", "`JOBS`, `LNC`", ["LNC is in one place only"]),
        ("`inline`", "`outline`", ["MODULATION may be inline"]),
        ("`scenes-dev` |", "`wide-dev` |", ["MODEL is scenes-dev by default"]),
    ],
)
def test_a_table_that_says_otherwise_is_seen(old, new, seen):
    table = variables_table()
    assert old in table
    assert table_differences(table.replace(old, new)) == seen


@pytest.mark.parametrize(
    ("text", "size"),
    [("16GiB", 16 << 30), ("12.5 GB", 12_500_000_000), ("7615mib", 7615 << 20), ("1TB", 10**12), ("900B", 900)],
)
def test_sizes_of_memory(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "16", "GiB", "0GB", "-1GB", "16 parsecs", "1e9GB", "16GiB 2", "9" * 12 + "B"])
def test_a_memory_that_is_none(text):
    with pytest.raises(UsageError, match="is no size of a memory; write a number and GB, GiB, MB or MiB"):
        parse_bytes(text)
