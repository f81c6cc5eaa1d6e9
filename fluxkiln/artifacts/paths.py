"""Which paths a manifest may name: they come from other machines and are joined to a folder of this one."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from fluxkiln.errors import IntegrityError

MANIFEST_FILE = "manifest.json"
BUILD_FILE = "build.json"
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 1024


def _refuse(path: str, rule: str) -> IntegrityError:
    return IntegrityError(
        f"path {path!r} in a manifest {rule}; paths are relative, use '/', and stay inside the bundle. "
        "Do not use this manifest: fetch or build it again"
    )


def validate_manifest_path(path: str) -> PurePosixPath:
    """The path as a relative POSIX path in its one spelling.

    Raises:
        IntegrityError: absolute, `..` or `.` in it, an empty name, a backslash, NUL or control character, a drive
            letter, a name too long, or one of the names the bundle keeps for itself.
    """
    if not path:
        raise _refuse(path, "is empty")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        raise _refuse(path, "holds a NUL, a control character or half a surrogate pair")
    if "\\" in path:
        raise _refuse(path, "holds a backslash")
    if path.startswith("/") or path[1:2] == ":":
        raise _refuse(path, "is absolute")
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise _refuse(path, "holds '..', '.' or an empty name")
    if len(path.encode()) > MAX_PATH_BYTES or any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        raise _refuse(path, f"is longer than {MAX_PATH_BYTES} bytes, or a name in it longer than {MAX_NAME_BYTES}")
    if _folded(names[0]) in (MANIFEST_FILE, BUILD_FILE):
        raise _refuse(path, f"is a name the bundle keeps for itself ({MANIFEST_FILE}, {BUILD_FILE})")
    return PurePosixPath(path)


def validate_manifest_paths(paths: Iterable[str]) -> tuple[PurePosixPath, ...]:
    """All paths validated, and no two of them the same file on any file system.

    Raises:
        IntegrityError: a path is not legal, two differ in case or Unicode form only, or one is a folder of another.
    """
    seen: dict[str, str] = {}
    found = []
    for path in paths:
        found.append(validate_manifest_path(path))
        other = seen.setdefault(_folded(path), path)
        if len(seen) != len(found):
            raise _refuse(path, f"is the same file as {other!r} where case or Unicode form does not count")
    for path in seen.values():
        for parent in PurePosixPath(_folded(path)).parents:
            if str(parent) in seen:
                raise _refuse(path, f"lies in {seen[str(parent)]!r}, which is a file")
    return tuple(found)


def resolve_inside(root: Path, path: str) -> Path:
    """`root / path` after validation; IntegrityError when a symbolic link on the way leads out of `root`."""
    joined = root / validate_manifest_path(path)
    if not joined.resolve().is_relative_to(root.resolve()):
        raise _refuse(path, f"leads out of {root} through a symbolic link")
    return joined


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())
