"""The store: content-addressed blobs in an OCI image layout, and tags; docs/formats.md lists its files.

A blob appears under its name only when it is whole and on disk, a tag only when everything it names is there.
Source: OCI image-spec v1.1, image-layout.md.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fluxkiln.digests import DIGEST, Json, canonical_json, digest_bytes
from fluxkiln.documents import read_object
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import (
    CopyMethod,
    clone,
    copy_hashing,
    digest_file,
    disk_full_named,
    partial_directory,
    partial_file,
    remove_unheld,
    rename_durably,
    reserve,
    sync_directory,
    waiting_lock,
    write_durably,
)

FOLDERS = ("blobs/sha256", "actions", "tmp", "locks")
LAYOUT_VERSION = "1.0.0"
INDEX_TYPE = "application/vnd.oci.image.index.v1+json"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
TAG_ANNOTATION = "org.opencontainers.image.ref.name"

# image-spec, annotations.md: the grammar of org.opencontainers.image.ref.name.
_TAG = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@+/]|--)[A-Za-z0-9]+)*")


def legal_tag(name: str) -> str:
    """`name` as a tag: itself where the grammar allows it, else its letters and digits, and a digest of all of it."""
    if _TAG.fullmatch(name):
        return name
    plain = "-".join(re.findall(r"[A-Za-z0-9]+", name)) or "build"
    return f"{plain[:80].strip('-')}-{digest_bytes(name.encode()).removeprefix('sha256:')[:10]}"


@dataclass(frozen=True, slots=True)
class Blob:
    """Name (`sha256:<hex>`) and size of some bytes in a store."""

    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of blobs and tags. Making the value touches nothing; the folder is made by the first write."""

    root: Path

    def add_file(self, source: Path, *, move: bool = False, known: str = "") -> Blob:
        """Add a file's bytes, or put a damaged blob right again.

        Args:
            source: a regular file; a symbolic link is followed and its target copied.
            move: `source` is given up. On the same file system it is hashed where it lies and renamed; nothing else
                may write to it meanwhile.
            known: the digest that this process took while it wrote `source`: a moved file is not read again.

        Raises ResourceError: the disk is full.
        """
        self.prepare()
        if move and (blob := self._adopt(source, known)) is not None:
            return blob
        with source.open("rb") as reader:
            blob = self._add(reader, os.fstat(reader.fileno()).st_size)
        if move:
            source.unlink()
        return blob

    def add_bytes(self, data: bytes) -> Blob:
        """Add `data`."""
        self.prepare()
        return self._add(io.BytesIO(data), len(data))

    def path(self, digest: str) -> Path:
        """Where the blob lies or would lie; IntegrityError when `digest` is no sha256 digest."""
        if not DIGEST.fullmatch(digest):
            raise IntegrityError(f"{digest!r} is no digest; a digest is 'sha256:' and 64 lower-case hex digits")
        return self.root / "blobs" / "sha256" / digest.removeprefix("sha256:")

    def has(self, blob: Blob) -> bool:
        """Whether a blob of that name and size is there. Its bytes are not read."""
        try:
            found = os.stat(self.path(blob.digest), follow_symlinks=False)
        except FileNotFoundError:
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == blob.size

    def open(self, digest: str) -> io.BufferedReader:
        """Open the blob for reading; IntegrityError when it is not there."""
        path = self.path(digest)
        try:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")
        except FileNotFoundError as error:
            raise IntegrityError(
                f"blob {digest} is not in the store {self.root}; run the build again: what made it runs again"
            ) from error

    def read(self, digest: str) -> bytes:
        """All bytes of a small blob, checked."""
        with self.open(digest) as file:
            data = file.read()
        self._check(digest, digest_bytes(data))
        return data

    def verify(self, digest: str) -> Blob:
        """Read the blob and compare its digest.

        Raises IntegrityError: not there, or damaged; a damaged blob is put into quarantine, so that it is built again.
        """
        with self.open(digest) as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            size = os.fstat(file.fileno()).st_size
        self._check(digest, "sha256:" + found)
        return Blob(digest, size)

    def export(self, digest: str, destination: Path, *, link: bool = False) -> CopyMethod:
        """Write the blob's bytes, checked, to `destination` and return how: reflink where possible, else a copy.

        Args:
            link: where the file system has no reflinks, a hard link does as well: for files of gigabytes that nobody
                writes to. Both names are read-only; a write through one would reach the other. ONNX refuses such links
                for external data.

        Raises:
            IntegrityError: not there, or damaged (quarantined); `destination` is untouched.
            ResourceError: the disk is full.
        """
        directory = destination.parent
        with self.open(digest) as source:
            size = os.fstat(source.fileno()).st_size
            with disk_full_named(directory, size), partial_file(directory, "." + destination.name) as (partial, file):
                method: CopyMethod = "reflink" if clone(source, file) else "copy"
                if method == "copy" and link and os.stat(self.path(digest)).st_dev == os.stat(directory).st_dev:
                    self.verify(digest)
                    partial.unlink()
                    os.link(self.path(digest), partial)
                    os.replace(partial, destination)
                    sync_directory(directory)
                    return "link"
                if method == "reflink":
                    found, _ = digest_file(partial)
                else:
                    reserve(file, size)
                    found, _ = copy_hashing(source, file)
                self._check(digest, found)
                rename_durably(file, partial, destination)
        return method

    def tag(self, name: str, digest: str) -> None:
        """Point the tag `name` to a manifest, replacing what it pointed to. Readers see the old or the new one.

        Raises:
            UsageError: `name` is no legal tag.
            IntegrityError: the manifest, or a blob that it names, is not in the store.
        """
        if not _TAG.fullmatch(name):
            raise UsageError(f"tag {name!r} is not legal; use letters and digits joined by one of - . _ : / +")
        # Under the lock: no garbage collection comes between looking and tagging.
        with self.index_locked():
            manifest = read_object(self.read(digest), f"manifest {digest}")
            for blob in manifest_blobs(manifest, digest):
                if not self.has(blob):
                    raise IntegrityError(
                        f"manifest {digest} names {blob.digest} ({blob.size} bytes), which is not in the store "
                        f"{self.root}; add it before the tag {name!r}"
                    )
            entry: dict[str, Json] = {
                "mediaType": manifest.get("mediaType", MANIFEST_TYPE),
                "digest": digest,
                "size": os.stat(self.path(digest)).st_size,
                "annotations": {TAG_ANNOTATION: name},
            }
            if "artifactType" in manifest:
                entry["artifactType"] = manifest["artifactType"]
            kept = [other for other in self._entries() if _tag_of(other) != name]
            self._write_index(sorted([*kept, entry], key=_tag_of))

    def tags(self) -> dict[str, str]:
        """Tag -> digest of its manifest."""
        return {_tag_of(entry): str(entry["digest"]) for entry in self._entries() if _tag_of(entry)}

    def reachable(self) -> frozenset[str]:
        """Digests of all manifests that the index names, tagged or not, and of what they name in turn.

        Raises IntegrityError: one of the manifests is missing or damaged.
        """
        keep: set[str] = set()
        todo = [str(entry["digest"]) for entry in self._entries()]
        while todo:
            if (digest := todo.pop()) in keep:
                continue
            keep.add(digest)
            manifest = read_object(self.read(digest), f"manifest {digest}")
            nested = manifest.get("manifests")
            if isinstance(nested, list):  # an index of manifests, by another program
                todo += [str(entry["digest"]) for entry in nested if isinstance(entry, dict) and "digest" in entry]
            else:
                keep.update(blob.digest for blob in manifest_blobs(manifest, digest))
        return frozenset(keep)

    def resolve(self, name: str) -> str:
        """The digest of the manifest tagged `name`; UsageError with the tags there are otherwise."""
        tags = self.tags()
        if name not in tags:
            raise UsageError(f"no tag {name!r} in the store {self.root}; it has {', '.join(tags) or 'none'}")
        return tags[name]

    def digests(self) -> Iterator[Blob]:
        """All blobs in the order of their digests."""
        folder = self.root / "blobs" / "sha256"
        if folder.is_dir():
            for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
                if DIGEST.fullmatch("sha256:" + entry.name):
                    yield Blob("sha256:" + entry.name, entry.stat().st_size)

    @contextmanager
    def workdir(self, label: str) -> Iterator[Path]:
        """A fresh folder on the store's file system, removed afterwards; after a `kill -9` by `clean`."""
        self.prepare()
        safe = re.sub(r"[^A-Za-z0-9_-]+", "-", label)[:80]
        with disk_full_named(self.root), partial_directory(self.root / "tmp", safe) as path:
            yield path

    def clean(self) -> tuple[str, ...]:
        """Remove what dead processes left in `tmp` and return its names. What a living process holds stays."""
        return remove_unheld(self.root / "tmp")

    def write_record(self, name: str, value: Json) -> None:
        """Replace the JSON file `name` of the store (`index.json`, `actions/<hex>.json`) at once."""
        write_durably(self.root / name, canonical_json(value), partials=self.root / "tmp")

    def prepare(self) -> None:
        """Make the layout's folders and an empty index where there is none."""
        if (self.root / "index.json").exists():
            return
        with disk_full_named(self.root):
            for folder in FOLDERS:
                (self.root / folder).mkdir(parents=True, exist_ok=True)
        with self.index_locked():
            if not (self.root / "index.json").exists():
                self.write_record("oci-layout", {"imageLayoutVersion": LAYOUT_VERSION})
                self._write_index([])

    def _adopt(self, source: Path, known: str) -> Blob | None:
        """Hash `source` in place and rename it into the store; None where that is not safe or not possible."""
        fd = os.open(source, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            before = os.fstat(fd)
            # Another name of the same inode could change the blob later.
            if source.is_symlink() or before.st_nlink != 1 or before.st_dev != os.stat(self.root / "tmp").st_dev:
                return None
            digest = known or "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(fd)
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise IntegrityError(f"{source} was written to while it was added; let its writer finish first")
            with disk_full_named(self.root, before.st_size):
                os.fchmod(fd, 0o444)
                os.fsync(fd)
                final = self.path(digest)
                try:
                    os.rename(source, final)
                except OSError as error:
                    if error.errno == errno.EXDEV:  # bind mounts share st_dev
                        return None
                    raise
                sync_directory(final.parent)
            return Blob(digest, before.st_size)

    def _add(self, source: io.BufferedReader | io.BytesIO, expected: int) -> Blob:
        folder = self.root / "tmp"
        with disk_full_named(self.root, expected), partial_file(folder, "blob") as (partial, file):
            reserve(file, expected)
            digest, size = copy_hashing(source, file)
            rename_durably(file, partial, self.path(digest), mode=0o444)
        return Blob(digest, size)

    def _check(self, digest: str, found: str) -> None:
        if found == digest:
            return
        aside = self.root / "quarantine" / digest.removeprefix("sha256:")
        aside.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(self.path(digest), aside)
        raise IntegrityError(
            f"blob {digest} is damaged: its bytes have the digest {found}. It was moved to {aside}; run the build "
            "again: what made it runs again"
        )

    @contextmanager
    def index_locked(self) -> Iterator[None]:
        """Nobody else changes tags, or takes blobs away, meanwhile."""
        with disk_full_named(self.root), waiting_lock(self.root / "locks" / "index.lock"):
            yield

    def _entries(self) -> list[Mapping[str, Json]]:
        path = self.root / "index.json"
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
        entries = read_object(data, str(path)).get("manifests")
        if not isinstance(entries, list):
            raise IntegrityError(
                f"{path} has no list 'manifests'; it is no OCI index. Restore it or move the store away"
            )
        return [entry for entry in entries if isinstance(entry, dict) and "digest" in entry]

    def _write_index(self, entries: list[Mapping[str, Json]]) -> None:
        self.write_record("index.json", {"schemaVersion": 2, "mediaType": INDEX_TYPE, "manifests": list(entries)})


def open_store(root: Path) -> Store:
    """The store in `root`, made if need be and rid of what dead processes left behind."""
    store = Store(root)
    store.prepare()
    store.clean()
    return store


def manifest_blobs(manifest: Mapping[str, Json], where: str) -> tuple[Blob, ...]:
    """The config and the layers that an OCI manifest names, in that order."""
    layers = manifest.get("layers")
    blobs = []
    for entry in [manifest.get("config"), *(layers if isinstance(layers, list) else [None])]:
        if (blob := read_blob(entry)) is None:
            raise IntegrityError(f"manifest {where} is no OCI image manifest: config and layers need digest and size")
        blobs.append(blob)
    return tuple(blobs)


def read_blob(entry: Json) -> Blob | None:
    """The blob that a JSON object names by `digest` and `size`, if it does."""
    digest, size = (entry.get("digest"), entry.get("size")) if isinstance(entry, dict) else (None, None)
    return Blob(digest, size) if isinstance(digest, str) and isinstance(size, int) else None


def _tag_of(entry: Mapping[str, Json]) -> str:
    annotations = entry.get("annotations")
    return str(annotations.get(TAG_ANNOTATION, "")) if isinstance(annotations, Mapping) else ""
