"""Moulds beyond a build: made from configs alone, listed, and carried from one store to another in a file.

The file is a plain tar: `moulds.json`, the records of the actions that made the moulds (templates, moulds, proofs and
combined shells), `moulds.sig` where it was signed, then `blobs/sha256/<hex>` for every blob that they name. A record's
key is made of everything its result depends on, the code's version included, so it is found again only where it is
true. Whether it *is* the result nobody can tell who did not make it: without a signature by a key that the importer
trusts, what a proof vouches for is taken over alone, and that proof is made here, when a mould is first used.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from fluxkiln import __version__
from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.registry.papers import sign, verify_signature
from fluxkiln.artifacts.store import Blob, Store, read_blob
from fluxkiln.build.make import outline
from fluxkiln.compile.toolchain import all_toolchains, toolchain_of
from fluxkiln.digests import DIGEST, canonical_json, digest_bytes
from fluxkiln.documents import DocumentLimits, read_object
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import disk_full_named, open_regular, partial_file, rename_durably
from fluxkiln.progress import Progress, Silent
from fluxkiln.settings import Settings

MOULDS_FILE, SIGNATURE_FILE, _FORMAT = "moulds.json", "moulds.sig", "fluxkiln.moulds/1"
INDEX_LIMITS = DocumentLimits(nbytes=64 << 20)
_FETCH = "fetch it again"
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
    entries = [_entry(record) for record in ActionCache(store).records() if record["stage"] == "mould"]
    return sorted(entries, key=lambda entry: (entry.chip, entry.what, entry.scheme, entry.key))


def _entry(record: Mapping[str, Any]) -> MouldEntry:
    """What a record says of a mould; IntegrityError where it says no such thing."""
    facts, settings = record["facts"], record["settings"]
    try:
        return MouldEntry(
            key=str(record["key"]),
            what=str(record["what"]),
            chip=str(settings.get("chip", "")),
            scheme=str(settings.get("scheme", "")),
            inputs={str(name): [int(side) for side in shape] for name, _, shape in facts.get("inputs", [])},
            size=sum(blob.size for blob in _blobs(record)),
            weight_bytes=int(facts.get("weight_bytes", 0)),
            why=str(facts.get("why", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise IntegrityError(f"the record of a mould is not in its form ({error}); make it again") from error


def export_moulds(
    store: Store, target: Path, chip: str | None = None, sign_key: Path | None = None
) -> list[MouldEntry]:
    """Write every castable mould of a store, or of a chip, its template, proof and combined shells to one file.

    Args:
        sign_key: private key in PEM.

    UsageError: there is none. IntegrityError: a blob is damaged; nothing is written.
    """
    moulds = [entry for entry in list_moulds(store) if not entry.why and chip in (None, entry.chip)]
    if not moulds:
        raise UsageError(f"{store.root} has no moulds{f' for {chip}' if chip else ''}; fluxkiln mould build makes some")
    records = [record for record in ActionCache(store).records() if _travels(record, chip)]
    blobs = {blob.digest: blob for record in records for blob in _blobs(record)}
    index: dict[str, Any] = {"format": _FORMAT, "fluxkiln": __version__, "records": records}
    data = canonical_json(index)
    signature = sign({MOULDS_FILE: digest_bytes(data)}, sign_key) if sign_key else b""
    target.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_named(target.parent), partial_file(target.parent, f".{target.name}") as (partial, file):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive:
            archive.addfile(_member(MOULDS_FILE, len(data)), io.BytesIO(data))
            if signature:
                archive.addfile(_member(SIGNATURE_FILE, len(signature)), io.BytesIO(signature))
            for digest in sorted(blobs):
                store.verify(digest)
                name = f"blobs/sha256/{digest.removeprefix('sha256:')}"
                with store.open(digest) as source:
                    archive.addfile(_member(name, blobs[digest].size), source)
        rename_durably(file, partial, target)
    return moulds


def import_moulds(store: Store, source: Path, verify_key: Path | None = None) -> list[MouldEntry]:
    """Take over the moulds of a file that `export_moulds` wrote: all that it offers, or nothing.

    Every blob's digest is checked, and what records say of blobs is compared with them. None is run. A result that the
    store has already stays as it is.

    Args:
        verify_key: public key in PEM that the file must be signed with. Without it no template, proof or combined shell
            is taken over: they are made again, and so is the proof of a mould when it is first used.

    Raises:
        UsageError: no such file, or something else. IntegrityError: a record or a blob is not what it should be, or the
        signature does not hold; nothing is taken over.
    """
    try:
        with open_regular(source) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            members = iter(archive)
            data = _read_member(archive, next(members, None), MOULDS_FILE, source)
            records = _parse_index(data, source)
            wanted = {blob.digest: blob for record in records for blob in _blobs(record)}
            following = next(members, None)
            if following is not None and following.name == SIGNATURE_FILE:
                signature = _read_member(archive, following, SIGNATURE_FILE, source)
                following = next(members, None)
            else:
                signature = b""
            if verify_key:
                _check_signature(data, signature, verify_key, source)
            while following is not None:
                match = _BLOB.fullmatch(following.name)
                blob = wanted.pop(f"sha256:{match[1]}", None) if match else None
                if blob is None or not _is_plain(following) or following.size != blob.size:
                    raise IntegrityError(
                        f"{source} holds {following.name!r}, which its {MOULDS_FILE} does not name so; {_FETCH}"
                    )
                _take(store, blob, archive.extractfile(following), source)
                following = next(members, None)
    except (OSError, tarfile.TarError, ValueError, ArithmeticError, EOFError) as error:  # tarfile lets some through
        raise UsageError(
            f"{source} is no file of moulds ({error}); give one that fluxkiln mould export wrote"
        ) from error
    missing = [digest for digest, blob in wanted.items() if not store.has(blob)]
    if missing:
        raise IntegrityError(f"{source} ends before {missing[0]}, which its {MOULDS_FILE} names; {_FETCH}")
    cache = ActionCache(store)
    taken = [record for record in records if verify_key or record["stage"] in _stages("proven")]
    # Nothing is recorded before everything was looked at.
    for record in records:
        _check_record(cache, record, source)
    for record in taken:
        if cache.lookup(str(record["key"])) is None:
            cache.adopt(record)
    return sorted(
        (_entry(record) for record in taken if record["stage"] == "mould"), key=lambda entry: (entry.chip, entry.what)
    )


def _check_record(cache: ActionCache, record: Mapping[str, Any], source: Path) -> None:
    """Raise IntegrityError unless a record has the key of its ingredients, and its facts are true of its blobs."""
    try:
        cache.check(record)
        if record["stage"] == "mould":
            _entry(record)
        for toolchain in all_toolchains().values():
            if record["stage"] in toolchain.travelling:
                outputs = {name: cache.path(blob) for name, blob in zip(record["outputs"], _blobs(record), strict=True)}
                toolchain.check_record(record, outputs)
    except IntegrityError as error:
        raise IntegrityError(f"{source}: {error}. Nothing of it was taken over: {_FETCH}") from error


def _check_signature(data: bytes, signature: bytes, key: Path, source: Path) -> None:
    if not signature:
        raise IntegrityError(
            f"{source} is not signed, and --verify asks for a signature by {key}; have it exported with --sign, or "
            "leave --verify out: what it holds is proven anew then"
        )
    verify_signature({MOULDS_FILE: digest_bytes(data)}, signature, key)


def _take(store: Store, blob: Blob, data: Any, source: Path) -> None:
    with store.workdir("import") as folder, disk_full_named(store.root, blob.size):
        copy = folder / "blob"
        with copy.open("wb") as file:
            while block := data.read(1 << 20):
                file.write(block)
        found = store.add_file(copy, move=True)
    if found != blob:
        raise IntegrityError(f"{source}: a blob has {found.digest}, its name says {blob.digest}; {_FETCH}")


def _is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member has as many bytes in the file as it says; of a sparse one a few could stand for gigabytes."""
    return member.isreg() and not member.issparse()


def _read_member(archive: tarfile.TarFile, member: tarfile.TarInfo | None, name: str, source: Path) -> bytes:
    if member is None or member.name != name or not _is_plain(member) or member.size > INDEX_LIMITS.nbytes:
        raise UsageError(f"{source} does not begin with {name}; give a file that fluxkiln mould export wrote")
    data = archive.extractfile(member)
    return data.read() if data else b""


def _parse_index(data: bytes, source: Path) -> list[Mapping[str, Any]]:
    where = f"{source}: {MOULDS_FILE}"
    index = read_object(data, where, error=UsageError, remedy="export it again", limits=INDEX_LIMITS)
    records = index.get("records") if index.get("format") == _FORMAT else None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise UsageError(f"{where} is not of the format {_FORMAT}; export it with this version of fluxkiln")
    for record in records:
        if record.get("stage") not in _stages("travelling"):
            raise IntegrityError(f"{where} has a record of stage {record.get('stage')!r}; {_FETCH}")
    return records


def _stages(which: Literal["travelling", "proven"]) -> set[str]:
    return {stage for toolchain in all_toolchains().values() for stage in getattr(toolchain, which)}


def _travels(record: Mapping[str, Any], chip: str | None) -> bool:
    """Whether a record goes along with moulds; one that names a chip only with those of this chip."""
    refused = record["stage"] == "mould" and _mapping(record["facts"]).get("why")
    if refused or record["stage"] not in _stages("travelling"):
        return False
    return chip is None or _mapping(record["settings"]).get("chip", chip) == chip


def _blobs(record: Mapping[str, Any]) -> Iterator[Blob]:
    for entry in _mapping(record.get("outputs", {})).values():
        blob = read_blob(entry)
        if blob is None or not DIGEST.fullmatch(blob.digest) or blob.size < 0:
            raise IntegrityError("a record has an output without digest and size; make its action again")
        yield blob


def _member(name: str, size: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o444
    return member


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise IntegrityError(f"a record holds a {type(value).__name__} where an object belongs; make its action again")
    return value
