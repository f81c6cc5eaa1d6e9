"""What a figure is, and how wall time and memory are taken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_VERSION

ROOT = Path(__file__).resolve().parent.parent
# synthetic checkpoints and moulds are kept here between runs; what is to be cold gets a new folder in it
WORK = ROOT / "build" / "bench"
PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy", "numba")
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Figure:
    """One table. `notes` say what was compared with what, and how."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_markdown(self, name: str, conditions: str) -> str:
        lines = [f"## {self.title}", "", f"`python -m bench {name}`: {conditions}", ""]
        lines += ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join([*lines, *(line for note in self.notes for line in ("", note)), ""])


@dataclass(frozen=True, slots=True)
class Run:
    """A finished process: wall seconds, and the peak of the summed resident memory of it and all its descendants."""

    seconds: float
    peak_bytes: int
    output: str

    def document(self) -> dict[str, Any]:
        """The JSON document that it printed last."""
        found: dict[str, Any] = json.loads(self.output[self.output.index("{") :])
        return found


def run(argv: Sequence[str], environ: Mapping[str, str] | None = None, folder: Path = ROOT) -> Run:
    """Run a command in a folder, by default the checkout, and watch it.

    Memory that processes share counts once for each of them, so the peak is an upper bound; it is sampled 50 times a
    second.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    started = time.perf_counter()
    process = subprocess.Popen(
        list(argv), cwd=folder, env={**os.environ, **(environ or {})},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with _watched(process.pid) as peak:
        output, errors = process.communicate()
    seconds = time.perf_counter() - started
    if process.returncode:
        raise RuntimeError(f"{' '.join(argv)} ended with {process.returncode}: {errors[-2000:]}")
    return Run(seconds, peak(), output)


def fluxkiln(*arguments: str) -> list[str]:
    """A fluxkiln command line of this checkout."""
    return [sys.executable, "-m", "fluxkiln", *arguments]


def repeat(times: int, work: Callable[[], Any]) -> tuple[float, float]:
    """Least and median seconds of `times` runs of `work`."""
    taken = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return min(taken), statistics.median(taken)


def cpu_seconds(work: Callable[[], Any], times: int) -> float:
    """Least CPU seconds of this process over `times` runs of `work`, after a first, which compiles and warms up."""
    work()
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)


@contextmanager
def one_core() -> Iterator[None]:
    """All threads of this process on one core, so that a library's thread pool is no advantage."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def conditions() -> str:
    """Machine, versions and how busy the machine was already."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "unknown CPU")
    memory = psutil.virtual_memory().total / 1e9
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"{os.cpu_count()} cores ({model}), {memory:.0f} GB; Python {platform.python_version()}, {versions}, TPU-MLIR "
        f"{TPU_MLIR_VERSION}; {time.strftime('%Y-%m-%d')}, load average before it {os.getloadavg()[0]:.1f}"
    )


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}"


@contextmanager
def _watched(pid: int) -> Iterator[Callable[[], int]]:
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], tree_bytes(pid))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: peak[0]
    finally:
        over.set()
        thread.join()


def tree_bytes(pid: int) -> int:
    """Resident memory of a process and all its descendants, summed; 0 when there is none."""
    total = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.Error:
        return 0
    for process in processes:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total
