"""Where bundles are kept: what pushing and pulling need of a place, and the simplest one, a folder.

The folder is an OCI image layout, the same one a store is. Every other kind of place has a file of its own.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fluxkiln.artifacts.modelpack import MAX_DOCUMENT_BYTES, Document, Layer
from fluxkiln.artifacts.registry.transfer import PIECE_BYTES, Arrival, Departure, Stop
from fluxkiln.artifacts.store import Blob, Store, open_store
from fluxkiln.errors import IntegrityError, RegistryError, UsageError


class BlobMissingError(RegistryError):
    """The place does not have a blob that it said it had, or got another manifest than was sent."""


class Place(Protocol):
    """A repository: blobs, manifests, tags. Safe to use from several threads; what it hands over is not checked yet."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def manifest(self, reference: str) -> bytes:
        """The manifest of a tag or digest.

        Raises:
            UsageError: there is none. IntegrityError: its bytes are not those that the place itself announces.
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

    Raises:
        UsageError: there is no layout and nothing to be written, or there is something else.
    """
    if not (path / "oci-layout").is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
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
