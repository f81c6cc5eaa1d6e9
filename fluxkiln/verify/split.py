"""A recording of whole parts as one of split parts: several parts in one, all modulation from the head."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fluxkiln.components import Part, find_kind
from fluxkiln.errors import UsageError

if TYPE_CHECKING:
    from fluxkiln.verify.reference import Files, Recording

_MODULATED = ("double", "single", "tail")


def view_split(recording: Recording, members: Mapping[Part, Sequence[str]]) -> Recording:
    """A recording of `modulation.recorded_parts` as if split parts had been recorded.

    Args:
        members: part -> the names of the inline parts that it holds, in the order it runs them.

    Raises:
        UsageError: a member was not recorded.
    """
    for names in members.values():
        for name in names:
            if name not in recording.calls:
                raise UsageError(f"part {name} was not recorded; record the reference again")
    return replace(
        recording,
        kinds={part.name: part.kind for part in members},
        calls={part.name: _calls(recording, part, tuple(names)) for part, names in members.items()},
    )


def _calls(recording: Recording, part: Part, names: tuple[str, ...]) -> tuple[Files, ...]:
    kind, calls = find_kind(part.kind), []
    for step in range(len(recording.calls[names[0]])):
        first, last = recording.calls[names[0]][step], recording.calls[names[-1]][step]
        known = dict(first["inputs"])
        made = dict(last["outputs"])
        if part.kind == "modulated_head":
            made["modulation"] = _stack(recording, _all_modulated(recording), step)
        elif part.kind == "transformer":
            known = {**recording.calls[names[1]][step]["inputs"], **known}
        elif "modulation" in kind.inputs:
            known["modulation"] = _stack(recording, names, step)
        calls.append(
            {
                "inputs": {name: known[name] for name in kind.inputs if name in known},
                "outputs": {name: made[name] for name in kind.outputs},
            }
        )
    return tuple(calls)


def _all_modulated(recording: Recording) -> tuple[str, ...]:
    """Blocks and tail, in the order in which the head gives their rows."""
    return tuple(name for group in _MODULATED for name in sorted(recording.calls) if name.partition(".")[0] == group)


def _stack(recording: Recording, names: Sequence[str], step: int) -> str:
    """A file with the modulation [1, rows, D] of several parts one after the other."""
    import numpy as np

    sources = []
    for name in names:
        base, dot, number = name.partition(".")
        sources.append(recording.calls[f"{base}_modulation{dot}{number}"][step]["outputs"]["modulation"])
    if len(sources) == 1:
        return sources[0]
    label = hashlib.sha256("/".join(sources).encode()).hexdigest()
    file = f"tensors/stacked-{label}.npy"
    path = recording.root / file
    if not path.is_file():
        data: Any = io.BytesIO()
        np.save(data, np.concatenate([np.load(recording.root / source) for source in sources], axis=1))
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(data.getvalue())
        os.replace(partial, path)
    return file
