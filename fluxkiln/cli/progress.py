"""How long work is shown: bars on a terminal, a few lines elsewhere; always on stderr."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from fluxkiln.cli.output import fancy, seconds_text
from fluxkiln.progress import FROM_STORE

Clock = Callable[[], float]

LINE_INTERVAL = 5.0
_WINDOW = 8


@dataclass(slots=True)
class StageTally:
    """What is known of one stage: jobs done and to be done, and when the last few that took time were done.

    `over` says that more jobs were done than had been announced.
    """

    name: str
    total: int
    started: float
    done: int = 0
    stored: int = 0
    over: bool = False
    ends: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW + 1))

    def announce(self, total: int) -> None:
        """Another number of jobs than before."""
        self.total, self.over = max(total, self.done), False

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
        """Seconds until the last job is done, at the pace of the last few; None before two jobs have taken time."""
        if len(self.ends) < 3 or self.complete:
            return None
        pace = (self.ends[-1] - self.ends[0]) / (len(self.ends) - 1)
        return max(0.0, pace * (self.total - self.done) - (now - self.ends[-1]))


class LineProgress:
    """A line when a stage ends, and at most one per few seconds before: fit for a log."""

    def __init__(
        self, stream: TextIO | None = None, clock: Clock = time.monotonic, interval: float = LINE_INTERVAL
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._interval = interval
        self._stages: dict[str, StageTally] = {}
        self._last = clock()
        self._lock = threading.Lock()

    def stage(self, name: str, total: int) -> None:
        with self._lock:
            tally = self._stages.get(name)
            if tally is not None:
                before = tally.complete
                tally.announce(total)
                # fewer jobs than announced: the last one is done already
                if tally.complete and not before:
                    self._say(f"{name}: {_summary(tally, self._clock())}", self._clock())
            else:
                self._stages[name] = StageTally(name, total, self._clock())

    def done(self, stage: str, what: str, how: str) -> None:
        with self._lock:
            now = self._clock()
            tally = self._stages.setdefault(stage, StageTally(stage, 1, now))
            tally.finish(how, now)
            if tally.complete and not tally.over:
                said = f"{what} {how}" if tally.total == 1 else _summary(tally, now)
                self._say(f"{stage}: {said}", now)
            elif now - self._last >= self._interval:
                left = tally.remaining(now)
                more = f", about {seconds_text(left)} left" if left is not None else ""
                self._say(f"{stage}: {tally.done}/{tally.total}, {what} {how}{more}", now)

    def note(self, text: str) -> None:
        with self._lock:
            self._say(text, self._clock())

    def _say(self, text: str, now: float) -> None:
        self._last = now
        print(text, file=self._stream, flush=True)


class RichProgress:
    """A bar per stage: what was done last, elapsed time, and an estimate of what remains."""

    def __init__(self, stream: TextIO | None = None, clock: Clock = time.monotonic) -> None:
        self._stream = stream
        self._clock = clock
        self._stages: dict[str, StageTally] = {}
        self._tasks: dict[str, Any] = {}
        self._lock = threading.Lock()
        # Drawn from the first stage on: a build with nothing to do does not wait for rich to be imported.
        self._bars: Any = None

    def __enter__(self) -> RichProgress:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def stage(self, name: str, total: int) -> None:
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

    def _add(self, name: str, total: int) -> StageTally:
        # Before the task: adding one draws it.
        self._stages[name] = StageTally(name, total, self._clock())
        self._tasks[name] = self._open().add_task(name, total=total, last="")
        return self._stages[name]

    def _open(self) -> Any:
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bars = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                _time_column(self._times),
                TextColumn("{task.fields[last]}", style="dim", markup=False),
                console=Console(file=self._stream or sys.stderr),
                refresh_per_second=8,
            )
            self._bars.start()
        return self._bars

    def _times(self, name: str, elapsed: float | None) -> str:
        left = self._stages[name].remaining(self._clock())
        shown = seconds_text(elapsed or 0.0)
        return f"{shown}, about {seconds_text(left)} left" if left is not None else shown


def _time_column(describe: Callable[[str, float | None], str]) -> Any:
    from rich.progress import ProgressColumn, Task
    from rich.text import Text

    class TimeColumn(ProgressColumn):
        max_refresh = 0.5

        def render(self, task: Task) -> Text:
            elapsed = task.finished_time if task.finished else task.elapsed
            return Text(describe(task.description, elapsed), style="cyan")

    return TimeColumn()


@contextmanager
def open_progress() -> Iterator[LineProgress | RichProgress]:
    """Progress on stderr in the form it can show; bars end where the block ends."""
    if not fancy(sys.stderr):
        yield LineProgress()
        return
    with RichProgress() as progress:
        yield progress


def _summary(tally: StageTally, now: float) -> str:
    stored = _stored(tally)
    return f"{tally.done} done in {seconds_text(now - tally.started)}{f', {stored}' if stored else ''}"


def _stored(tally: StageTally) -> str:
    if not tally.stored:
        return ""
    return f"all {FROM_STORE}" if tally.stored == tally.done else f"{tally.stored} {FROM_STORE}"
