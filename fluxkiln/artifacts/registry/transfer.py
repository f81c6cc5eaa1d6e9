"""How bytes are sent and received when the other side may fail: patience, what has arrived, what is read."""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, TypeVar

from fluxkiln.errors import RegistryError

# Of a file at once; the sum over parallel transfers is what they take of memory.
PIECE = 1 << 20

_T = TypeVar("_T")


class TransientError(Exception):
    """A failure that may pass: a cut connection, a peer that does not answer, a server that says "later".

    `wait`: seconds that the server asked for; `progressed`: whether bytes arrived since the last try.
    """

    def __init__(self, reason: str, *, wait: float = 0.0, progressed: bool = False) -> None:
        super().__init__(reason)
        self.wait = wait
        self.progressed = progressed


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a peer may take and how often it may fail. Seconds; `attempts` count without progress in between."""

    attempts: int = 6
    connect: float = 10.0
    read: float = 30.0
    first_wait: float = 0.5
    longest_wait: float = 10.0

    def wait(self, failures: int) -> float:
        """Seconds before the next try: doubled each time, and spread so that clients do not come back together."""
        longest = min(self.longest_wait, self.first_wait * 2.0 ** (failures - 1))
        return longest * random.uniform(0.5, 1.0)


@dataclass(slots=True)
class Stop:
    """Tells all transfers of a command to end: one of them failed for good, or the user has had enough."""

    event: threading.Event = field(default_factory=threading.Event)

    def check(self) -> None:
        """Raise when it is over."""
        if self.event.is_set():
            raise StoppedError("stopped, since another transfer failed")

    def sleep(self, seconds: float) -> None:
        """Wait, but not when it is over."""
        if self.event.wait(seconds):
            self.check()


class StoppedError(Exception):
    """This transfer ended since another one failed; that one tells why."""


def retrying(patience: Patience, stop: Stop, what: str, work: Callable[[], _T]) -> _T:
    """`work()`, again after each TransientError, with growing waits.

    Raises:
        RegistryError: it failed `patience.attempts` times without progress in between.
    """
    failures = 0
    while True:
        stop.check()
        try:
            return work()
        except TransientError as error:
            failures = 1 if error.progressed else failures + 1
            if failures >= patience.attempts:
                raise RegistryError(
                    f"{what}: {error}; tried {failures} times without progress. Check the network and the registry, "
                    "then run the same command again: what has arrived is kept"
                ) from error
            stop.sleep(max(patience.wait(failures), min(error.wait, 60.0)))


class Arrival:
    """A file while it is received: its bytes are hashed as they are written, and may not be more than announced."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.size = size
        self._file = file
        self._hash = hashlib.sha256()
        self._received = 0

    @property
    def received(self) -> int:
        return self._received

    @property
    def complete(self) -> bool:
        return self._received == self.size

    @property
    def digest(self) -> str:
        return "sha256:" + self._hash.hexdigest()

    def take_up(self) -> None:
        """Go on with what an earlier process left in the file."""
        buffer = memoryview(bytearray(PIECE))
        self._file.seek(0)
        while count := self._file.readinto(buffer):  # type: ignore[attr-defined]
            self._hash.update(buffer[:count])
            self._received += count
        if self._received > self.size:
            self.restart()

    def restart(self) -> None:
        """Forget everything that was received."""
        self._file.seek(0)
        self._file.truncate(0)
        self._hash = hashlib.sha256()
        self._received = 0

    def write(self, data: bytes) -> None:
        """Take the next bytes; TransientError, and nothing left, when they are more than the size says."""
        if self._received + len(data) > self.size:
            self.restart()
            raise TransientError(f"more than the {self.size} bytes that the manifest says were sent")
        self._hash.update(data)
        self._file.write(data)
        self._received += len(data)


class Departure:
    """A file or bytes while they are sent, hashed on the way: `digest` is that of what was read, once it all was."""

    def __init__(self, source: Path | bytes, size: int, moved: Callable[[int], None]) -> None:
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
            while start < end and (piece := file.read(min(PIECE, end - start))):
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
