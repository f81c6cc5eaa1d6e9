"""What long work tells while it runs. The command line draws it; from Python it is silent by default."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

# What a job says that had nothing to do; such jobs tell nothing about how long the others take.
FROM_STORE = "from the store"
STEP_BYTES = 1_000_000_000
# told bytes done and bytes in all, of what is read or written
OnBytes = Callable[[int, int], None]


class Progress(Protocol):
    """Told of stages and of the jobs in them, from any thread."""

    def stage(self, name: str, total: int | Sequence[float]) -> None:
        """`total` jobs of stage `name` are to be done, or as many as there are costs, in any unit, in the order that
        they end in; called again, the total changes."""

    def done(self, stage: str, what: str, how: str) -> None:
        """One job of a stage is done: what it was and how (`compiled in 2.1 s`, `from the store`)."""

    def note(self, text: str) -> None:
        """A sentence worth reading."""


class Laps:
    """Seconds of one thing after the other, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What was done since the last call was `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds of all of it up to now."""
        return sum(self.seconds.values()) + time.perf_counter() - self._last


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int | Sequence[float]) -> None:
        pass

    def done(self, stage: str, what: str, how: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def count_bytes(progress: Progress, stage: str, verb: str) -> Callable[[int, int], None]:
    """Bytes done and bytes in all, as a stage of gigabytes; `verb` says what was done with them."""
    shown = 0

    def report(done: int, total: int) -> None:
        nonlocal shown
        steps = max(1, total // STEP_BYTES)
        if not shown:
            progress.stage(stage, steps)
        for _ in range(shown, done * steps // max(total, 1)):
            shown += 1
            size = f"{done / 1e9:.1f} GB" if total >= STEP_BYTES else f"{done / 1e6:.1f} MB"
            progress.done(stage, size, verb if done == total else f"of {total / 1e9:.1f} GB")

    return report


def byte_counter(total: int, report: Callable[[int, int], None] | None) -> Callable[[int], None]:
    """A function to tell that bytes were written, from any thread; `report` is told of bytes done and bytes in all."""
    done, lock = 0, threading.Lock()

    def count(nbytes: int) -> None:
        nonlocal done
        with lock:
            done += nbytes
            if report is not None:
                report(done, total)

    return count
