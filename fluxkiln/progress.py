"""What long work tells while it runs. The command line draws it; from Python it is silent by default."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Told of stages and of the jobs in them, from any thread."""

    def stage(self, name: str, total: int) -> None:
        """`total` jobs of stage `name` are to be done; called again, the total changes."""

    def done(self, stage: str, what: str, how: str) -> None:
        """One job of a stage is done: what it was and how (`compiled in 2.1 s`, `from the store`)."""

    def note(self, text: str) -> None:
        """A sentence worth reading."""


class Silent:
    """Says nothing."""

    def stage(self, name: str, total: int) -> None:
        pass

    def done(self, stage: str, what: str, how: str) -> None:
        pass

    def note(self, text: str) -> None:
        pass
