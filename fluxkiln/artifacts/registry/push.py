"""Sending a bundle: blobs in parallel, each hashed as it is read; the manifest when all are there; the tag last."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fluxkiln.artifacts.modelpack import Document, Layer
from fluxkiln.artifacts.registry.place import BlobMissingError, Place, check_departure
from fluxkiln.artifacts.registry.transfer import TRANSFERS, Departure, Meter, Stop, each
from fluxkiln.progress import Progress

_ROUNDS = 2


@dataclass(frozen=True, slots=True)
class Pushed:
    """What a push did: `sent` bytes of blobs went out, for the files in `files`; the others were there already."""

    digest: str
    files: tuple[str, ...]
    present: int
    sent: int


def push(
    place: Place,
    document: Document,
    config: bytes,
    sources: Mapping[str, Path | bytes],
    tag: str,
    *,
    stop: Stop,
    jobs: int = TRANSFERS,
    progress: Progress | None = None,
) -> Pushed:
    """Send what is missing and publish the manifest under `tag`. Every byte of every source is read and hashed once.

    Args:
        config: the bytes that `document.config` names.
        sources: a layer's path -> its file or its bytes.

    Raises:
        IntegrityError: a file does not have the digest its layer says; nothing was published.
        RegistryError: the place refuses, or cannot be reached.
    """
    # Of equal files the first stands for all.
    layers = list({layer.digest: layer for layer in reversed(document.layers)}.values())
    same = [layer for layer in document.layers if layer not in layers]
    lock = threading.Lock()
    for turn in range(_ROUNDS):
        sent: dict[str, int] = {}
        meter = Meter(progress, "push", [*layers, document.config])

        def work(layer: Layer, again: bool = turn > 0, sent: dict[str, int] = sent, meter: Meter = meter) -> None:
            stop.check()
            source = config if layer is document.config else sources[layer.path]
            departure = Departure(source, layer.size, partial(meter.move, layer))
            if not again and place.has(layer):
                check_departure(departure, layer)
                meter.finish(layer, "there already")
                return
            count = place.send(layer, departure)
            if not count and layer.size:
                meter.finish(layer, "taken over from another repository")
                return
            with lock:
                sent[layer.path] = count
            meter.finish(layer, "sent")

        # Large files first: the last one to end should be small.
        each([*sorted(layers, key=lambda layer: -layer.size), document.config], work, stop, jobs)
        for layer in same:
            # Equal digests in the manifest; whether the files are equal too is for the bytes to say.
            check_departure(Departure(sources[layer.path], layer.size), layer)
        try:
            place.publish(document, tag)
            break
        except BlobMissingError:
            # It said that it had a blob, and has not: this time nothing is believed.
            if turn + 1 == _ROUNDS:
                raise
    files = tuple(sorted(path for path in sent if path))
    return Pushed(document.digest, files, len(layers) - len(files), sum(sent.values()))
