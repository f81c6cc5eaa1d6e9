"""Running a compiler: an argv list, its own folder, a log file, and an error that shows what the log says."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from fluxkiln.errors import CompileError, ResourceError

_TELLING = re.compile(r"error|fail|assert|exception|traceback|killed|abort|not supported|no space", re.IGNORECASE)
_SHOWN_LINES = 6
# As dash and bash put it.
_KILLED = re.compile(r"(.*: line \d+: +\d+ )?Killed\b")

_running: set[subprocess.Popen[bytes]] = set()
_running_lock = threading.Lock()


def run_tool(argv: Sequence[str], folder: Path, environ: Mapping[str, str], log: Path, what: str) -> None:
    """Run `argv` in `folder`, appending what it prints to `log`.

    The tool gets a process group of its own, so that stopping it stops what it started.

    Raises:
        ResourceError: the system killed it for memory, or the disk is full.
        CompileError: it failed; the message has the telling lines of the log and where the rest is.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"$ {' '.join(argv)}\n".encode())
        output.flush()
        start = output.tell()
        process = subprocess.Popen(
            list(argv), cwd=folder, env=dict(environ), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with _registered(process):
            code = process.wait()
    if code == 0:
        return
    # a tool that the compiler started died so: its shell says it, the compiler itself only that something failed
    inner = any(_KILLED.match(line) for line in _lines(log, start))
    if inner or code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise ResourceError(
            f"{what}: {Path(argv[0]).name} was killed (signal 9), which is how the system ends a process when memory "
            f"runs out; use fewer jobs (JOBS=1), a smaller SIZE or a machine with more memory; log: {log}"
        )
    lines = _telling_lines(log, start)
    if "No space left on device" in lines:
        raise ResourceError(f"{what}: the disk is full; free some space and run the same command again; log: {log}")
    raise CompileError(f"{what}: the compiler failed with exit code {code}: {lines}; whole log: {log}")


def stop_all() -> None:
    """Stop every tool that runs now, with all it started: after Ctrl-C nothing of ours may go on."""
    with _running_lock:
        processes = list(_running)
    for process in processes:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its group."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        process.kill()
    process.wait()


@contextmanager
def _registered(process: subprocess.Popen[bytes]) -> Iterator[None]:
    with _running_lock:
        _running.add(process)
    try:
        yield
    finally:
        if process.poll() is None:
            stop(process)
        with _running_lock:
            _running.discard(process)


def _telling_lines(log: Path, start: int) -> str:
    """The log's last lines that look like an error, or simply its last lines, as one line."""
    lines = _lines(log, start)
    telling = [line for line in lines if _TELLING.search(line)]
    return " | ".join((telling or lines or ["it printed nothing"])[-_SHOWN_LINES:])[:1500]


def _lines(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(start)
        return [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
