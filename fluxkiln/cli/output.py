"""What a command says: one JSON document, or tables and lines for people; everything else goes to stderr."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

_F = TypeVar("_F", bound=Callable[..., Any])
_STYLES = {"ok": "green", "yes": "green", "passed": "green", "missing": "red", "changed": "red", "failed": "red"}


@dataclass(slots=True)
class Output:
    """Where a command's answer goes. With `as_json`, stdout carries exactly one document and tables are not drawn."""

    as_json: bool = False
    written: bool = False

    def document(self, value: Any) -> None:
        """The answer for programs; says nothing without --json."""
        if self.as_json:
            click.echo(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))
            self.written = True

    def line(self, text: str = "") -> None:
        """A line for people."""
        if not self.as_json:
            click.echo(text)

    def facts(self, facts: Mapping[str, str]) -> None:
        """Name and value, one pair a line, values aligned; pairs without a value are left out."""
        width = max((len(name) for name, value in facts.items() if value), default=0)
        for name, value in facts.items():
            if value:
                self.line(f"{name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> None:
        """A table for people: drawn on a terminal, aligned text elsewhere. `numbers` names columns set to the right."""
        if self.as_json:
            return
        if fancy(sys.stdout):
            _draw(columns, rows, numbers)
        else:
            for line in plain_table(columns, rows, numbers):
                click.echo(line)

    def error(self, kind: str, message: str, code: int, places: Mapping[str, str] | None = None) -> None:
        """A sentence on stderr, and with --json a document unless there is one already.

        Args:
            places: what lies where in spite of the error, for the document.
        """
        click.echo(f"error: {message}", err=True)
        if not self.written:
            self.document({"error": {"kind": kind, "message": message, "exit_code": code, **(places or {})}})


def json_option(command: _F) -> _F:
    """Adds --json. `main` has seen it already: errors found while the command line is read are told as JSON too."""
    return click.option(
        "--json", is_flag=True, expose_value=False, help="Print one JSON document on stdout instead of text."
    )(command)


def fancy(stream: TextIO) -> bool:
    """Whether colours, boxes and moving bars are welcome on `stream`."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str] = ()) -> list[str]:
    """Aligned text, two spaces between columns; the first line holds the columns' names."""
    lines = [list(columns), *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in lines
    ]


def seconds_text(seconds: float) -> str:
    """75 -> `1 min 15 s`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def path_text(path: Path) -> str:
    """As seen from the current folder where it lies below it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def parity_text(parity: Mapping[str, Any]) -> str:
    """The parity summary of a build in a few words."""
    if not parity.get("verified", parity.get("rows")):
        return "not verified"
    rungs = f" on {count_text(len(parity['rungs']), 'rung')}" if parity.get("rungs") else ""
    if parity.get("passed"):
        return f"passed: {count_text(parity.get('rows', 0), 'comparison')}{rungs}, all within their gates"
    return f"failed: {parity.get('failed_rows', 'some')} of {count_text(parity.get('rows', 0), 'comparison')}{rungs}"


def count_text(count: int, noun: str, plural: str = "") -> str:
    """`1 part`, `2 parts`."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for i, column in enumerate(columns):
        # The first column names things: it is the last to be broken over lines.
        table.add_column(column, justify="right" if column in numbers else "left", no_wrap=i == 0, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    Console(highlight=False).print(table)


def _finite(value: Any) -> Any:
    """JSON's own types; NaN and infinity, which it has no number for, become strings."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
