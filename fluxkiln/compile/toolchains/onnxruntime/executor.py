"""Executor `ort`: graphs on ONNX Runtime's CPU provider; weights stay in their files, mapped into memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CompileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# of all sessions together; those that do not work sleep, but systems limit their number
MOST_THREADS = 4000


class OrtExecutor:
    """Runs parts by name. A session is opened at its first use and stays until it, or its component, is let go.

    Args:
        graphs: part -> graph; components: part -> component.
        threads: for one operation; 0 for one on each core.
        most_open: sessions kept open, beyond which the least recently used goes; 0 for all.
        spin: threads that wait for work keep their core busy: faster for one session, slower for many in turn.
        lean: memory goes back to the system as soon as it is free, instead of being kept for the next call: a block
            of FLUX.1's width takes 0.4 GB less and 8 to 18 % longer.
        fast: products with packed weights round their activations to 8 bits (see `onnx/fast.py`); its name says so.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        components: Mapping[str, str],
        *,
        threads: int = 0,
        most_open: int = 0,
        spin: bool = False,
        lean: bool = True,
        fast: bool = False,
    ) -> None:
        self.graphs, self.components, self.most_open = dict(graphs), dict(components), most_open
        self.threads = threads or _threads(most_open or len(graphs))
        self.options = {"spin": spin, "lean": lean, "fast": fast}
        self.name = "ort, fast" if fast else "ort"
        self.sessions: dict[str, Any] = {}  # the least recently used first

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32.

        Args:
            inputs: by the names and with the shapes of the part's kind.

        Raises:
            CompileError: no graph for the part, an input is missing, unknown or of another shape, or the run failed.
            IntegrityError: a file with weights is missing or too short.
        """
        from fluxkiln.compile.onnx.session import run_session

        return run_session(self._session(part), part, inputs)

    def load(self, component: str) -> None:
        for part in self.graphs:
            if self.components[part] == component:
                self._session(part)

    def release(self, component: str) -> None:
        for part in [part for part in self.sessions if self.components[part] == component]:
            del self.sessions[part]

    def drop(self, part: str) -> None:
        self.sessions.pop(part, None)

    def close(self) -> None:
        """Close all sessions; the executor can be used again."""
        self.sessions.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        import onnxruntime

        fast = self.options["fast"]
        arithmetic = "8-bit products of packed weights, float32 otherwise" if fast else "float32 arithmetic"
        return {"runtime": f"ONNX Runtime {onnxruntime.__version__}", "device": f"CPU, {arithmetic}"}

    def _session(self, part: str) -> Any:
        from fluxkiln.compile.onnx.session import open_session

        if part not in self.graphs:
            raise CompileError(f"there is no part {part!r}; there are {', '.join(self.graphs)}")
        session = self.sessions.pop(part, None)
        while session is None and self.most_open and len(self.sessions) >= self.most_open:
            del self.sessions[next(iter(self.sessions))]
        self.sessions[part] = session or open_session(self.graphs[part], threads=self.threads, **self.options)
        return self.sessions[part]


def _threads(sessions: int) -> int:
    """0, which lets ONNX Runtime take all cores, unless that many sessions would have too many threads."""
    most = max(1, MOST_THREADS // max(1, sessions))
    return 0 if (os.cpu_count() or 1) <= most else most
