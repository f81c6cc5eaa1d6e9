"""Durable files, and locks between processes.

What is visible under its final name is whole, also after `kill -9` or a power cut. The kernel holds the locks (flock),
so they end with the process, however it ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Literal, NamedTuple

from fluxkiln.errors import ResourceError

CHUNK = 1 << 20
PARTIAL_SUFFIX = ".partial"
# linux/fs.h, _IOW(0x94, 9, int): share the source's extents (btrfs, XFS, bcachefs).
FICLONE = 0x40049409

CopyMethod = Literal["reflink", "link", "copy"]


@contextmanager
def disk_full_named(directory: Path, needed: int | None = None) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" into a ResourceError that says how much is needed and free.

    Wrap it around the context managers that clean up, so that `free` is counted after the cleaning.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        while not directory.exists():
            directory = directory.parent
        disk = os.statvfs(directory)
        wanted = "more room is needed" if needed is None else f"{needed} bytes are needed"
        raise ResourceError(
            f"{directory}: {os.strerror(error.errno)}: {wanted}, {disk.f_bavail * disk.f_frsize} bytes are free; make "
            "room or put the store and the build on a larger disk. Nothing half-written was left"
        ) from error


def fresh_name(label: str) -> str:
    """A name no one else uses; time and process are for the reader, the random part makes it unique."""
    return f"{label}.{time.strftime('%Y%m%dT%H%M%S')}.{os.getpid()}.{os.urandom(4).hex()}"


def same_inode(fd: int, path: Path) -> bool:
    """Whether `path` still names the open file `fd`."""
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(fd)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


@contextmanager
def partial_file(directory: Path, label: str) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file that is gone at the end unless it was renamed.

    It is locked while it is open: `remove_unheld` tells a dead process's leftover from a file being written.
    """
    while True:
        path = directory / (fresh_name(label) + PARTIAL_SUFFIX)
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666), "r+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not same_inode(file.fileno(), path):
                continue  # cleaned away between creation and lock
            yield path, file
            return
        finally:
            with suppress(FileNotFoundError):
                if same_inode(file.fileno(), path):
                    os.unlink(path)
            # A full disk can show up once more here, when buffers are flushed for a file already given up.
            with suppress(OSError):
                file.close()


@contextmanager
def partial_directory(parent: Path, label: str) -> Iterator[Path]:
    """A new folder that is gone at the end unless it was renamed; locked like `partial_file`."""
    while True:
        path = parent / (fresh_name(label) + PARTIAL_SUFFIX)
        os.mkdir(path)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            if not same_inode(fd, path):
                continue
            yield path
            return
        finally:
            if same_inode(fd, path):
                shutil.rmtree(path, ignore_errors=True)
            os.close(fd)


def remove_unheld(directory: Path, prefix: str = "") -> tuple[str, ...]:
    """Remove the `.partial` files and folders in `directory` that no living process holds; return their names."""
    removed = []
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return ()
    for name in names:
        if not (name.startswith(prefix) and name.endswith(PARTIAL_SUFFIX)):
            continue
        path = directory / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
            removed.append(name)
        except OSError:
            continue  # held by a living process, or a file system that cannot say
        finally:
            os.close(fd)
    return tuple(removed)


def sync_directory(directory: Path) -> None:
    """Make renames in `directory` survive a power cut."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes, partials: Path | None = None) -> None:
    """Replace `path` with `data` at once: readers see the old bytes or the new ones, never a part.

    Args:
        partials: folder of the same file system for the file while it is incomplete; by default that of `path`.

    Raises ResourceError: the disk is full.
    """
    folder = partials or path.parent
    with disk_full_named(folder, len(data)), partial_file(folder, "." + path.name) as (partial, file):
        file.write(data)
        rename_durably(file, partial, path)


def rename_durably(file: BinaryIO, partial: Path, final: Path, mode: int | None = None) -> None:
    """Flush `file`, sync it and rename it to `final`; OSError where that is a device, a pipe or a folder."""
    if os.path.lexists(final) and stat.S_IFMT(os.lstat(final).st_mode) not in (stat.S_IFREG, stat.S_IFLNK):
        raise OSError(errno.EINVAL, "it is no regular file", str(final))
    file.flush()
    if mode is not None:
        os.fchmod(file.fileno(), mode)
    os.fsync(file.fileno())
    os.replace(partial, final)
    sync_directory(final.parent)


def reserve(file: BinaryIO, size: int) -> None:
    """Claim `size` bytes on disk before the first is written, so that a full disk shows at once."""
    try:
        if size:
            os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # the file system cannot reserve
            raise


def open_regular(path: Path, *, links: bool = True, folder: int | None = None) -> io.BufferedReader:
    """A regular file, open for reading; never waits, as one does who opens a fifo.

    Args:
        links: the name itself may be a symbolic link. folder: descriptor of the one that `path` starts in.

    Raises OSError: as `open`, and for anything else than a regular file.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW), dir_fd=folder)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "it is no regular file", str(path))
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


def copy_hashing(source: io.BufferedReader | io.BytesIO, target: BinaryIO) -> tuple[str, int]:
    """Copy to the end of `source`; return `sha256:<hex>` and number of the bytes that were written."""
    digest = hashlib.sha256()
    size = 0
    buffer = memoryview(bytearray(CHUNK))
    while count := source.readinto(buffer):
        digest.update(buffer[:count])
        target.write(buffer[:count])
        size += count
    # The source may have shrunk since its size was reserved.
    target.truncate(size)
    return "sha256:" + digest.hexdigest(), size


def digest_file(path: Path) -> tuple[str, int]:
    """`sha256:<hex>` and size of a regular file; OSError for anything else, a symbolic link too."""
    with open_regular(path, links=False) as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return "sha256:" + found, os.fstat(file.fileno()).st_size


class FileState(NamedTuple):
    """What tells without reading whether a file's bytes can have changed.

    Copying tools restore mtime; nobody sets ctime, but another name or other rights move it too.
    """

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        """That which the system tells of a file."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)

    def is_same_file(self, other: FileState) -> bool:
        """Whether nothing but ctime moved. Then the bytes are most likely the same; reading them again tells."""
        return self._replace(ctime_ns=0) == other._replace(ctime_ns=0)


def file_state(path: Path, *, links: bool = True) -> FileState:
    """The state of what `path` leads to, or of the symbolic link itself; OSError where there is nothing."""
    return FileState.of(os.stat(path, follow_symlinks=links))


def open_beneath(root: Path, path: str) -> io.BufferedReader:
    """Open the regular file `path` below the folder `root` for reading; a pipe is not waited for.

    Raises OSError: as `open`; and where the file or a folder on the way is a symbolic link, or no regular file.
    """
    way = PurePosixPath(path).parts
    if not way or {"/", ".."} & set(way):
        raise OSError(errno.EINVAL, "it leads out of its folder", str(root / path))
    with ExitStack() as opened:
        folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
        opened.callback(os.close, folder)
        for name in way[:-1]:
            folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
            opened.callback(os.close, folder)
        return open_regular(Path(way[-1]), links=False, folder=folder)


def clone(source: io.BufferedReader, target: BinaryIO) -> bool:
    """Make `target` share the extents of `source`; False where the file system cannot."""
    try:
        fcntl.ioctl(target, FICLONE, source.fileno())
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EPERM):
            return False
        raise
    return True


_held: set[int] = set()


def _close_in_child() -> None:
    # A forked worker would otherwise keep the lock of a parent that was killed.
    for fd in _held:
        os.close(fd)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


@contextmanager
def waiting_lock(path: Path, wait: bool = True) -> Iterator[int]:
    """Hold the lock `path`, waiting for it; excludes threads as well as processes. Its file descriptor.

    Raises BlockingIOError: another holds it, and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(fd)
            raise
        if same_inode(fd, path):
            break
        os.close(fd)  # its last holder removed the file between open and flock
    _held.add(fd)
    try:
        yield fd
    finally:
        if fd in _held:  # else a forked child left the block; the lock is the parent's
            # Unlink while it is still held: whoever waits on this inode sees that the name is gone and tries again.
            # Another process's lock may have that name by now, when someone removed the folder and built anew.
            with suppress(FileNotFoundError):
                if same_inode(fd, path):
                    os.unlink(path)
            _held.discard(fd)
            os.close(fd)


@contextmanager
def build_lock(path: Path, what: str) -> Iterator[None]:
    """Hold the lock `path` while `what` is built.

    Raises ResourceError: another process holds it; says which, since when, and what to do.
    """
    with ExitStack() as held:
        try:
            fd = held.enter_context(waiting_lock(path, wait=False))
        except BlockingIOError as error:
            raise ResourceError(_describe_holder(path, what)) from error
        record = {"pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "what": what}
        data = json.dumps(record).encode()
        with disk_full_named(path.parent, len(data)):
            os.ftruncate(fd, 0)
            os.pwrite(fd, data, 0)
        yield


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
