"""In which repository of a registry a blob was seen, so that another repository takes it over and nothing is sent.

Hints and no more: a registry that does not have the blob there starts an upload as if nothing had been said. They lie
in `$XDG_CACHE_HOME/fluxkiln`, which may be removed at any time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from fluxkiln.artifacts.registry.reference import is_repository
from fluxkiln.errors import ResourceError
from fluxkiln.files import write_durably

MOST_HINTS = 20_000


def read_hints(host: str) -> dict[str, str]:
    """Digest -> repository; empty where nothing is known or the file cannot be read."""
    try:
        found = json.loads(_file(host).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, Mapping):
        return {}
    return {digest: name for digest, name in found.items() if isinstance(name, str) and is_repository(name)}


def add_hints(host: str, repository: str, digests: Iterable[str]) -> None:
    """Remember that `repository` has these blobs; without a sound where nothing can be written."""
    hints = read_hints(host)
    for digest in digests:
        # Again at the end: the oldest ones are at the front, and go first.
        hints.pop(digest, None)
        hints[digest] = repository
    kept = dict(list(hints.items())[-MOST_HINTS:])
    with suppress(OSError, ResourceError):
        _file(host).parent.mkdir(parents=True, exist_ok=True)
        write_durably(_file(host), json.dumps(kept).encode())


def _file(host: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fluxkiln" / "registries" / (re.sub(r"[^A-Za-z0-9.-]", "_", host) + ".json")
