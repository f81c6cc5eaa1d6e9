"""Bundles: the folder that a runtime loads, written whole or not at all, `manifest.json` last.

A new one is assembled as `.NAME.*.partial`; two renames, the old one's to `.NAME.old`, swap them. After a `kill -9` a
`NAME` that is there counts, else `.NAME.old`: the next `write_bundle` or `heal_bundle` removes the others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fluxkiln.artifacts.intact import encode_record
from fluxkiln.artifacts.manifest import (
    BUILD_FILE,
    MANIFEST_FILE,
    SCHEMA_VERSION,
    FileEntry,
    Manifest,
    manifest_from_json,
    resolve_inside,
    role_of,
    validate_manifest_paths,
)
from fluxkiln.artifacts.store import Blob, Store
from fluxkiln.digests import Json
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import (
    PARTIAL_SUFFIX,
    copy_hashing,
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

# Gigabytes that a runtime reads and nobody writes to: not copied where a hard link does.
LINKED_SUFFIXES = (".bmodel", ".neff")
_UNREAD = Blob("sha256:" + "0" * 64, 0)


def write_bundle(
    destination: Path,
    files: Mapping[str, Blob | Path],
    manifest: Mapping[str, Json],
    store: Store,
    *,
    build: Mapping[str, Json] | None = None,
) -> Manifest:
    """Write the bundle `destination`, replacing one that is there.

    Args:
        files: path in the bundle -> blob of `store`, or a file to copy.
        manifest: the keys of `Manifest` but for `schema_version` and `files`, which are filled in here.
        build: time, host, durations: written to `build.json`, which the manifest does not cover.

    Raises:
        IntegrityError: a blob is missing or damaged, a path or the manifest is not legal. `destination` is unchanged.
        UsageError: `destination` is something else than a bundle.
        ResourceError: the disk is full. `destination` is unchanged.
    """
    validate_manifest_paths(files)
    # Refuse a wrong manifest before gigabytes are copied; digests of plain files are not known yet.
    known = {path: source if isinstance(source, Blob) else _UNREAD for path, source in files.items()}
    _complete(manifest, known)
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
            complete = _complete(manifest, entries)
            if build is not None:
                write_durably(folder / BUILD_FILE, encode_record(build, [complete.digest]))
            write_durably(folder / MANIFEST_FILE, complete.to_bytes())
            try:
                swap_folder(folder, destination)
            finally:
                heal_folder(destination)
    return complete


def heal_bundle(destination: Path) -> None:
    """Bring `destination` back to one whole bundle, or none, after a process was killed while it wrote it."""
    if destination.parent.is_dir():
        with disk_full_named(destination.parent), waiting_lock(destination.parent / f".{destination.name}.lock"):
            heal_folder(destination)


def _complete(manifest: Mapping[str, Json], entries: Mapping[str, Blob]) -> Manifest:
    listed: list[Json] = [
        asdict(FileEntry(path, role_of(path), blob.digest.removeprefix("sha256:"), blob.size))
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
