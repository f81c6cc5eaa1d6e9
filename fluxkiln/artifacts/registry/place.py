"""Where bundles are kept: what a user may write for a place, what pushing and pulling need of one, and a folder.

    oci-layout:PATH:TAG     oci-layout:PATH@sha256:HEX      a folder; no server
    HOST/REPO:TAG           HOST/REPO@sha256:HEX            an OCI registry
    hf://ORG/REPO@REV                                       the Hugging Face Hub

The folder is an OCI image layout, as a store is. Every other kind of place has a file of its own.
Source: OCI distribution-spec v1.1, "pulling manifests" (names and tags); the layout's tags follow image-spec.
"""

from __future__ import annotations

import ipaddress
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol, TypeAlias, TypeVar

from fluxkiln.artifacts.modelpack import MAX_DOCUMENT_BYTES, Document, Layer
from fluxkiln.artifacts.registry.transfer import PIECE_BYTES, Arrival, Departure, Stop
from fluxkiln.artifacts.store import FOLDERS, Blob, Store, open_store
from fluxkiln.digests import DIGEST
from fluxkiln.errors import IntegrityError, RegistryError, UsageError

LAYOUT_PREFIX, HUB_PREFIX = "oci-layout:", "hf://"
_FORMS = "oci-layout:PATH:TAG, HOST/REPO:TAG or hf://ORG/REPO@REV"
MAX_REPOSITORY = 255

_HOST = re.compile(
    r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9-]+(?=:)|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LAYOUT_TAG = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@+/]|--)[A-Za-z0-9]+)*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class _Tagged:
    """A manifest by its tag or its digest; either may be empty."""

    tag: str = field(default="", kw_only=True)
    digest: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """What the manifest is asked for by."""
        return self.digest or self.tag

    @property
    def _ending(self) -> str:
        return f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""


@dataclass(frozen=True, slots=True)
class LayoutReference(_Tagged):
    """A manifest in an OCI image layout on this machine."""

    path: Path

    def __str__(self) -> str:
        return f"{LAYOUT_PREFIX}{self.path}{self._ending}"


@dataclass(frozen=True, slots=True)
class RegistryReference(_Tagged):
    """A manifest in a repository of an OCI registry."""

    host: str
    repository: str

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}{self._ending}"


@dataclass(frozen=True, slots=True)
class HubReference(_Tagged):
    """A revision (branch, tag or commit) of a model repository on the Hugging Face Hub; it has no digest."""

    repository: str

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repository}{'@' + self.tag if self.tag else ''}"


Reference: TypeAlias = LayoutReference | RegistryReference | HubReference
_R = TypeVar("_R", bound=_Tagged)


def looks_like_reference(text: str) -> bool:
    """Whether `text` is meant as a reference and not as a folder."""
    if text.startswith((LAYOUT_PREFIX, HUB_PREFIX)):
        return True
    host, slash, _ = text.partition("/")
    return bool(slash and _HOST.fullmatch(host) and not text.startswith(".") and not Path(text).exists())


def parse_reference(text: str, *, tagged: bool = True) -> Reference:
    """The reference that `text` spells.

    Args:
        tagged: a tag, digest or revision must be there; otherwise it may be left out, as for a list of tags.

    Raises UsageError: none of the forms; names the rule that is broken.
    """
    if text.startswith(LAYOUT_PREFIX):
        found: Reference = _parse_layout(text)
    elif text.startswith(HUB_PREFIX):
        found = _parse_hub(text)
    else:
        found = _parse_registry(text)
    if tagged and not found.name:
        mark = "@REV" if isinstance(found, HubReference) else ":TAG"
        raise UsageError(f"reference {text!r} has no tag; add {mark}")
    return found


def with_tag(reference: _R, tag: str) -> _R:
    """The same place under another tag; UsageError when the tag is not legal there."""
    pattern, rule = {
        LayoutReference: (_LAYOUT_TAG, "letters and digits joined by one of - . _ : / +"),
        RegistryReference: (_TAG, "at most 128 letters, digits, _ . -, not beginning with . or -"),
        HubReference: (_REVISION, "letters, digits, _ . - and / between them"),
    }[type(reference)]
    if not pattern.fullmatch(tag):
        raise UsageError(f"tag {tag!r} is not legal; use {rule}")
    return replace(reference, tag=tag, digest="")


def is_repository(name: str) -> bool:
    """Whether an OCI registry could have a repository of that name."""
    return len(name) <= MAX_REPOSITORY and _REPOSITORY.fullmatch(name) is not None


def is_loopback(host: str) -> bool:
    """Whether `host` (an address, or a name with or without a port) is this machine by name or address."""
    name = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0] if host.count(":") == 1 else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _parse_layout(text: str) -> LayoutReference:
    rest = text.removeprefix(LAYOUT_PREFIX)
    path, at, digest = rest.partition("@")
    if at and DIGEST.fullmatch(digest):
        if not path:
            raise UsageError(f"reference {text!r} names no folder; write {LAYOUT_PREFIX}PATH@sha256:HEX")
        return LayoutReference(Path(path), digest=digest)
    path, colon, tag = rest.partition(":")
    if not path or "\0" in path:
        raise UsageError(f"reference {text!r} names no folder; write {LAYOUT_PREFIX}PATH:TAG")
    found = LayoutReference(Path(path))
    return with_tag(found, tag) if colon else found


def _parse_hub(text: str) -> HubReference:
    repository, at, revision = text.removeprefix(HUB_PREFIX).partition("@")
    names = repository.split("/")
    if len(names) != 2 or not all(_HUB_NAME.fullmatch(name) for name in names):
        raise UsageError(f"reference {text!r} names no repository of the Hub; write {HUB_PREFIX}ORG/REPO@REV")
    found = HubReference(repository)
    return with_tag(found, revision) if at else found


def _parse_registry(text: str) -> RegistryReference:
    if "://" in text:
        scheme = text.split("://")[0]
        raise UsageError(f"reference {text!r} begins with {scheme}://; leave it out: TLS is the rule, --plain-http the "
                         f"exception. The forms are {_FORMS}")  # fmt: skip
    host, slash, rest = text.partition("/")
    if not slash or not _HOST.fullmatch(host):
        raise UsageError(
            f"reference {text!r} begins with no host ({host!r}); a host has a dot, a port, or is localhost. The forms "
            f"are {_FORMS}"
        )
    rest, at, digest = rest.partition("@")
    if at and not DIGEST.fullmatch(digest):
        raise UsageError(f"reference {text!r} has the digest {digest!r}; a digest is 'sha256:' and 64 hex digits")
    repository, colon, tag = rest.partition(":")
    if not is_repository(repository):
        raise UsageError(
            f"reference {text!r} has the repository {repository!r}; use lower-case letters and digits joined by one of "
            ". _ - /, 255 at most"
        )
    found = RegistryReference(host, repository)
    found = with_tag(found, tag) if colon else found
    # With both, the digest decides what is meant, as for other clients.
    return replace(found, tag="", digest=digest) if digest else found


class BlobMissingError(RegistryError):
    """The place does not have a blob that it said it had, or got another manifest than was sent."""


class Place(Protocol):
    """A repository: blobs, manifests, tags. Safe to use from several threads; what it hands over is not checked yet."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def manifest(self, reference: str) -> bytes:
        """The manifest of a tag or digest.

        Raises UsageError: there is none. IntegrityError: its bytes are not those that the place itself announces.
        """

    def has(self, layer: Layer) -> bool:
        """Whether the layer's bytes are there already, as far as can be told without reading them."""

    def send(self, layer: Layer, departure: Departure) -> int:
        """Store the layer's bytes; the number of bytes that had to be sent for it."""

    def receive(self, layer: Layer, arrival: Arrival) -> None:
        """Get the layer's bytes, from where `arrival` stands to the end."""

    def publish(self, document: Document, tag: str) -> None:
        """Make the manifest, all of whose blobs are there, visible under `tag`."""

    def retag(self, document: Document, tag: str) -> None:
        """Another tag for a manifest that is there."""

    def tags(self) -> list[str]:
        """All tags."""

    def close(self) -> None:
        """Let go of connections."""


def changed(source: Path | bytes, layer: Layer) -> IntegrityError:
    """The error for a file that does not have the bytes the bundle's manifest says."""
    where = layer.path if isinstance(source, bytes) else source
    return IntegrityError(
        f"{where} does not have the digest {layer.digest} that its manifest says: the bundle was changed after it was "
        "built and verified. Build it again; nothing was published"
    )


def check_departure(departure: Departure, layer: Layer) -> None:
    """Read what was not sent; IntegrityError when the bytes are not those of the layer."""
    departure.read_rest()
    if departure.digest != layer.digest or departure.actual_size() != layer.size:
        raise changed(departure.source, layer)


@dataclass(frozen=True, slots=True)
class LayoutPlace:
    """The layout in a folder. Opened for reading, nothing in it is touched."""

    store: Store
    stop: Stop

    @property
    def name(self) -> str:
        return f"the layout {self.store.root}"

    def manifest(self, reference: str) -> bytes:
        digest = reference if reference.startswith("sha256:") else self.store.resolve(reference)
        path = self.store.path(digest)
        try:
            if path.stat().st_size > MAX_DOCUMENT_BYTES:
                raise IntegrityError(f"{path} is larger than {MAX_DOCUMENT_BYTES} bytes, which no manifest is")
        except FileNotFoundError:
            raise UsageError(f"{self.name} has no manifest {digest}; `fluxkiln ls` shows its tags") from None
        with self.store.open(digest) as file:
            return file.read()

    def has(self, layer: Layer) -> bool:
        if not self.store.has(Blob(layer.digest, layer.size)):
            return False
        # A damaged one is put aside here and sent again: what is published is whole.
        with suppress(IntegrityError):
            self.store.verify(layer.digest)
            return True
        return False

    def send(self, layer: Layer, departure: Departure) -> int:
        source = departure.source
        blob = self.store.add_bytes(source) if isinstance(source, bytes) else self.store.add_file(source)
        if blob != Blob(layer.digest, layer.size):
            raise changed(source, layer)
        return layer.size

    def receive(self, layer: Layer, arrival: Arrival) -> None:
        with self.store.open(layer.digest) as file:
            size = os.fstat(file.fileno()).st_size
            if size != layer.size:
                raise IntegrityError(
                    f"{layer.path or 'the config'} in {self.name} has {size} bytes, its manifest says {layer.size}; it "
                    "is damaged there: have it published again"
                )
            file.seek(arrival.received)
            while piece := file.read(PIECE_BYTES):
                self.stop.check()
                arrival.write(piece)

    def publish(self, document: Document, tag: str) -> None:
        self.store.tag(tag, self.store.add_bytes(document.data).digest)

    def retag(self, document: Document, tag: str) -> None:
        self.store.tag(tag, document.digest)

    def tags(self) -> list[str]:
        return list(self.store.tags())

    def close(self) -> None:
        pass


def open_layout(path: Path, *, write: bool, stop: Stop) -> LayoutPlace:
    """The layout in `path`; with `write` it is made where there is none.

    Raises UsageError: there is no layout and nothing to be written, or there is something else.
    """
    if not (path / "oci-layout").is_file():
        # a process that was killed may have left the first of these
        begun = {folder.partition("/")[0] for folder in FOLDERS}
        if path.exists() and not (path.is_dir() and {one.name for one in path.iterdir()} <= begun):
            raise UsageError(f"{path} is no OCI image layout: it has no file oci-layout; name another folder")
        if not write:
            raise UsageError(
                f"{path} is no OCI image layout; `fluxkiln publish BUNDLE oci-layout:{path}:TAG` makes one"
            )
    if not write:
        return LayoutPlace(Store(path), stop)
    store = open_store(path)
    # Another program's layout has no folders for work in progress.
    for folder in ("blobs/sha256", "tmp", "locks"):
        (path / folder).mkdir(parents=True, exist_ok=True)
    return LayoutPlace(store, stop)
