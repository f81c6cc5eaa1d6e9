"""Bytes that were moved, told to a progress display in steps; any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from fluxkiln.artifacts.registry.document import Layer

STEP_BYTES = 64 << 20


class Progress(Protocol):
    """The part of `fluxkiln.progress.Progress` that is used here."""

    def stage(self, name: str, total: int) -> None: ...

    def done(self, stage: str, what: str, how: str) -> None: ...


class Meter:
    """One stage whose jobs are steps of 64 MiB; a file below that is one step."""

    def __init__(self, progress: Progress | None, stage: str, layers: Sequence[Layer]) -> None:
        self._progress, self._stage = progress, stage
        self._lock = threading.Lock()
        self._told: dict[str, int] = {}
        self._moved: dict[str, int] = {}
        if progress is not None:
            progress.stage(stage, sum(_steps(layer.size) for layer in layers))

    def counter(self, layer: Layer) -> Callable[[int], None]:
        """Called with the bytes that were moved since the last call."""

        def moved(count: int) -> None:
            with self._lock:
                total = self._moved[layer.path] = self._moved.get(layer.path, 0) + count
            # The last step belongs to `finish`: only then it is known that all is well.
            self._tell(layer, min(total // STEP_BYTES, _steps(layer.size) - 1), f"{total >> 20} MiB")

        return moved

    def finish(self, layer: Layer, how: str) -> None:
        """The file is done."""
        self._tell(layer, _steps(layer.size), how)

    def _tell(self, layer: Layer, steps: int, how: str) -> None:
        if self._progress is None:
            return
        with self._lock:
            new = steps - self._told.get(layer.path, 0)
            self._told[layer.path] = max(steps, self._told.get(layer.path, 0))
        for _ in range(new):
            self._progress.done(self._stage, layer.path or "config", how)


def _steps(size: int) -> int:
    return max(1, -(-size // STEP_BYTES))
