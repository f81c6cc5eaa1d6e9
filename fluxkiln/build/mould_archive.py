"""Moulds beyond a build: made from configs alone, listed, and carried from one store to another in a file.

The file is a plain tar: `moulds.json`, the records of the actions that made the moulds (templates, moulds, proofs and
combined shells), then `blobs/sha256/<hex>` for every blob that they name. A record's key is made of everything its
result depends on, the code's version included, so it is found again only where it is true.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fluxkiln import __version__
from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Blob, Store
from fluxkiln.build.make import outline
from fluxkiln.compile.toolchain import all_toolchains, toolchain_of
from fluxkiln.digests import canonical_json
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import disk_full_named, partial_file, rename_durably
from fluxkiln.progress import Progress, Silent
from fluxkiln.settings import Settings

MOULDS_FILE, _FORMAT = "moulds.json", "fluxkiln.moulds/1"
MAX_INDEX_BYTES = 64 << 20
_BLOB = re.compile(r"blobs/sha256/([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class MouldEntry:
    """One mould of a store. `size` is that of its files; `why` says why nothing can be cast into it, or is empty."""

    key: str
    what: str
    chip: str
    scheme: str
    inputs: Mapping[str, list[int]]
    size: int
    weight_bytes: int
    why: str

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "castable": not self.why}


def build_moulds(settings: Settings, progress: Progress | None = None) -> list[MouldEntry]:
    """Compile and prove the mould of every kind that a build would need; errors as `build`.

    Only the model's configs are read: no weight is there or needed.
    """
    prepared = outline(settings)
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    keys = toolchain_of(plan.target).build_moulds(checkpoint, plan, cache, settings, progress or Silent())
    return [entry for entry in list_moulds(cache.store) if entry.key in keys]


def list_moulds(store: Store) -> list[MouldEntry]:
    """All moulds of a store, by what they are."""
    entries = []
    for record in ActionCache(store).records():
        if record["stage"] != "mould":
            continue
        outputs, facts, settings = (_mapping(record[name]) for name in ("outputs", "facts", "settings"))
        entries.append(
            MouldEntry(
                key=str(record["key"]),
                what=str(record["what"]),
                chip=str(settings.get("chip", "")),
                scheme=str(settings.get("scheme", "")),
                inputs={str(name): list(shape) for name, _, shape in facts.get("inputs", [])},
                size=sum(int(_mapping(blob)["size"]) for blob in outputs.values()),
                weight_bytes=int(facts.get("weight_bytes", 0)),
                why=str(facts.get("why", "")),
            )
        )
    return sorted(entries, key=lambda entry: (entry.chip, entry.what, entry.scheme, entry.key))


def export_moulds(store: Store, target: Path, chip: str | None = None) -> list[MouldEntry]:
    """Write every castable mould of a store, or of a chip, its template, proof and combined shells to one file.

    UsageError: there is none. IntegrityError: a blob is damaged; nothing is written.
    """
    moulds = [entry for entry in list_moulds(store) if not entry.why and chip in (None, entry.chip)]
    if not moulds:
        raise UsageError(f"{store.root} has no moulds{f' for {chip}' if chip else ''}; fluxkiln mould build makes some")
    records = [record for record in ActionCache(store).records() if _travels(record, chip)]
    blobs = {blob.digest: blob for record in records for blob in _blobs(record)}
    index: dict[str, Any] = {"format": _FORMAT, "fluxkiln": __version__, "records": records}
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_named(target.parent), partial_file(target.parent, f".{target.name}") as (partial, file):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            data = canonical_json(index)
            archive.addfile(_member(MOULDS_FILE, len(data)), io.BytesIO(data))
            for digest in sorted(blobs):
                store.verify(digest)
                name = f"blobs/sha256/{digest.removeprefix('sha256:')}"
                with store.open(digest) as source:
                    archive.addfile(_member(name, blobs[digest].size), source)
        rename_durably(file, partial, target)
    return moulds


def import_moulds(store: Store, source: Path) -> list[MouldEntry]:
    """Take over the moulds of a file that `export_moulds` wrote. Every blob's digest is checked; none is run.

    UsageError: no such file, or something else. IntegrityError: a blob does not have the digest that its name says, or
    one is missing; no record is taken over.
    """
    try:
        with source.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = iter(archive)
            records = _read_index(archive, next(members, None), source)
            wanted = {blob.digest: blob for record in records for blob in _blobs(record)}
            for member in members:
                match = _BLOB.fullmatch(member.name)
                data = archive.extractfile(member) if member.isreg() else None
                if match is None or data is None or f"sha256:{match[1]}" not in wanted:
                    raise IntegrityError(
                        f"{source} holds {member.name!r}, which its {MOULDS_FILE} does not name; fetch it again"
                    )
                _take(store, wanted.pop(f"sha256:{match[1]}"), data, source)
    except (OSError, tarfile.TarError) as error:
        raise UsageError(
            f"{source} is no file of moulds ({error}); give one that fluxkiln mould export wrote"
        ) from error
    missing = [digest for digest, blob in wanted.items() if not store.has(blob)]
    if missing:
        raise IntegrityError(f"{source} ends before {missing[0]}, which its {MOULDS_FILE} names; fetch it again")
    cache = ActionCache(store)
    for record in records:
        cache.adopt(record)
    keys = {str(record["key"]) for record in records}
    return [entry for entry in list_moulds(store) if entry.key in keys]


def _take(store: Store, blob: Blob, data: Any, source: Path) -> None:
    with store.workdir("import") as folder, disk_full_named(store.root, blob.size):
        copy = folder / "blob"
        with copy.open("wb") as file:
            while block := data.read(1 << 20):
                file.write(block)
        found = store.add_file(copy, move=True)
    if found != blob:
        raise IntegrityError(f"{source}: a blob has {found.digest}, its name says {blob.digest}; fetch it again")


def _read_index(archive: tarfile.TarFile, member: tarfile.TarInfo | None, source: Path) -> list[Mapping[str, Any]]:
    data = archive.extractfile(member) if member is not None and member.name == MOULDS_FILE and member.isreg() else None
    if data is None or member is None or member.size > MAX_INDEX_BYTES:
        raise UsageError(f"{source} does not begin with {MOULDS_FILE}; give a file that fluxkiln mould export wrote")
    try:
        index = json.loads(data.read())
        records = index["records"] if index["format"] == _FORMAT else None
    except (ValueError, KeyError, TypeError):
        records = None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UsageError(
            f"{source}: {MOULDS_FILE} is not of the format {_FORMAT}; export it with this version of fluxkiln"
        )
    for record in records:
        if record.get("stage") not in _stages():
            raise IntegrityError(
                f"{source}: {MOULDS_FILE} has a record of stage {record.get('stage')!r}; fetch it again"
            )
    return records


def _stages() -> set[str]:
    return {stage for toolchain in all_toolchains().values() for stage in toolchain.travelling}


def _travels(record: Mapping[str, Any], chip: str | None) -> bool:
    """Whether a record goes along with moulds; one that names a chip only with those of this chip."""
    refused = record["stage"] == "mould" and _mapping(record["facts"]).get("why")
    if refused or record["stage"] not in _stages():
        return False
    return chip is None or _mapping(record["settings"]).get("chip", chip) == chip


def _blobs(record: Mapping[str, Any]) -> Iterator[Blob]:
    for entry in _mapping(record.get("outputs", {})).values():
        yield Blob(str(_mapping(entry)["digest"]), int(_mapping(entry)["size"]))


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise IntegrityError(f"a record holds a {type(value).__name__} where an object belongs; make its action again")
    return value
