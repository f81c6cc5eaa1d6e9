"""An OCI image layout as a registry: a folder, the same one a store is."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from fluxkiln.artifacts.registry.document import MAX_DOCUMENT_BYTES, Document, Layer
from fluxkiln.artifacts.registry.transfer import PIECE, Arrival, Departure, Stop
from fluxkiln.artifacts.store import Blob, Store, open_store
from fluxkiln.errors import IntegrityError, UsageError


@dataclass(frozen=True, slots=True)
class LayoutPlace:
    """The layout in a folder. Opened for reading, nothing in it is touched."""

    store: Store
    stop: Stop = field(default_factory=Stop)

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
        blob = Blob(layer.digest, layer.size)
        if not self.store.has(blob):
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
            raise IntegrityError(changed(source, layer))
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
            while piece := file.read(PIECE):
                self.stop.check()
                arrival.write(piece)

    def publish(self, document: Document, tag: str) -> None:
        digest = self.store.add_bytes(document.data).digest
        self.store.tag(tag, digest)

    def retag(self, document: Document, tag: str) -> None:
        self.store.tag(tag, document.digest)

    def tags(self) -> dict[str, str]:
        return self.store.tags()

    def close(self) -> None:
        pass


def open_layout(path: Path, *, write: bool, stop: Stop | None = None) -> LayoutPlace:
    """The layout in `path`.

    Args:
        write: it is made where there is none.

    Raises:
        UsageError: there is no layout and nothing to be written, or there is something else.
    """
    layout = path / "oci-layout"
    if not layout.is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(f"{path} is no OCI image layout: it has no file oci-layout; name another folder")
        if not write:
            raise UsageError(
                f"{path} is no OCI image layout; `fluxkiln publish BUNDLE oci-layout:{path}:TAG` makes one"
            )
    store = open_store(path) if write else Store(path)
    if write:
        # Another program's layout has no folders for work in progress.
        for folder in ("blobs/sha256", "tmp", "locks"):
            (path / folder).mkdir(parents=True, exist_ok=True)
    return LayoutPlace(store, stop or Stop())


def changed(source: Path | bytes, layer: Layer) -> str:
    """The message for a file that does not have the bytes the bundle's manifest says."""
    where = layer.path if isinstance(source, bytes) else str(source)
    return (
        f"{where} does not have the digest {layer.digest} that its manifest says: the bundle was changed after it was "
        "built and verified. Build it again; nothing was published"
    )
