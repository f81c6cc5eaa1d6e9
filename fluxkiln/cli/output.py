"""What a command says: one JSON document, or tables and lines for people; everything else goes to stderr.

Long work is shown there too: bars on a terminal, a few lines elsewhere.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeVar

import click

from fluxkiln.errors import ResourceError
from fluxkiln.progress import FROM_STORE

Clock = Callable[[], float]
_F = TypeVar("_F", bound=Callable[..., Any])
_MOST_SHOWN = 4000
# Control characters but for tab and line feed; what changes the order of writing; halves of surrogate pairs.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STYLES = {"ok": "green", "yes": "green", "passed": "green", "missing": "red", "changed": "red", "failed": "red"}


@dataclass(slots=True)
class Output:
    """Where a command's answer goes. With `as_json`, stdout carries exactly one document and tables are not drawn."""

    as_json: bool = False
    written: bool = False

    def document(self, value: Any) -> None:
        """The answer for programs; says nothing without --json."""
        if self.as_json:
            say(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))
            self.written = True

    def line(self, text: str = "") -> None:
        """A line for people."""
        if not self.as_json:
            say(visible(text))

    def facts(self, facts: Mapping[str, str]) -> None:
        """Name and value, one pair a line, values aligned; pairs without a value are left out."""
        width = max((len(name) for name, value in facts.items() if value), default=0)
        for name, value in facts.items():
            if value:
                self.line(f"{name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table for people: drawn on a terminal, aligned text elsewhere. Columns of numbers begin with `>`."""
        texts = [[visible(str(cell)) for cell in row] for row in rows]
        if fancy(sys.stdout) and not self.as_json:
            _draw(columns, texts)
        else:
            self.line("\n".join(plain_table(columns, texts)))

    def error(self, kind: str, message: str, code: int, places: Mapping[str, str] | None = None) -> int:
        """A sentence on stderr, and with --json a document unless there is one already, with the `places` of what there
        is in spite of the error; returns the exit code."""
        shown = visible(message) if len(message) < _MOST_SHOWN else visible(message[:_MOST_SHOWN]) + " ..."
        say(f"error: {shown}", err=True)
        if not self.written:
            with suppress(ResourceError):  # the first error is the one to tell
                self.document({"error": {"kind": kind, "message": message, "exit_code": code, **(places or {})}})
        return code


def say(text: str, err: bool = False, end: str = "\n") -> None:
    """A text on stdout, or on stderr with `err`. One that nobody reads any more is dropped, and what follows it.

    Raises ResourceError: stdout cannot be written to for another reason.
    """
    try:
        click.echo(text + end, err=err, nl=False)
    except OSError as error:
        stream = sys.stderr if err else sys.stdout
        # What is left in the buffer must not complain at the end either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if not err and not isinstance(error, BrokenPipeError):
            raise ResourceError(
                f"standard output cannot be written to: {error.strerror}; the work is done: send it elsewhere"
            ) from error


def visible(text: str) -> str:
    """The text with what would steer a terminal, or is no text, shown as an escape; lines stay lines."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def open_streams() -> None:
    """Standard streams that are there and take every character: one that was closed leads to nothing."""
    for number, name, mode in ((0, "stdin", os.O_RDONLY), (1, "stdout", os.O_WRONLY), (2, "stderr", os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, mode), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def json_option(command: _F) -> _F:
    """Adds --json. `main` has seen it already: errors found while the command line is read are told as JSON too."""
    text = "Print one JSON document on stdout instead of text."
    return click.option("--json", is_flag=True, expose_value=False, help=text)(command)


def fancy(stream: TextIO) -> bool:
    """Whether colours, boxes and moving bars are welcome on `stream`."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned text, two spaces between columns; the first line holds the columns' names."""
    lines = [[name.removeprefix(">") for name in columns], *([" ".join(cell.split()) for cell in row] for row in rows)]
    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    sides = [">" if name.startswith(">") else "<" for name in columns]
    return ["  ".join(map("{:{}{}}".format, line, sides, widths)).rstrip() for line in lines]


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


def count_text(count: int, noun: str) -> str:
    """`1 part`, `2 parts`."""
    return f"{count} {noun if count == 1 else noun + 's'}"


def _draw(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", show_edge=False)
    for i, column in enumerate(columns):
        # The first column names things: it is the last to be broken over lines.
        side: Any = "right" if column.startswith(">") else "left"
        table.add_column(column.removeprefix(">"), justify=side, no_wrap=i == 0, overflow="fold")
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


@dataclass(slots=True)
class StageTally:
    """Jobs of a stage, done and to be done, `over` if more than were announced; when the last few that took time were
    done; and `costs` of all of them, in order, where they are known."""

    total: int
    started: float
    done: int = 0
    stored: int = 0
    over: bool = False
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=9))
    costs: Sequence[float] = ()

    def announce(self, total: int | Sequence[float]) -> None:
        """Another number of jobs than before."""
        self.costs = () if isinstance(total, int) else tuple(total)
        self.total, self.over = max(total if isinstance(total, int) else len(total), self.done), False

    def finish(self, how: str, now: float) -> None:
        """Count a job that is done."""
        self.done += 1
        if self.done > self.total:
            self.total, self.over = self.done, True
        if not self.ends:
            self.ends.append(self.started)
        if how.startswith(FROM_STORE):
            self.stored += 1
            if len(self.ends) == 1:
                self.ends[0] = now
        else:
            self.ends.append(now)

    @property
    def complete(self) -> bool:
        return self.done >= self.total

    def remaining(self, now: float) -> float | None:
        """Seconds until the last job is done, by the costs of all jobs or at the pace of the last few; None before two
        jobs have taken time, and where less than a second is left of what was foretold."""
        if len(self.ends) < 3 or self.complete:
            return None
        pace = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        ahead = pace * (self.total - self.done)
        if done := sum(self.costs[: self.done]):
            ahead = sum(self.costs[self.done :]) * (self.ends[-1] - self.started) / done
        left = ahead - (now - self.ends[-1])
        return left if left >= 1 else None


def new_tally(total: int | Sequence[float], now: float) -> StageTally:
    tally = StageTally(0, now)
    tally.announce(total)
    return tally


class LineProgress:
    """A line when a stage ends, and every few seconds before it, also while no job ends or no stage runs: for a log."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic, interval: float = 5.0) -> None:
        self._stream, self._clock, self._interval = stream or sys.stderr, clock, interval
        self._stages: dict[str, StageTally] = {}
        self._began = self._last = clock()
        self._lock, self._over = threading.Lock(), threading.Event()

    def __enter__(self) -> LineProgress:
        threading.Thread(target=self._wait, name="progress", daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()

    def stage(self, name: str, total: int | Sequence[float]) -> None:
        with self._lock:
            now = self._clock()
            tally = self._stages.setdefault(name, new_tally(total, now))
            before = tally.complete
            tally.announce(total)
            # fewer jobs than announced: the last one is done already
            if tally.complete and not before:
                self._say(f"{name}: {_summary(tally, now)}", now)

    def done(self, stage: str, what: str, how: str) -> None:
        with self._lock:
            now = self._clock()
            tally = self._stages.setdefault(stage, StageTally(1, now))
            tally.finish(how, now)
            if tally.complete and not tally.over:
                said = f"{what} {how}" if tally.total == 1 else _summary(tally, now)
                self._say(f"{stage}: {said}", now)
            elif now - self._last >= self._interval:
                self._say(f"{stage}: {tally.done}/{tally.total}, {what} {how}{_left(tally, now)}", now)

    def note(self, text: str) -> None:
        with self._lock:
            self._say(text, self._clock())

    def tick(self) -> None:
        """Say what is waited for, if nothing was said for a while."""
        with self._lock:
            now = self._clock()
            running = [(name, tally) for name, tally in self._stages.items() if not tally.complete]
            if now - self._last >= 0.8 * self._interval:
                name, tally = running[-1] if running else ("", StageTally(1, self._began))
                told = f"{name}: {tally.done}/{tally.total}" if name else "still at work"
                self._say(f"{told} after {seconds_text(now - tally.started)}{_left(tally, now)}", now)

    def _wait(self) -> None:
        while not self._over.wait(0.2 * self._interval):
            self.tick()

    def _say(self, text: str, now: float) -> None:
        self._last = now
        with suppress(OSError):  # nobody reads it: the work goes on
            print(visible(text), file=self._stream, flush=True)


class RichProgress:
    """A bar per stage: what was done last, elapsed time, and an estimate of what remains."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._stream, self._clock, self._lock = stream, clock, threading.Lock()
        self._stages: dict[str, StageTally] = {}
        self._tasks: dict[str, Any] = {}
        # Drawn from the first stage on: a build with nothing to do does not wait for rich to be imported.
        self._bars: Any = None

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int | Sequence[float]) -> None:
        with self._lock:
            if name in self._stages:
                tally = self._stages[name]
                tally.announce(total)
                self._open().update(self._tasks[name], total=tally.total)
            else:
                self._add(name, total)

    def done(self, stage: str, what: str, how: str) -> None:
        with self._lock:
            tally = self._stages.get(stage) or self._add(stage, 1)
            tally.finish(how, self._clock())
            last = _stored(tally) if tally.complete else f"{what} {how}"
            self._open().update(self._tasks[stage], total=tally.total, completed=tally.done, last=last)

    def note(self, text: str) -> None:
        # Above the bars; not markup: it may quote a file's name.
        with self._lock:
            self._open().console.print(text, markup=False, highlight=False)

    def _add(self, name: str, total: int | Sequence[float]) -> StageTally:
        # Before the task: adding one draws it.
        self._stages[name] = new_tally(total, self._clock())
        self._tasks[name] = self._open().add_task(name, total=self._stages[name].total, last="")
        return self._stages[name]

    def _open(self) -> Any:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
            from rich.text import Text

            stages, clock = self._stages, self._clock

            class TimeColumn(ProgressColumn):
                max_refresh = 0.5

                def render(self, task: Task) -> Text:
                    shown = seconds_text((task.finished_time if task.finished else task.elapsed) or 0.0)
                    return Text(shown + _left(stages[task.description], clock()), style="cyan")

            self._bars = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeColumn(),
                TextColumn("{task.fields[last]}", style="dim", markup=False),
                console=Console(file=self._stream or sys.stderr),
                refresh_per_second=8,
            )
            self._bars.start()
        return self._bars


def open_progress() -> AbstractContextManager[LineProgress | RichProgress]:
    """Progress on stderr in the form it can show; bars end where the block ends."""
    return RichProgress() if fancy(sys.stderr) else LineProgress()


def _left(tally: StageTally, now: float) -> str:
    left = tally.remaining(now)
    return "" if left is None else f", about {seconds_text(left)} left"


def _summary(tally: StageTally, now: float) -> str:
    stored = _stored(tally)
    return f"{tally.done} done in {seconds_text(now - tally.started)}{f', {stored}' if stored else ''}"


def _stored(tally: StageTally) -> str:
    if not tally.stored:
        return ""
    return f"all {FROM_STORE}" if tally.stored == tally.done else f"{tally.stored} {FROM_STORE}"
