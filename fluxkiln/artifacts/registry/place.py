"""What pushing and pulling need of a place where bundles are kept. One file per kind of place implements it."""

from __future__ import annotations

from typing import Protocol

from fluxkiln.artifacts.registry.document import Document, Layer
from fluxkiln.artifacts.registry.transfer import Arrival, Departure
from fluxkiln.errors import RegistryError


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

    def tags(self) -> dict[str, str]:
        """Tag -> digest of its manifest; the digest is empty where asking costs a request each."""

    def close(self) -> None:
        """Let go of connections."""
