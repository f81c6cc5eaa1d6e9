"""Folders that appear whole or not at all: written beside their place, under a lock, and renamed at the end."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fluxkiln.errors import ResourceError, UsageError

# Leave this much of the disk to others.
_SPARE_BYTES = 64 << 20
_PARTIAL = ".partial"


def check_destination(destination: Path) -> None:
    """Raise UsageError when `destination` is something else than an empty folder or nothing."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} is not empty; give a folder that does not exist yet, or remove it first")


@contextmanager
def whole_or_nothing(destination: Path, nbytes: int, remedy: str) -> Iterator[Path]:
    """A locked folder beside `destination` that takes its place when the block ends, and vanishes when it raises.

    Args:
        nbytes: what will be written to it.
        remedy: what to do besides freeing space where the disk has less.

    Raises:
        ResourceError: not enough room on the disk, before or while it is written.
        UsageError: `destination` was filled meanwhile.
    """
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(parent, destination.name)
    free = shutil.disk_usage(parent).free
    if free < nbytes + _SPARE_BYTES:
        raise ResourceError(
            f"{parent} has {free / 1e9:.1f} GB free, {destination.name} takes {nbytes / 1e9:.1f} GB; free some space, "
            f"or {remedy}"
        )
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=parent))
    partial.chmod(0o777 & ~_umask())
    lock = os.open(partial, os.O_RDONLY)
    try:
        # Tells other processes that this folder is being written; the kernel drops it when this process dies.
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Only now under the name that `_remove_stale` looks for.
        partial = partial.rename(f"{partial}{_PARTIAL}")
        yield partial
        try:
            os.rename(partial, destination)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise UsageError(
                f"{destination} was filled by another process meanwhile; use it, or remove it first"
            ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk of {parent} is full after part of {nbytes / 1e9:.1f} GB; free some space"
        ) from error
    finally:
        os.close(lock)
        # After a successful rename there is nothing left under this name.
        shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(parent: Path, name: str) -> None:
    """Remove what killed processes left: partial folders of `name` that nobody holds locked."""
    for path in parent.glob(f".{glob.escape(name)}.*{_PARTIAL}"):
        # Gone meanwhile, or locked by the process that writes it.
        with suppress(FileNotFoundError, BlockingIOError):
            lock = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
