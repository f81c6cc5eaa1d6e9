"""A pool of jobs that never takes more memory than it was given: every job states its peak, and waits until it fits."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from fluxkiln.compile.process import stop_all
from fluxkiln.errors import ResourceError

T = TypeVar("T")
# left to the system and to this process
RESERVED_BYTES = 2 << 30


def available_memory() -> int:
    """Bytes that can be taken now without swapping, by the kernel's own estimate."""
    with open("/proc/meminfo", encoding="ascii") as file:
        for line in file:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")


@dataclass(slots=True)
class Admission:
    """A budget of bytes; `take` waits until a claim fits.

    Jobs only wait for one another: a claim above the whole budget is refused at once.
    """

    budget: int
    _used: int = 0
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _stopped: bool = False

    def take(self, claim: int, what: str) -> None:
        if claim > self.budget:
            raise ResourceError(
                f"{what} needs about {claim / 1e9:.1f} GB of memory, {self.budget / 1e9:.1f} GB are available; "
                "use a smaller SIZE, close other programs, or use a machine with more memory"
            )
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._used + claim <= self.budget)
            self._used += claim

    def give_back(self, claim: int) -> None:
        with self._changed:
            self._used -= claim
            self._changed.notify_all()

    def stop(self) -> None:
        """Let all waiting jobs go on, to find that they are not wanted any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    @property
    def stopped(self) -> bool:
        return self._stopped


class _NotStartedError(ResourceError):
    """A job that another one's failure kept from starting; never what a user should be told."""


class JobPool(Generic[T]):
    """Runs jobs on threads; each job is a subprocess or leaves the interpreter lock alone.

    After a job has failed no other one starts. As a context manager: on an error or Ctrl-C every running tool is
    stopped before the exception goes on.
    """

    def __init__(self, jobs: int | None = None, memory: int | None = None) -> None:
        self.jobs = jobs or os.cpu_count() or 1
        self.admission = Admission(memory or max(available_memory() - RESERVED_BYTES, 1 << 30))
        self._executor = ThreadPoolExecutor(self.jobs, thread_name_prefix="fluxkiln")
        self._futures: list[Future[Any]] = []
        self._first_error: BaseException | None = None

    def __enter__(self) -> JobPool[T]:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._executor.shutdown(wait=kind is None, cancel_futures=kind is not None)
        if kind is None:
            return
        self.admission.stop()
        # again and again: a job between two tools would start its next one
        while not all(future.done() for future in self._futures):
            stop_all()
            time.sleep(0.05)
        if isinstance(error, _NotStartedError) and self._first_error is not None:
            raise self._first_error from None

    def submit(self, what: str, memory: int, job: Callable[[], T]) -> Future[T]:
        """Queue `job`, which takes `memory` bytes at its peak."""

        def run() -> T:
            try:
                return self._run(what, memory, job)
            except BaseException as error:
                if self._first_error is None and not isinstance(error, _NotStartedError):
                    self._first_error = error
                raise

        future = self._executor.submit(run)
        self._futures.append(future)
        return future

    def _run(self, what: str, memory: int, job: Callable[[], T]) -> T:
        self.admission.take(memory, what)
        try:
            if self.admission.stopped:
                raise _NotStartedError(f"{what} was not started: another job had failed")
            return job()
        except BaseException:
            self.admission.stop()  # before the memory is free, or the next job would start
            raise
        finally:
            self.admission.give_back(memory)

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
