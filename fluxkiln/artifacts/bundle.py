"""Bundles: the folder that a runtime loads, written whole or not at all, `manifest.json` last.

A new one is assembled as `.NAME.*.partial`; two renames, the old one's to `.NAME.old`, swap them. After a `kill -9` a
`NAME` that is there counts, else `.NAME.old`: the next `write_bundle` or `heal_bundle` removes the others.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from fluxkiln.artifacts.manifest import (
    BUILD_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    Role,
    manifest_from_json,
    parse_manifest,
    resolve_inside,
    validate_manifest_paths,
)
from fluxkiln.artifacts.store import Blob, Store
from fluxkiln.digests import Json, plain_json
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import (
    PARTIAL_SUFFIX,
    copy_hashing,
    digest_file,
    disk_full_named,
    fresh_name,
    partial_directory,
    partial_file,
    remove_unheld,
    rename_durably,
    reserve,
    sync_directory,
    waiting_lock,
    write_durably,
)

MAX_MANIFEST_BYTES = 16 << 20
# Gigabytes that a runtime reads and nobody writes to: not copied where a hard link does.
LINKED_SUFFIXES = (".bmodel", ".neff")
_UNREAD = Blob("sha256:" + "0" * 64, 0)

# First rule that fits decides; a caller's `roles` come before all of them.
_LICENCE_NAMES = ("license", "licence", "notice")
_ROLE_BY_SUFFIX: Mapping[str, Role] = {
    ".bmodel": "binary",
    ".neff": "binary",
    ".onnx": "binary",
    ".safetensors": "weights",
    ".data": "weights",
    ".npz": "constants",
    ".npy": "constants",
    ".md": "doc",
    ".html": "doc",
}


def write_bundle(
    destination: Path,
    files: Mapping[str, Blob | Path],
    manifest: Mapping[str, Json],
    store: Store,
    *,
    roles: Mapping[str, Role] | None = None,
    build: Mapping[str, Json] | None = None,
) -> Manifest:
    """Write the bundle `destination`, replacing one that is there.

    Args:
        files: path in the bundle -> blob of `store`, or a file to copy.
        manifest: the keys of `Manifest` but for `schema_version` and `files`, which are filled in here.
        roles: path -> role where the name does not tell (see `role_of`).
        build: time, host, durations: written to `build.json`, which no digest covers.

    Raises:
        IntegrityError: a blob is missing or damaged, a path or the manifest is not legal. `destination` is unchanged.
        UsageError: `destination` is something else than a bundle.
        ResourceError: the disk is full. `destination` is unchanged.
    """
    validate_manifest_paths(files)
    # Refuse a wrong manifest before gigabytes are copied; digests of plain files are not known yet.
    known = {path: source if isinstance(source, Blob) else _UNREAD for path, source in files.items()}
    _complete(manifest, known, roles or {})
    parent = destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    with disk_full_named(parent), waiting_lock(parent / f".{destination.name}.lock"):
        heal_folder(destination)
        _check_replaceable(destination)
        with partial_directory(parent, f".{destination.name}") as folder:
            entries = {}
            for path, source in sorted(files.items()):
                target = resolve_inside(folder, path)
                target.parent.mkdir(parents=True, exist_ok=True)
                entries[path] = _place(source, target, store)
                if target.suffix == ".sh":
                    target.chmod(0o755)  # stores and registries keep bytes and no modes
            complete = _complete(manifest, entries, roles or {})
            if build is not None:
                data = json.dumps(plain_json(build), indent=1, ensure_ascii=False).encode() + b"\n"
                write_durably(folder / BUILD_FILE, data)
            write_durably(folder / MANIFEST_FILE, complete.to_bytes())
            try:
                swap_folder(folder, destination)
            finally:
                heal_folder(destination)
    return complete


def read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle.

    Raises:
        UsageError: there is no bundle, or its schema version is not known here.
        IntegrityError: the manifest is damaged.
    """
    path = bundle / MANIFEST_FILE
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{bundle} is no bundle: it has no {MANIFEST_FILE}; give the folder that a build wrote"
        ) from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise IntegrityError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes, which no manifest is; fetch it again")
    return parse_manifest(data, str(path))


def verify_bundle(bundle: Path) -> Manifest:
    """Compare every file with the manifest.

    Raises:
        IntegrityError: names the first bad file and lists all: missing, of another size or digest, a symbolic link
            or other special file, or one that the manifest does not name.
        UsageError: as `read_manifest`.
    """
    manifest = read_manifest(bundle)
    listed = {file.path: file for file in manifest.files}
    faults = []
    present = walk_bundle(bundle)
    for path, entry in listed.items():
        if path not in present:
            faults.append(f"{path}: missing")
        elif not present[path]:
            faults.append(f"{path}: not a regular file")
        else:
            digest, size = digest_file(resolve_inside(bundle, path))
            if size != entry.size:
                faults.append(f"{path}: {size} bytes, the manifest says {entry.size}")
            elif digest != entry.digest:
                faults.append(f"{path}: {digest}, the manifest says {entry.digest}")
    faults += [f"{path}: not named by the manifest" for path in sorted(present) if path not in listed]
    if faults:
        more = f"; {len(faults) - 1} more: {'; '.join(faults[1:])}" if faults[1:] else ""
        raise IntegrityError(
            f"{bundle}: {faults[0]}{more}. A bundle holds what its manifest says and nothing else: build or fetch it "
            "again"
        )
    return manifest


def heal_bundle(destination: Path) -> None:
    """Bring `destination` back to one whole bundle, or none, after a process was killed while it wrote it."""
    if destination.parent.is_dir():
        with disk_full_named(destination.parent), waiting_lock(destination.parent / f".{destination.name}.lock"):
            heal_folder(destination)


def role_of(path: str) -> Role:
    """The role that a file's name and folder tell."""
    pure = PurePosixPath(path)
    if pure.name.lower().startswith(_LICENCE_NAMES):
        return "licence"
    if pure.suffix in _ROLE_BY_SUFFIX:
        return _ROLE_BY_SUFFIX[pure.suffix]
    return "tokenizer" if any(name.startswith("tokenizer") for name in pure.parts) else "config"


def _complete(manifest: Mapping[str, Json], entries: Mapping[str, Blob], roles: Mapping[str, Role]) -> Manifest:
    listed: list[Json] = [
        asdict(FileEntry(path, roles.get(path) or role_of(path), blob.digest.removeprefix("sha256:"), blob.size))
        for path, blob in sorted(entries.items())
    ]
    return manifest_from_json({**manifest, "schema_version": SCHEMA_VERSION, "files": listed}, "the new manifest")


def _place(source: Blob | Path, target: Path, store: Store) -> Blob:
    if isinstance(source, Blob):
        store.export(source.digest, target, link=target.suffix in LINKED_SUFFIXES)
        found = os.stat(target).st_size
        if found != source.size:
            raise IntegrityError(f"blob {source.digest} has {found} bytes, {source.size} were expected; build it again")
        return source
    with source.open("rb") as reader:
        size = os.fstat(reader.fileno()).st_size
        with disk_full_named(target.parent, size), partial_file(target.parent, "." + target.name) as (partial, file):
            reserve(file, size)
            blob = Blob(*copy_hashing(reader, file))
            rename_durably(file, partial, target)
    return blob


def swap_folder(folder: Path, destination: Path) -> None:
    """Give `folder` the name of `destination`; what was there waits for `heal_folder` as `.NAME.old`."""
    if destination.exists():
        os.rename(destination, _old(destination))
    os.rename(folder, destination)
    sync_directory(destination.absolute().parent)


def heal_folder(destination: Path) -> None:
    """One whole folder after a swap, or half of one: the new one if it has its name, otherwise the old one."""
    old, parent = _old(destination), destination.absolute().parent
    if old.exists():
        if destination.exists():
            # Under a name that never counts, or half of it could be taken for the folder itself.
            doomed = old.with_name(fresh_name(f".{destination.name}") + PARTIAL_SUFFIX)
            os.rename(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        else:
            os.rename(old, destination)
            sync_directory(parent)
    remove_unheld(parent, prefix=f".{destination.name}.")


def _check_replaceable(destination: Path) -> None:
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise UsageError(f"{destination} is no folder; a bundle replaces a bundle or nothing: give another destination")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{destination} holds files but no {MANIFEST_FILE}, so it is no bundle and is not replaced; remove it or "
            "give another destination"
        )


def _old(destination: Path) -> Path:
    absolute = destination.absolute()
    return absolute.parent / f".{absolute.name}.old"


def walk_bundle(bundle: Path) -> dict[str, bool]:
    """Path -> whether it is a regular file, for everything in the bundle that is no folder."""
    found = {}
    for folder, folders, names in os.walk(bundle):
        for name in [*names, *(name for name in folders if Path(folder, name).is_symlink())]:
            path = Path(folder, name)
            relative = path.relative_to(bundle).as_posix()
            if relative not in (MANIFEST_FILE, BUILD_FILE):
                found[relative] = stat.S_ISREG(path.lstat().st_mode)
    return found
