"""Whether a bundle is what its manifest says: what stands beside the manifest, and every file.

The manifest's digest covers the manifest, the manifest covers the files. `build.json` in the bundle and `pulled.json`
beside it name that digest again, so that another manifest does not pass for the one that was built or pulled.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluxkiln import __version__
from fluxkiln.artifacts.manifest import BUILD_FILE, MANIFEST_FILE, FileEntry, Manifest, parse_sealed
from fluxkiln.digests import Json, is_sealed, plain_json, seal
from fluxkiln.documents import DOCUMENT, read_object
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import FileState, open_beneath, write_durably
from fluxkiln.progress import Progress, Silent

# Of a pulled folder: the bundle, and what was pulled and how far it was checked.
BUNDLE = "bundle"
PULLED_FILE = "pulled.json"
_THREADS = 4
SHOWN = 5  # files of those that are wrong
# of such a record, over all that it says
_SEAL = "seal"
_AGAIN = "build or fetch it again"


@dataclass(frozen=True, slots=True)
class Checked:
    """A bundle whose files are what its manifest says.

    Attributes:
        digest: the manifest's. fresh: paths whose bytes were read for it; the others were found to be so before, and
            are the same files still.
    """

    manifest: Manifest
    digest: str
    fresh: frozenset[str]
    states: Mapping[str, FileState]
    memo: Path

    def remember(self) -> None:
        """Spare the next call the reading, when everything else about the bundle was found to be right too."""
        if not self.fresh:
            return
        # Without a cache the next call reads the files again.
        with contextlib.suppress(OSError):
            self.memo.parent.mkdir(parents=True, exist_ok=True)
            partial_path = self.memo.with_suffix(f".{os.getpid()}")
            partial_path.write_text(json.dumps(self.states))
            partial_path.replace(self.memo)


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle; errors as `read_sealed`."""
    return read_sealed(bundle)[0]


def read_sealed(bundle: Path) -> tuple[Manifest, str]:
    """The manifest of a bundle and its digest, which the records of the bundle name.

    Raises:
        UsageError: there is no such folder, or the manifest's schema version is not known here.
        IntegrityError: the manifest is missing, damaged or another one than what stands beside it says.
    """
    path = bundle / MANIFEST_FILE
    data = _read_small(bundle, MANIFEST_FILE)
    if data is None:
        if not bundle.is_dir():
            raise UsageError(f"{bundle} is no bundle: there is no such folder; give the folder that a build wrote")
        raise IntegrityError(f"{bundle} is no bundle: it has no {MANIFEST_FILE}; give the folder that a build wrote")
    manifest, digest = parse_sealed(data, str(path))
    for record in _records(bundle):
        manifests = _read_record(record)["manifests"]
        if digest not in manifests:
            raise IntegrityError(
                f"{record} is about a bundle whose manifest has the digest {' or '.join(manifests)}, the one here has "
                f"{digest}: the manifest was changed; {_AGAIN}"
            )
    return manifest, digest


def encode_record(facts: Mapping[str, Json], manifests: Sequence[str]) -> bytes:
    """`build.json` or `pulled.json`: facts about a bundle, the digests of the manifests that it may have, its own."""
    sealed = seal({**facts, "manifests": list(manifests)}, _SEAL)
    return json.dumps(plain_json(sealed), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def admit_manifest(bundle: Path, digest: str) -> None:
    """Have the records of a bundle name another manifest, which completes it, as well as the one that it has."""
    for record in _records(bundle):
        facts = _read_record(record)
        write_durably(record, encode_record(facts, list(dict.fromkeys([*facts["manifests"], digest]))))


def read_bundle(
    bundle: Path,
    *,
    again: bool = False,
    progress: Progress | None = None,
    hint: Callable[[Manifest], str] = lambda manifest: "",
) -> Checked:
    """The manifest of a bundle, all files compared with it.

    Args:
        again: read every file. Otherwise those are not read that were found whole before and are the same since.
        hint: what else helps against files that the manifest does not name.

    Raises:
        IntegrityError: names the first bad files and counts all: missing, of another size or digest, a symbolic link
            or other special file, or one that the manifest does not name. And as `read_sealed`.
    """
    manifest, digest = read_sealed(bundle)
    memo = _memo(bundle, digest)
    known = {} if again else _read_memo(memo)
    present = walk_bundle(bundle)
    faults, states, todo = dict[str, str](), dict[str, FileState](), list[FileEntry]()
    for entry in manifest.files:
        if entry.path not in present:
            faults[entry.path] = "missing"
        elif (state := present.pop(entry.path)) is None:
            faults[entry.path] = "not a regular file"
        elif state.size != entry.size:
            faults[entry.path] = f"{state.size} bytes, the manifest says {entry.size}"
        else:
            states[entry.path] = state
            if known.get(entry.path) != list(state):
                todo.append(entry)
    faults |= _read_files(bundle, todo, progress or Silent())
    named = [f"{entry.path}: {faults[entry.path]}" for entry in manifest.files if entry.path in faults]
    named += [f"{path}: not named by the manifest" for path in sorted(present)]
    if named:
        shown = [*named[1:SHOWN], *(["..."] if named[SHOWN:] else [])]
        more = f"; {len(named) - 1} more: {'; '.join(shown)}" if shown else ""
        raise IntegrityError(
            f"{bundle}: {named[0]}{more}. A bundle holds what its manifest says and nothing else: {_AGAIN}"
            f"{hint(manifest) if present else ''}"
        )
    return Checked(manifest, digest, frozenset(entry.path for entry in todo), states, memo)


def read_listed(bundle: Path, path: str) -> bytes:
    """All bytes of a small file of a bundle that was checked; IntegrityError when it cannot be opened."""
    data = _read_small(bundle, path)
    if data is None:
        raise IntegrityError(f"{bundle / path} does not exist; {_AGAIN}")
    return data


def walk_bundle(bundle: Path) -> dict[str, FileState | None]:
    """Path -> state, None where it is no regular file, for everything in the bundle that is no folder and no record."""
    found: dict[str, FileState | None] = {}
    todo = [""]
    while todo:
        below = todo.pop()
        with os.scandir(bundle / below) as entries:
            for entry in entries:
                path = below + entry.name
                if entry.is_dir(follow_symlinks=False):
                    todo.append(path + "/")
                elif path not in (MANIFEST_FILE, BUILD_FILE):
                    one = entry.stat(follow_symlinks=False)
                    found[path] = FileState.of(one) if stat.S_ISREG(one.st_mode) else None
    return found


def _read_files(bundle: Path, todo: Sequence[FileEntry], progress: Progress) -> dict[str, str]:
    """Faults by path, of files that have to be read."""
    if not todo:
        return {}
    progress.stage("check", len(todo))
    faults = {}
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1), "check") as threads:
        # largest first: no thread is left alone with it at the end
        ordered = sorted(todo, key=lambda entry: -entry.size)
        for entry, fault in zip(ordered, threads.map(partial(_fault, bundle), ordered), strict=True):
            if fault:
                faults[entry.path] = fault
            progress.done("check", entry.path, "not " * bool(fault) + "as the manifest says")
    return faults


def _fault(bundle: Path, entry: FileEntry) -> str:
    try:
        with open_beneath(bundle, entry.path) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return _reason(error)
    return "" if found == entry.sha256 else f"sha256:{found}, the manifest says {entry.digest}"


def _read_small(folder: Path, path: str) -> bytes | None:
    """The bytes of a document, None where there is none."""
    try:
        with open_beneath(folder, path) as file:
            data = file.read(DOCUMENT.nbytes + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno == errno.ENOTDIR and not folder.is_dir():
            return None
        raise IntegrityError(f"{folder / path}: {_reason(error)}; {_AGAIN}") from error
    return data


def _reason(error: OSError) -> str:
    links = (errno.ELOOP, errno.ENOTDIR, errno.EINVAL)
    return "not a regular file" if error.errno in links else f"cannot be read: {error.strerror}"


def _records(bundle: Path) -> list[Path]:
    """Those that there are of a bundle."""
    around = bundle.absolute()
    found = [bundle / BUILD_FILE, *([around.parent / PULLED_FILE] if around.name == BUNDLE else [])]
    return [path for path in found if os.path.lexists(path)]


def _read_record(path: Path) -> dict[str, Any]:
    facts = read_object(_read_small(path.parent, path.name) or b"", str(path))
    manifests = facts.get("manifests")
    named = isinstance(manifests, list) and all(isinstance(one, str) for one in manifests)
    if not named or not is_sealed(facts, _SEAL):
        raise IntegrityError(f"{path} is damaged: it does not have the digest that it gives itself; {_AGAIN}")
    return facts


def _memo(bundle: Path, digest: str) -> Path:
    """Where is remembered what was found whole in this very folder, wherever it is moved."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = os.stat(bundle)
    name = hashlib.sha256(f"{__version__}\n{folder.st_dev} {folder.st_ino}\n{digest}".encode()).hexdigest()[:32]
    return cache / "fluxkiln" / "checked" / f"{name}.json"


def _read_memo(memo: Path) -> dict[str, Json]:
    try:
        found = json.loads(memo.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
