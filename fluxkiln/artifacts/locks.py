"""Locks between processes. The kernel holds them (flock), so they end with the process, however it ends."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fluxkiln.errors import ResourceError
from fluxkiln.files import disk_full_named, same_inode

_held: set[int] = set()


def _close_in_child() -> None:
    # A forked worker would otherwise keep the lock of a parent that was killed.
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def _take(path: Path, wait: bool) -> int:
    """An open file that holds the lock; BlockingIOError when another holds it and `wait` is false."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        if same_inode(fd, path):
            _held.add(fd)
            return fd
        os.close(fd)  # its last holder removed the file between open and flock


def _release(fd: int, path: Path) -> None:
    if fd not in _held:  # a forked child left the block; the lock is the parent's
        return
    # Unlink while it is still held: whoever waits on this inode sees that the name is gone and tries again. Another
    # process's lock may have that name by now, when someone removed the folder and built anew.
    with suppress(FileNotFoundError):
        if same_inode(fd, path):
            os.unlink(path)
    _held.discard(fd)
    os.close(fd)


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock `path`, waiting for it; excludes threads as well as processes."""
    fd = _take(path, wait=True)
    try:
        yield
    finally:
        _release(fd, path)


@contextmanager
def build_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path` while `what` is built.

    Raises:
        ResourceError: another process holds it; says which, since when, and what to do.
    """
    try:
        fd = _take(path, wait=False)
    except BlockingIOError as error:
        raise ResourceError(_describe_holder(path, what)) from error
    try:
        record = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "what": what}
        data = json.dumps(record).encode()
        with disk_full_named(path.parent, len(data)):
            os.ftruncate(fd, 0)
            os.pwrite(fd, data, 0)
        yield
    finally:
        _release(fd, path)


def _describe_holder(path: Path, what: str) -> str:
    try:
        holder = json.loads(path.read_bytes())
        pid, since = int(holder["pid"]), str(holder["since"])
    except (OSError, ValueError, KeyError, TypeError):
        # The holder is between taking the lock and writing who it is.
        return f"{what} is being built by another process that has just started (lock {path}); wait for it to end"
    return (
        f"{what} is being built by process {pid} since {since} (lock {path}); one build of the same thing runs at a "
        f"time. Wait for it to end, or stop it with: kill {pid}"
    )
