"""Executor `ort`: the graphs of a cpu bundle on ONNX Runtime; weights stay in their files, mapped into memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.executor import Net, find_net, require_file

if TYPE_CHECKING:
    from numpy.typing import NDArray


# of all sessions together; those that do not work sleep, but systems limit their number
MOST_THREADS = 4000


class OrtExecutor:
    """Runs parts on ONNX Runtime's CPU provider; a component's sessions stay open until it is released.

    Args:
        threads: for one operation; 0 for one on each core.
        lean: memory goes back to the system as soon as it is free (see `ort_session.OrtRunner`).
        fast: products with packed weights round their activations to 8 bits (see `ort_fast`); its name says so.
    """

    def __init__(self, nets: Mapping[str, Net], *, threads: int = 0, lean: bool = True, fast: bool = False) -> None:
        for net in nets.values():
            require_file(net)
        self.nets = dict(nets)
        self.threads = threads or _threads(len(nets))
        self.lean = lean
        self.fast = fast
        self.name = "ort, fast" if fast else "ort"
        self.sessions: dict[str, Any] = {}

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        from fluxkiln.compile.onnx.session import run_session

        return run_session(self._session(part), part, inputs)

    def load(self, component: str) -> None:
        for part, net in self.nets.items():
            if net.component == component:
                self._session(part)

    def release(self, component: str) -> None:
        for part in [part for part in self.sessions if self.nets[part].component == component]:
            del self.sessions[part]

    def drop(self, part: str) -> None:
        self.sessions.pop(part, None)

    def close(self) -> None:
        self.sessions.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        import onnxruntime

        arithmetic = "8-bit products of packed weights, float32 otherwise" if self.fast else "float32 arithmetic"
        return {"runtime": f"ONNX Runtime {onnxruntime.__version__}", "device": f"CPU, {arithmetic}"}

    def _session(self, part: str) -> Any:
        from fluxkiln.compile.onnx.session import open_session

        if part not in self.sessions:
            file: Path = find_net(self.nets, part).file
            self.sessions[part] = open_session(file, threads=self.threads, lean=self.lean, spin=False, fast=self.fast)
        return self.sessions[part]


def _threads(sessions: int) -> int:
    """0, which lets ONNX Runtime take all cores, unless that many sessions would have too many threads."""
    import os

    most = max(1, MOST_THREADS // max(1, sessions))
    return 0 if (os.cpu_count() or 1) <= most else most
