"""Manifests that say something else and are whole in themselves: what somebody writes who knows the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.intact import encode_record
from fluxkiln.digests import seal


def forge(bundle: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Apply `change` to the manifest of a bundle, and give it and the record of the build their new digests."""
    path = bundle / "manifest.json"
    document = json.loads(path.read_bytes())
    change(document)
    sealed = seal(document)
    path.unlink()
    path.write_text(json.dumps(sealed))
    record = bundle / "build.json"
    if record.is_file():
        record.write_bytes(encode_record(json.loads(record.read_bytes()), [str(sealed["digest"])]))
    return bundle
