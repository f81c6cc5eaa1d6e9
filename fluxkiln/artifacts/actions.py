"""The action cache: what was built from what. It decides what is skipped; that a path exists never does.

One JSON file per action, `actions/<hex of the key>.json`, written by rename after its blobs are on disk: a killed
process leaves the whole record or none, two processes cannot corrupt each other's, and `grep` finds everything.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fluxkiln.artifacts.store import Blob, Store, read_blob
from fluxkiln.digests import DIGEST, Json, digest_json, plain_json
from fluxkiln.documents import read_object
from fluxkiln.errors import FluxkilnError, IntegrityError
from fluxkiln.files import disk_full_named, waiting_lock

ACTION_SCHEMA = "fluxkiln.action/1"
# Somebody may be about to record or tag a blob that was just written.
KEEP_SECONDS = 3600.0
_INGREDIENTS = ("stage", "what", "code_version", "inputs", "settings", "tools")

Producer = Callable[[Path], tuple[Mapping[str, Path | Blob], Mapping[str, Json]]]


@dataclass(frozen=True, slots=True)
class Action:
    """One step of a build and everything its result depends on.

    Args:
        stage: `template`, `mould` or `cast`, say. what: for people ("double.03 W4BF16"); not part of the key.
        code_version: `fluxkiln.artifacts.code.code_version` of the function that runs it.
        inputs: name -> digest of what it reads.
        settings: normalised flags: defaults filled in, no paths, nothing that does not change the result.
        tools: name -> version of what it calls.
    """

    stage: str
    what: str
    code_version: str
    inputs: Mapping[str, str]
    settings: Mapping[str, Json] = field(default_factory=dict)
    tools: Mapping[str, str] = field(default_factory=dict)

    def ingredients(self) -> dict[str, Json]:
        """What the key is made of."""
        names = (name for name in _INGREDIENTS if name != "what")
        return {"schema": ACTION_SCHEMA, **{name: getattr(self, name) for name in names}}

    @property
    def key(self) -> str:
        """`sha256:<hex>` over the ingredients."""
        return digest_json(self.ingredients())


@dataclass(frozen=True, slots=True)
class ActionResult:
    """Named blobs and a few facts; `hit` says that nothing had to run for them."""

    key: str
    outputs: Mapping[str, Blob]
    facts: Mapping[str, Json]
    hit: bool


@dataclass(slots=True)
class ActionCache:
    """Records of actions in a store, and counts of how many were found and how many had to run."""

    store: Store
    counts: dict[str, list[int]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def lookup(self, key: str) -> ActionResult | None:
        """The recorded result, or None: no record, a damaged one, or a blob of it is missing or has another size."""
        try:
            data = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        try:
            outputs, facts = _parse_record(read_object(data, f"action {key}"), key)
            complete = all(self.store.has(blob) for blob in outputs.values())
        except IntegrityError:
            return None
        return ActionResult(key, outputs, facts, hit=True) if complete else None

    def record(self, action: Action, outputs: Mapping[str, Blob], facts: Mapping[str, Json]) -> ActionResult:
        """Record the result of `action`; its blobs are in the store already. IntegrityError: one of them is not."""
        for name, blob in outputs.items():
            if not self.store.has(blob):
                raise IntegrityError(f"{action.what}: output {name} ({blob.digest}) is not in the store; add it first")
        key = action.key
        record: dict[str, Json] = {
            **action.ingredients(),
            "key": key,
            "what": action.what,
            "outputs": {name: asdict(blob) for name, blob in outputs.items()},
            "facts": plain_json(facts),
        }
        self.store.prepare()
        self.store.write_record(f"actions/{self._path(key).name}", record)
        # As a later lookup will read it: lists where the producer had tuples.
        return ActionResult(key, dict(outputs), {name: plain_json(fact) for name, fact in facts.items()}, hit=False)

    def adopt(self, record: Mapping[str, Json]) -> ActionResult:
        """Take over a record of another store whose blobs are in this one; errors as `check`."""
        return self.record(*self.check(record))

    def check(self, record: Mapping[str, Json]) -> tuple[Action, dict[str, Blob], Mapping[str, Json]]:
        """The action of a record of another store, its blobs and facts.

        Raises IntegrityError: its key is not that of its ingredients, or a blob is missing.
        """
        try:
            action = Action(*(record[name] for name in _INGREDIENTS))  # type: ignore[arg-type]
            key = action.key
        except (KeyError, TypeError, ValueError) as error:
            raise IntegrityError(f"a record has no {error}, every action has; fetch or make it again") from error
        if record.get("key") != key:
            raise IntegrityError(f"the record of {action.what} has the key {record.get('key')}, its ingredients have "
                                 f"{key}; fetch or make it again")  # fmt: skip
        outputs, facts = _parse_record(record, key)
        if missing := [blob.digest for blob in outputs.values() if not self.store.has(blob)]:
            raise IntegrityError(f"the record of {action.what} names {missing[0]}, which is not in the store")
        return action, outputs, facts

    def forget(self, key: str) -> None:
        """Drop a record, so that its action runs again; its blobs stay."""
        self._path(key).unlink(missing_ok=True)

    def records(self) -> Iterator[Mapping[str, Json]]:
        """All readable records: ingredients, `what`, `outputs`, `facts`."""
        folder = self.store.root / "actions"
        for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            try:
                record = read_object(path.read_bytes(), str(path))
                _parse_record(record, "sha256:" + path.stem)
            except (IntegrityError, FileNotFoundError):
                continue
            yield record

    def reachable(self) -> frozenset[str]:
        """Digests that a record or a tag needs: what a garbage collection must keep."""
        keep = set(self.store.reachable())
        for record in self.records():
            outputs, _ = _parse_record(record, str(record["key"]))
            keep.update(blob.digest for blob in outputs.values())
        return frozenset(keep)

    def count(self, stage: str, hit: bool) -> None:
        """Add one to the hits or the misses of `stage`."""
        with self._lock:
            self.counts.setdefault(stage, [0, 0])[0 if hit else 1] += 1

    def path(self, blob: Blob) -> Path:
        """Where a blob lies in the store."""
        return self.store.path(blob.digest)

    @property
    def hits(self) -> int:
        return sum(hits for hits, _ in self.counts.values())

    @property
    def misses(self) -> int:
        return sum(misses for _, misses in self.counts.values())

    def summary(self) -> dict[str, Json]:
        """Hits and misses, in all and per stage, for `--json`: no misses of `mould` means that no compiler ran."""
        stages: dict[str, Json] = {s: {"hits": h, "misses": m} for s, (h, m) in sorted(self.counts.items())}
        return {"hits": self.hits, "misses": self.misses, "stages": stages}

    def _path(self, key: str) -> Path:
        return self.store.root / "actions" / (self.store.path(key).name + ".json")


def run_action(cache: ActionCache, action: Action, producer: Producer) -> ActionResult:
    """The result of `action`: from the cache, or by running `producer` once, whatever else asks for it meanwhile.

    Args:
        producer: works in the empty folder it is given and returns name -> file and facts. Files in that folder are
            moved into the store, others copied; a blob is in the store already. The folder is removed afterwards: logs
            that must outlive a failure belong elsewhere.

    Raises:
        ResourceError: the disk is full.
        FluxkilnError: the producer names a file that it did not write; or what the producer raises. Nothing is
            recorded then.
    """
    key = action.key
    result = cache.lookup(key)
    if result is None:
        cache.store.prepare()
        lock = cache.store.root / "locks" / f"{key.removeprefix('sha256:')}.lock"
        with disk_full_named(cache.store.root), waiting_lock(lock):
            # Another process may have finished it while this one waited.
            result = cache.lookup(key) or _produce(cache, action, producer)
    cache.count(action.stage, result.hit)
    return result


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed, or would; `young` blobs were unreachable but too new."""

    removed: tuple[Blob, ...]
    young: tuple[Blob, ...]
    kept: int

    @property
    def size(self) -> int:
        return sum(blob.size for blob in self.removed)


def collect_garbage(
    store: Store, *, results: bool = False, keep_seconds: float = KEEP_SECONDS, dry_run: bool = False
) -> Collected:
    """Remove blobs that no tag and no record reaches. When in doubt, everything stays.

    Args:
        results: forget recorded results of builds first, so that only what a tag reaches is kept; builds of what is
            not tagged start anew.
        keep_seconds: unreachable blobs younger than this stay. dry_run: remove nothing.

    Raises:
        IntegrityError: the index, or a manifest that it names, is missing or damaged: nothing is removed then, since
            nobody can tell what it reaches.
    """
    with store.index_locked():
        if not (store.root / "index.json").is_file():
            raise IntegrityError(f"{store.root} has no index.json, so nobody can tell what its tags reach; restore it")
        cache = ActionCache(store)
        kept = store.reachable() if results else cache.reachable()
        forgotten = [str(record["key"]) for record in cache.records()] if results else []
        blobs = list(store.digests())
        unused = [blob for blob in blobs if blob.digest not in kept]
        newest = time.time() - keep_seconds
        young = [blob for blob in unused if cache.path(blob).stat().st_mtime > newest]
        removed = [blob for blob in unused if blob not in young]
        if not dry_run:
            for key in forgotten:
                cache.forget(key)
            for blob in removed:
                cache.path(blob).unlink(missing_ok=True)
            store.clean()
    return Collected(tuple(removed), tuple(young), len(blobs) - len(removed))


def _produce(cache: ActionCache, action: Action, producer: Producer) -> ActionResult:
    with cache.store.workdir(action.what) as workdir:
        files, facts = producer(workdir)
        outputs = {}
        for name, path in files.items():
            if isinstance(path, Path) and not path.is_file():
                raise FluxkilnError(
                    f"{action.what}: the {action.stage} stage names {path.name} as its output {name} but wrote no such "
                    "file; see its log"
                )
            own = isinstance(path, Path) and path.resolve().is_relative_to(workdir.resolve())
            outputs[name] = path if isinstance(path, Blob) else cache.store.add_file(path, move=own)
        return cache.record(action, outputs, facts)


def _parse_record(record: Mapping[str, Json], key: str) -> tuple[dict[str, Blob], Mapping[str, Json]]:
    outputs, facts = record.get("outputs"), record.get("facts")
    if record.get("key") != key or not isinstance(outputs, dict) or not isinstance(facts, dict):
        raise IntegrityError(f"action {key} is damaged: its record does not have that key, outputs and facts")
    blobs = {}
    for name, entry in outputs.items():
        if (blob := read_blob(entry)) is None or not DIGEST.fullmatch(blob.digest):
            raise IntegrityError(f"action {key} is damaged: output {name} has no digest and size")
        blobs[name] = blob
    return blobs, facts
