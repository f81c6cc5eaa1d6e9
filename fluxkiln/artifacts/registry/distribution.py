"""A bundle pushed: blobs in parallel, the manifest when all are there, the tag last; pulled: every byte checked.

A pull fills `.NAME.pull-HEX`, then two renames swap it with an earlier one, for a while `.NAME.old`. After a `kill -9`
the next pull goes on in it when it is for the same manifest, and heals the rest as `artifacts.bundle` does.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fluxkiln.artifacts.bundle import heal_folder, swap_folder
from fluxkiln.artifacts.intact import BUNDLE, PULLED_FILE, encode_record, read_manifest, walk_bundle
from fluxkiln.artifacts.manifest import MANIFEST_FILE, Manifest, parse_manifest
from fluxkiln.artifacts.modelpack import (
    MAX_EXTRA_BYTES,
    Document,
    Layer,
    check_bundle,
    check_config,
    parse_document,
    pulled_path,
)
from fluxkiln.artifacts.registry.place import BlobMissingError, Place, check_departure
from fluxkiln.artifacts.registry.transfer import TRANSFERS, Arrival, Departure, Meter, Stop, each
from fluxkiln.digests import Json
from fluxkiln.errors import FluxkilnError, IntegrityError, ResourceError, UsageError
from fluxkiln.files import digest_file, disk_full_named, sync_directory, waiting_lock, write_durably
from fluxkiln.progress import Progress

# Pushes: after one that a place refused, another that believes nothing it says it has.
_ROUNDS = 2
_PARTS = "parts"
# A file whose bytes are wrong is fetched anew once: a wire may have flipped a bit, a disk will do it again.
_TRIES = 2
# Left to others on the disk.
_SPARE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Found:
    """What lies under a tag, without its files: the checked manifest and the bundle's own."""

    document: Document
    manifest: Manifest


def look_up(place: Place, reference: str) -> Found:
    """Fetch and check the manifest, the config and `manifest.json` of a bundle.

    Raises UsageError: no such tag. IntegrityError: anything about them is not as it must be.
    """
    where = f"manifest {reference} of {place.name}"
    data = place.manifest(reference)
    document = parse_document(data, where, reference if reference.startswith("sha256:") else "")
    check_config(document, receive_small(place, document.config), where)
    layer = document.find(MANIFEST_FILE)
    assert layer is not None
    manifest = parse_manifest(receive_small(place, layer), f"{MANIFEST_FILE} of {where}")
    check_bundle(document, manifest, where)
    return Found(document, manifest)


def receive_small(place: Place, layer: Layer) -> bytes:
    """The bytes of a layer that fits into memory, checked; IntegrityError when they are others or too many."""
    if layer.size > MAX_EXTRA_BYTES:
        raise IntegrityError(
            f"{layer.path} has {layer.size} bytes in {place.name}, {MAX_EXTRA_BYTES} are the most; have the bundle "
            "published again"
        )
    for _ in range(_TRIES):
        buffer = io.BytesIO()
        arrival = Arrival(buffer, layer.size)
        place.receive(layer, arrival)
        if arrival.digest == layer.digest:
            return buffer.getvalue()
    raise IntegrityError(
        f"{layer.path or 'the config'} from {place.name} has the digest {arrival.digest}, its manifest says "
        f"{layer.digest}; it is damaged there: have it published again"
    )


def pull(
    place: Place,
    found: Found,
    destination: Path,
    *,
    record: Mapping[str, Json],
    stop: Stop,
    check: Callable[[Path, Document], None] = lambda staging, document: None,
    jobs: int = TRANSFERS,
    progress: Progress | None = None,
) -> None:
    """Fetch everything that `found` names into `destination`: `bundle/` and, beside it, card, provenance, report.

    Args:
        destination: nothing, an empty folder, or an earlier pull, which is replaced. record: written to `pulled.json`.
        check: called with the finished folder before it gets its name; what it raises ends the pull.

    Raises:
        IntegrityError: bytes that are not what the manifest says; they lie in quarantine beside `destination`, which
            is unchanged.
        RegistryError: the place failed for too long; the same pull goes on where this one ended.
        ResourceError: the disk is full; nothing is left. UsageError: `destination` is something else.
    """
    parent = destination.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    name = destination.absolute().name
    staging = parent / f".{name}.pull-{found.document.digest.removeprefix('sha256:')[:16]}"
    with waiting_lock(parent / f".{name}.lock"):
        _heal(destination, keep=staging)
        check_replaceable(destination)
        _check_room(parent, staging, found.document)
        stop.allow(found.document.size)
        with disk_full_named(parent, found.document.size):
            try:
                _receive_all(place, found.document, staging, stop, jobs, progress, _earlier_files(destination))
                write_durably(staging / PULLED_FILE, encode_record(record, [found.manifest.digest]))
            except _DamagedError as error:
                # Kept for those who want to look at it; the rest can be fetched again.
                aside, name = quarantine_of(destination), error.layer.digest.removeprefix("sha256:")
                with suppress(OSError):
                    aside.mkdir(exist_ok=True)
                    os.replace(staging / _PARTS / name, aside / name)
                shutil.rmtree(staging, ignore_errors=True)
                raise IntegrityError(f"{error}. What came lies in {aside / name}") from None
            except (ResourceError, IntegrityError, OSError):
                shutil.rmtree(staging, ignore_errors=True)
                raise
        try:
            check(staging, found.document)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        swap_folder(staging, destination)
        _heal(destination)


def quarantine_of(destination: Path) -> Path:
    """Where files are put that did not have the bytes they should."""
    return destination.absolute().with_name(f"{destination.absolute().name}.quarantine")


def check_replaceable(destination: Path) -> None:
    """UsageError when `destination` is neither nothing, an empty folder, nor an earlier pull."""
    if destination.is_symlink() or (destination.exists() and not destination.is_dir()):
        raise UsageError(f"{destination} is no folder; a pull makes a folder or replaces an earlier pull: name another")
    if destination.is_dir() and any(destination.iterdir()) and not (destination / PULLED_FILE).is_file():
        raise UsageError(
            f"{destination} holds files but no {PULLED_FILE}, so it is no earlier pull and is not replaced; remove it "
            "or name another folder"
        )


def _receive_all(
    place: Place, document: Document, staging: Path, stop: Stop, jobs: int, progress: Progress | None,
    earlier: Mapping[str, Path],
) -> None:  # fmt: skip
    (staging / _PARTS).mkdir(parents=True, exist_ok=True)
    groups: dict[str, list[Layer]] = {}
    for layer in document.layers:
        groups.setdefault(layer.digest, []).append(layer)
    meter = Meter(progress, "pull", [group[0] for group in groups.values()])

    def work(group: Sequence[Layer]) -> None:
        stop.check()
        _receive_file(place, group[0], staging, meter, earlier.get(group[0].digest))
        for other in group[1:]:
            target = staging / pulled_path(other.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            shutil.copyfile(staging / pulled_path(group[0].path), target)
            with target.open("rb") as file:
                os.fsync(file.fileno())

    each(sorted(groups.values(), key=lambda group: -group[0].size), work, stop, jobs)
    shutil.rmtree(staging / _PARTS)
    for folder, _, _ in os.walk(staging):
        sync_directory(Path(folder))


def _receive_file(place: Place, layer: Layer, staging: Path, meter: Meter, earlier: Path | None) -> None:
    final = staging / pulled_path(layer.path)
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        # From an earlier process; only its bytes can tell whether they reached the disk.
        if digest_file(final) == (layer.digest, layer.size):
            meter.finish(layer, "there already")
            return
        final.unlink()
    part = staging / _PARTS / layer.digest.removeprefix("sha256:")
    if earlier is not None and not part.exists():
        with suppress(OSError):
            shutil.copyfile(earlier, part)
    fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(fd, "r+b") as file:
        arrival = Arrival(file, layer.size, partial(meter.move, layer))
        arrival.take_up()
        if arrival.complete and arrival.digest != layer.digest:
            arrival.restart()
        for turn in range(_TRIES):
            place.receive(layer, arrival)
            if arrival.complete and arrival.digest == layer.digest:
                break
            if turn + 1 == _TRIES:
                raise _DamagedError(layer, arrival.digest, place.name)
            arrival.restart()
        file.flush()
        os.fsync(fd)
    os.rename(part, final)
    meter.finish(layer, "received")


def _earlier_files(destination: Path) -> dict[str, Path]:
    """Digest -> file of the bundle that is replaced, where it has its size: most of a new version is the old one."""
    try:
        manifest = read_manifest(destination / BUNDLE)
    except (FluxkilnError, OSError):
        return {}
    whole = walk_bundle(destination / BUNDLE)
    paths = {file: destination / BUNDLE / file.path for file in manifest.files if whole.get(file.path)}
    return {file.digest: path for file, path in paths.items() if path.stat().st_size == file.size}


class _DamagedError(IntegrityError):
    """Bytes of a layer that are not those its digest names."""

    def __init__(self, layer: Layer, digest: str, name: str) -> None:
        self.layer = layer
        super().__init__(
            f"{layer.path} from {name} has the digest {digest}, its manifest says {layer.digest}, and so it was when "
            "fetched again: it is damaged there. Have it published again"
        )


def _check_room(parent: Path, staging: Path, document: Document) -> None:
    there = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file()) if staging.is_dir() else 0
    stat = os.statvfs(parent)
    free, needed = stat.f_bavail * stat.f_frsize, document.size - there + _SPARE_BYTES
    if needed > free:
        raise ResourceError(
            f"{parent}: the bundle has {document.size} bytes, {free} are free, and {_SPARE_BYTES} are left to others; "
            "make room, or pull to a larger disk. Nothing was fetched"
        )


def _heal(destination: Path, keep: Path | None = None) -> None:
    heal_folder(destination)
    for path in destination.absolute().parent.glob(f".{destination.absolute().name}.pull-*"):
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)


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
        config: the bytes that `document.config` names. sources: a layer's path -> its file or its bytes.

    Raises:
        IntegrityError: a file does not have the digest its layer says; nothing was published.
        RegistryError: the place refuses, or cannot be reached.
    """
    # Of equal files the first stands for all.
    layers = list({layer.digest: layer for layer in reversed(document.layers)}.values())
    same = [layer for layer in document.layers if layer not in layers]
    lock = threading.Lock()
    stop.allow(document.size)
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
