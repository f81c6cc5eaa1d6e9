"""A recording that travels with a bundle: what chosen parts were given, what diffusers made of it, and what the highest
rung did that verification ran. With it a part is replayed wherever the bundle runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.files import write_durably
from fluxkiln.types import Part
from fluxkiln.verify.reference import INDEX, Recording, store_array

# of a bundle
CARRIED = "recording"
EVERY = "all"


def carried_parts(parts: Sequence[Part], names: Sequence[str]) -> tuple[Part, ...]:
    """The parts that names of parts, kinds or components mean, `all` for every one; UsageError for one that none is."""
    for name in names:
        if name != EVERY and not any(name in (part.name, part.kind, part.component) for part in parts):
            kinds = dict.fromkeys(part.kind for part in parts)
            raise UsageError(
                f"--with-recording {name}: no part is called so, and no kind; give {EVERY}, parts by their names, or "
                f"{', '.join(kinds)}"
            )
    return tuple(part for part in parts if {EVERY, part.name, part.kind, part.component} & {*names})


class Carried:
    """Collects calls of chosen parts while a ladder compares them. `folder` takes what the rung made."""

    def __init__(self, parts: Sequence[Part], folder: Path) -> None:
        self._names, self._folder = {part.name for part in parts}, folder
        self._calls: dict[str, list[dict[str, Any]]] = {}
        self._files: dict[str, Path] = {}
        self._below: dict[str, str] = {}
        self._recording: Recording | None = None

    def take(self, recording: Recording, part: Part, step: int, made: Mapping[str, Mapping[str, Any]]) -> None:
        """One call of a part, and rung -> outputs, bottom to top."""
        if part.name not in self._names:
            return
        *_, (rung, outputs) = made.items()
        call = recording.calls[part.name][step]
        (self._folder / "tensors").mkdir(parents=True, exist_ok=True)
        below = {name: store_array(self._folder, outputs[name].reshape(array.shape)) for name, array in
                 recording.outputs(part.name, step).items()}  # fmt: skip
        self._calls.setdefault(part.name, []).append({**call, "below": below})
        self._files |= {file: recording.root / file for side in call.values() for file in side.values()}
        self._files |= {file: self._folder / file for file in below.values()}
        self._below[part.name], self._recording = rung, recording

    @property
    def nbytes(self) -> int:
        """Of all arrays, each once."""
        return sum(path.stat().st_size for path in self._files.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The parts of which there is a call."""
        return tuple(self._calls)

    def finish(self, fingerprint: str, estimates: Mapping[str, float]) -> dict[str, Path]:
        """The files by their path in the bundle; none where no chosen part was compared."""
        recording = self._recording
        if recording is None:
            return {}
        plain = asdict(recording)
        kept = ("steps", "seed", "prompt", "guidance_scale", "shapes")
        index = {
            "format": 1,
            **{name: plain[name] for name in kept},
            "seconds": {},
            "kinds": {name: recording.kinds[name] for name in self._calls},
            "calls": self._calls,
            "rendered": {},
            "below": self._below,
            "estimates": {name: estimates[name] for name in self._calls if name in estimates},
            "fingerprint": fingerprint,
        }
        write_durably(self._folder / INDEX, json.dumps(index, indent=1, sort_keys=True).encode() + b"\n")
        files = {INDEX: self._folder / INDEX, **self._files}
        return {f"{CARRIED}/{name}": path for name, path in files.items()}
