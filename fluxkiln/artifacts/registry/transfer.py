"""How bytes are sent and received, several files at once, when the other side may fail."""

from __future__ import annotations

import hashlib
import math
import os
import random
import socket
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from fluxkiln.artifacts.modelpack import Layer
from fluxkiln.errors import RegistryError
from fluxkiln.progress import Progress, Silent

if TYPE_CHECKING:
    import httpx2

# Of a file at once; the sum over parallel transfers is what they take of memory.
PIECE_BYTES = 1 << 20
# More gain nothing on one connection's line, and each takes memory for its buffers.
TRANSFERS = 4
# What a progress display counts: a file below that is one step.
SHOWN_BYTES = 64 << 20

# Seconds for each byte: 256 KiB a second are slow.
PACE = 1 / (256 << 10)

_T = TypeVar("_T")


class TransientError(Exception):
    """A failure that may pass: a cut connection, a peer that does not answer, a server that says "later".

    `wait`: seconds that the server asked for.
    """

    def __init__(self, reason: str, *, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a peer may take and how often it may fail. Seconds; `attempts` count without progress in between.

    `deadline`: of a whole command, and `PACE` more for each byte that it is to move.
    """

    attempts: int = 6
    connect: float = 10.0
    read: float = 30.0
    first_wait: float = 0.5
    longest_wait: float = 10.0
    deadline: float = 300.0

    def wait(self, failures: int) -> float:
        """Seconds before the next try: doubled each time, and spread so that clients do not come back together."""
        longest = min(self.longest_wait, self.first_wait * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


@dataclass(slots=True)
class Stop:
    """Tells all transfers of a command to end: one failed for good, the user has had enough, or it took too long."""

    event: threading.Event = field(default_factory=threading.Event)
    seconds: float = math.inf
    began: float = field(default_factory=time.monotonic)

    def allow(self, nbytes: int) -> None:
        """So many bytes are to be moved: the deadline is later."""
        self.seconds += PACE * nbytes

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.began + self.seconds - time.monotonic()

    def check(self) -> None:
        """Raise when it is over."""
        if self.event.is_set():
            raise StoppedError("stopped, since another transfer failed")
        if self.left() <= 0:
            raise RegistryError(
                f"the registry is too slow: its deadline of {self.seconds:.0f} s is over. Run the same command again, "
                "what has arrived is kept; --deadline gives it more"
            )

    def sleep(self, seconds: float) -> None:
        """Wait, but not when it is over."""
        self.event.wait(max(0.0, min(seconds, self.left())))
        self.check()


class Watch:
    """Ends all connections when the deadline is over: a peer that sends a byte now and then, of a header say, meets no
    time limit of a single read."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def follow(self, request: httpx2.Request) -> None:
        """An event hook of an HTTP client: have it tell of the connections that it makes for a request."""
        self._stop.check()
        request.extensions["trace"] = self._connected

    def close(self) -> None:
        self._closed.set()

    def _connected(self, event: str, info: Mapping[str, Any]) -> None:
        if not event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            return
        with self._lock:
            self._sockets.add(info["return_value"].get_extra_info("socket"))
            if self._thread is None and self._stop.seconds < threading.TIMEOUT_MAX:
                self._thread = threading.Thread(target=self._end, name="deadline", daemon=True)
                self._thread.start()

    def _end(self) -> None:
        # At least a second between two looks: connections may be made, and the deadline may be moved, meanwhile.
        while not self._closed.wait(max(self._stop.left(), 1.0)):
            if self._stop.left() <= 0:
                with self._lock:
                    for one in self._sockets:
                        with suppress(OSError):
                            one.shutdown(socket.SHUT_RDWR)


class StoppedError(Exception):
    """This transfer ended since another one failed; that one tells why."""


def retrying(
    patience: Patience, stop: Stop, what: str, work: Callable[[], _T], standing: Callable[[], int] = lambda: 0
) -> _T:
    """`work()`, again after each TransientError, with growing waits.

    Args:
        standing: how many bytes have arrived; where they have become more, it is patient from the start again.

    Raises RegistryError: it failed `patience.attempts` times without progress in between.
    """
    failures = 0
    while True:
        stop.check()
        before = standing()
        try:
            return work()
        except TransientError as error:
            failures = 1 if standing() > before else failures + 1
            if failures >= patience.attempts:
                raise RegistryError(
                    f"{what}: {error}; tried {failures} times without progress. Check the network and the registry, "
                    "then run the same command again: what has arrived is kept"
                ) from error
            stop.sleep(max(patience.wait(failures), min(error.wait, 60.0)))


def each(items: Iterable[_T], work: Callable[[_T], None], stop: Stop, jobs: int) -> None:
    """`work` on every item, `jobs` at a time. Raises what `work` raised first, once all transfers have ended."""
    left, taking, failures = deque(items), threading.Lock(), list[BaseException]()

    def take() -> None:
        # No future for each: others listed them, there may be a great many, and each would have to be undone.
        try:
            while not stop.event.is_set():
                with taking:
                    if not left:
                        return
                    item = left.popleft()
                work(item)
        except BaseException as error:
            failures.append(error)
            stop.event.set()

    with ThreadPoolExecutor(jobs, thread_name_prefix="transfer") as pool:
        working = [pool.submit(take) for _ in range(jobs)]
        try:
            wait(working)
        except BaseException:
            stop.event.set()
            raise
    if failures:
        raise failures[0]


class Meter:
    """Bytes that were moved, shown as one stage in steps of 64 MiB; any number of threads."""

    def __init__(self, progress: Progress | None, stage: str, layers: Sequence[Layer]) -> None:
        self._progress, self._stage = progress or Silent(), stage
        self._lock = threading.Lock()
        self._moved: Counter[str] = Counter()
        self._shown: Counter[str] = Counter()
        self._progress.stage(stage, sum(_steps(layer.size) for layer in layers))

    def move(self, layer: Layer, count: int) -> None:
        """So many bytes more of a file were moved."""
        with self._lock:
            self._moved[layer.path] += count
            total = self._moved[layer.path]
        # The last step belongs to `finish`: only then it is known that all is well.
        self._show(layer, min(total // SHOWN_BYTES, _steps(layer.size) - 1), f"{total >> 20} MiB")

    def finish(self, layer: Layer, how: str) -> None:
        """The file is done."""
        self._show(layer, _steps(layer.size), how)

    def _show(self, layer: Layer, steps: int, how: str) -> None:
        with self._lock:
            new = max(0, steps - self._shown[layer.path])
            self._shown[layer.path] += new
        for _ in range(new):
            self._progress.done(self._stage, layer.path or "config", how)


def _steps(size: int) -> int:
    return max(1, -(-size // SHOWN_BYTES))


class Arrival:
    """A file while it is received: its bytes are hashed as they are written, and may not be more than announced."""

    def __init__(self, file: BinaryIO, size: int, moved: Callable[[int], None] = lambda count: None) -> None:
        self.size, self.received = size, 0
        self._file, self._moved = file, moved
        self._hash = hashlib.sha256()

    @property
    def complete(self) -> bool:
        return self.received == self.size

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()

    def take_up(self) -> None:
        """Go on with what an earlier process left in the file."""
        buffer = memoryview(bytearray(PIECE_BYTES))
        self._file.seek(0)
        while count := self._file.readinto(buffer):  # type: ignore[attr-defined]
            self._hash.update(buffer[:count])
            self.received += count
        if self.received > self.size:
            self.restart()

    def restart(self) -> None:
        """Forget everything that was received."""
        self._file.seek(0)
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self.received = 0

    def write(self, data: bytes) -> None:
        """Take the next bytes; TransientError, and nothing left, when they are more than the size says."""
        if self.received + len(data) > self.size:
            self.restart()
            raise TransientError(f"more than the {self.size} bytes that the manifest says were sent")
        self._hash.update(data)
        self._file.write(data)
        self.received += len(data)
        self._moved(len(data))


class Departure:
    """A file or bytes while they are sent, hashed on the way: `digest` is that of what was read, once it all was."""

    def __init__(self, source: Path | bytes, size: int, moved: Callable[[int], None] = lambda count: None) -> None:
        self.source, self.size = source, size
        self._moved = moved
        self._hash = hashlib.sha256()
        self._hashed = 0

    @property
    def digest(self) -> str | None:
        """Of all bytes, or None before all were read."""
        return "sha256:" + self._hash.hexdigest() if self._hashed == self.size else None

    def pieces(self, start: int, end: int) -> Iterator[bytes]:
        """The bytes from `start` to `end`; fewer when the file became shorter."""
        if isinstance(self.source, bytes):
            yield self._seen(self.source[start:end], start)
            return
        with os.fdopen(os.open(self.source, os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
            file.seek(start)
            while start < end and (piece := file.read(min(PIECE_BYTES, end - start))):
                yield self._seen(piece, start)
                start += len(piece)

    def read_rest(self) -> None:
        """Hash what was not sent: all of it when the other side has the bytes already."""
        for _ in self.pieces(self._hashed, self.size):
            pass

    def actual_size(self) -> int:
        """Bytes that there are to read now."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.lstat().st_size

    def _seen(self, piece: bytes, start: int) -> bytes:
        # What is sent a second time was hashed the first time.
        if start <= self._hashed < start + len(piece):
            self._hash.update(memoryview(piece)[self._hashed - start :])
            self._moved(start + len(piece) - self._hashed)
            self._hashed = start + len(piece)
        return piece
