"""Compilers as processes: one that is run with a log file, one that answers requests, and a pool of jobs that never
takes more memory than it was given."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

from fluxkiln.errors import CompileError, ResourceError

_TELLING = re.compile(r"error|fail|assert|exception|traceback|killed|abort|not supported|no space", re.IGNORECASE)
_SHOWN_LINES = 6
# As dash and bash put it.
_KILLED = re.compile(r"(.*: line \d+: +\d+ )?Killed\b")
# left to the system and to this process
RESERVED_BYTES = 2 << 30
T = TypeVar("T")

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
    """Stop every tool and worker that runs now, with all it started: after Ctrl-C nothing of ours may go on."""
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


@contextlib.contextmanager
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


class Worker:
    """Starts the process; as a context manager it ends it as well.

    Args:
        argv, environ: of the process. It runs in a scratch folder, `folder`, which goes with it.
        name: what the scratch folder is called after.
        log: what the process prints on stderr is appended there; a file in the scratch folder if left out.
    """

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], name: str, log: Path | None = None) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix=f"fluxkiln-{name}-")
        self.folder = Path(self._scratch.name)
        self.log = log or self.folder / "log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._log_file = self.log.open("ab")
        self._process = subprocess.Popen(
            list(argv), cwd=self.folder, env=dict(environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log_file, start_new_session=True,
        )  # fmt: skip
        with _running_lock:
            _running.add(self._process)

    def request(self, request: Mapping[str, Any]) -> dict[str, Any] | int:
        """The answer to a request, or the exit code of a process that ended instead of answering."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            return self._process.wait()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process; its scratch folder and what it kept go with it."""
        stop(self._process)
        with _running_lock:
            _running.discard(self._process)
        for stream in (self._process.stdin, self._process.stdout, self._log_file):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that the process did not live to read
                    stream.close()
        self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def available_memory() -> int:
    """Bytes that can be taken now without swapping, or all there are where the kernel has no estimate."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class _NotStartedError(ResourceError):
    """A job that another one's failure kept from starting; never what a user should be told."""


class JobPool(Generic[T]):
    """Runs jobs on threads; each job is a subprocess or leaves the interpreter lock alone.

    Every job claims the memory of its peak, and waits until that fits beside the others'. After a job has failed no
    other one starts. As a context manager: on an error or Ctrl-C every running tool is stopped before the exception
    goes on.
    """

    def __init__(self, jobs: int | None = None, memory: int | None = None) -> None:
        self.jobs = jobs or os.cpu_count() or 1
        self.budget = memory or max(available_memory() - RESERVED_BYTES, 1 << 30)
        self._used, self._stopped, self._changed = 0, False, threading.Condition()
        self._executor = ThreadPoolExecutor(self.jobs, thread_name_prefix="fluxkiln")
        self._futures: list[Future[Any]] = []
        self._first_error: BaseException | None = None

    def __enter__(self) -> JobPool[T]:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._executor.shutdown(wait=kind is None, cancel_futures=kind is not None)
        if kind is None:
            return
        self._stop()
        # again and again: a job between two tools would start its next one
        while not all(future.done() for future in self._futures):
            stop_all()
            time.sleep(0.05)
        if isinstance(error, _NotStartedError) and self._first_error is not None:
            raise self._first_error from None

    def submit(self, what: str, memory: int, job: Callable[[], T]) -> Future[T]:
        """Queue `job`, which takes `memory` bytes at its peak; it fails with ResourceError above the whole budget."""

        def run() -> T:
            try:
                with self._claim(what, memory):
                    return job()
            except BaseException as error:
                if self._first_error is None and not isinstance(error, _NotStartedError):
                    self._first_error = error
                raise

        future = self._executor.submit(run)
        self._futures.append(future)
        return future

    @contextlib.contextmanager
    def _claim(self, what: str, memory: int) -> Iterator[None]:
        if memory > self.budget:
            raise ResourceError(
                f"{what} needs about {memory / 1e9:.1f} GB of memory, {self.budget / 1e9:.1f} GB are available; "
                "use a smaller SIZE, close other programs, or use a machine with more memory"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._used + memory <= self.budget)
            self._used += memory
        try:
            if self._stopped:
                raise _NotStartedError(f"{what} was not started: another job had failed")
            yield
        except BaseException:
            self._stop()  # before the memory is free, or the next job would start
            raise
        finally:
            with self._changed:
                self._used -= memory
                self._changed.notify_all()

    def _stop(self) -> None:
        """Let all waiting jobs go on, to find that they are not wanted any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the first error of a finished job; so that a build fails early, not when it needs that job."""
        if self._first_error is not None:
            raise self._first_error

    def wait(self) -> None:
        """Wait for all jobs; raise the first error as soon as it happens."""
        pending = set(self._futures)
        while pending:
            _, pending = wait(pending, return_when=FIRST_COMPLETED)
            self.check()
        self._futures.clear()
