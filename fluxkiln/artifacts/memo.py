"""What was found out about a file, remembered until the file changes: a checkpoint is hashed once, not per build."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fluxkiln.artifacts.canonical import Json, digest_json
from fluxkiln.artifacts.store import Store, read_object
from fluxkiln.errors import IntegrityError

# A write that falls into the clock tick of the last one leaves the time stamp as it was.
SETTLED_NS = 2_000_000_000


def remember(store: Store, path: Path, what: str, compute: Callable[[], Mapping[str, Json]]) -> Mapping[str, Json]:
    """The facts `what` about the file `path`: as remembered while its inode, size and times are the same.

    Args:
        what: names the facts and the version of the code that finds them ("tensor digests 1").
        compute: finds them by reading the file. Facts of a file changed less than two seconds ago are not kept.
    """
    real = path.resolve()
    before = _stamp(real)
    name = f"memo/{digest_json([what, str(real)]).removeprefix('sha256:')}.json"
    try:
        record = read_object((store.root / name).read_bytes(), name)
        facts = record.get("facts")
        if record.get("stamp") == before and isinstance(facts, dict):
            return facts
    except (FileNotFoundError, IntegrityError):
        pass
    started = time.time_ns()
    found = compute()
    if before == _stamp(real) and started - max(before[2:]) > SETTLED_NS:
        store.prepare()
        (store.root / "memo").mkdir(exist_ok=True)
        record = {"what": what, "path": str(real), "stamp": list(before), "facts": found}
        store.write_record(name, record)
    return found


def _stamp(path: Path) -> list[int]:
    found = os.stat(path)
    return [found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns]
