"""`python -m bench [NAME ...]`: measure figures and print them; `--write` puts them into docs/benchmarks.md."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
from pathlib import Path

# each a module of this package with a docstring and `measure() -> Figure`; those that use the cores fully come last
NAMES = (
    "start",
    "noop",
    "pack",
    "quantize",
    "outliers",
    "blocks",
    "smoothing",
    "cast",
    "trace",
    "export",
    "pages",
    "formulations",
    "nets",
    "schemes",
    "registry",
    "hostile",
    "kills",
    "tiny",
    "wide",
    "generate",
    "runtimes",
    "full",
    "files",
    "lora",
    "neuron",
    "sample",
    "scenes",
    "thing",
)
PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks.md"
INTRODUCTION = """# Benchmarks

Made by `make bench BENCH=--write`, or `python -m bench NAME --write` for one table. Times are wall times. What stands
in one table was measured in one run, so ratios hold better than seconds. Memory is the resident memory of a process and
all its descendants, summed, at its peak.

The load average tells how busy the machine was with other work before a measurement: where it is above the number of
cores, the machine was shared and the seconds are too long.
"""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all by default")
    parser.add_argument("--list", action="store_true", help="say what each figure is, and measure nothing")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in NAMES]:
        parser.error(f"no figure is called {unknown[0]!r}; there are {', '.join(NAMES)}")
    for name in options.names or NAMES:
        module = importlib.import_module(f"bench.{name}")
        if options.list:
            print(f"{name:14}{str(module.__doc__).splitlines()[0]}")
            continue
        from bench.figure import conditions

        before = conditions()
        section = module.measure().to_markdown(name, before)
        print(section, flush=True)
        if options.write:
            PAGE.write_text(merge(PAGE.read_text() if PAGE.exists() else "", section), encoding="utf-8")
    return 0


def merge(page: str, section: str) -> str:
    """The page with `section` in place of the one of the same command, in the order of NAMES."""
    sections = {_command(one): one for one in [*_sections(page), section]}
    kept = sorted(sections, key=lambda name: NAMES.index(name) if name in NAMES else -1)
    return "\n".join([INTRODUCTION, *(sections[name] for name in kept if name in NAMES)])


def _sections(page: str) -> list[str]:
    return [f"## {text.strip()}\n" for text in re.split(r"^## ", page, flags=re.MULTILINE)[1:]]


def _command(section: str) -> str:
    found = re.search(r"`python -m bench (\w+)`", section)
    return found.group(1) if found else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
