"""Garbage collection of a store: blobs that no tag and no record reaches. When in doubt, everything stays."""

from __future__ import annotations

import time
from dataclasses import dataclass

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Blob, Store
from fluxkiln.errors import IntegrityError

# Somebody may be about to record or tag a blob that was just written.
KEEP_SECONDS = 3600.0


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
    """Remove what nothing reaches.

    Args:
        results: forget recorded results of builds first, so that only what a tag reaches is kept; builds of what is
            not tagged start anew.
        keep_seconds: unreachable blobs younger than this stay.
        dry_run: remove nothing.

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
        removed, young = [], []
        newest = time.time() - keep_seconds
        blobs = list(store.digests())
        for blob in blobs:
            if blob.digest in kept:
                continue
            if store.path(blob.digest).stat().st_mtime > newest:
                young.append(blob)
            else:
                removed.append(blob)
        if not dry_run:
            for key in forgotten:
                cache.forget(key)
            for blob in removed:
                store.path(blob.digest).unlink(missing_ok=True)
            store.clean()
    return Collected(tuple(removed), tuple(young), len(blobs) - len(removed))
