"""One recorded run of the reference seen as a run of any form: inline, hoisted, or cut over ranks.

What is recorded are the parts of the inline form, and of the hoisted form those that have names of their own. A block
or tail that takes its modulation as an input finds it among the recorded outputs; a split part of several blocks has
the first one's inputs and the last one's outputs. No array is read but to stack modulation.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.kinds import modulation_name
from fluxkiln.patches.model import Call, Recorded
from fluxkiln.types import Part

_MODULATED = ("double", "single", "tail")


def recorded_calls(recorded: Recorded, part: Part) -> tuple[Call, ...]:
    """The calls of a part of any form, made of those that were recorded.

    Raises:
        UsageError: it was not recorded, or not in a form that it can be made of.
    """
    return _split_calls(recorded, part) if part.members else _whole_calls(recorded, part)


def _whole_calls(recorded: Recorded, part: Part) -> tuple[Call, ...]:
    found = recorded.kinds.get(part.name)
    if found == part.kind:
        return recorded.calls[part.name]
    source = modulation_name(part)
    if part.kind != f"{found}_modulated" or source not in recorded.calls:
        raise UsageError(
            f"part {part.name} of kind {part.kind} was not recorded (recorded as {found or 'nothing'}); record the "
            "reference again"
        )
    calls = []
    for call, modulation in zip(recorded.calls[part.name], recorded.calls[source], strict=True):
        known = {**call["inputs"], **modulation["outputs"]}
        calls.append({**call, "inputs": {name: known[name] for name in part.traits.inputs}})
    return tuple(calls)


def _split_calls(recorded: Recorded, part: Part) -> tuple[Call, ...]:
    kind, names, calls = part.traits, _inline_names(part), []
    for name in names:
        if name not in recorded.calls:
            raise UsageError(f"part {name} was not recorded; record the reference again")
    for step in range(len(recorded.calls[names[0]])):
        first, last = recorded.calls[names[0]][step], recorded.calls[names[-1]][step]
        known, made = dict(first["inputs"]), dict(last["outputs"])
        if kind.cut == "head":
            made["modulation"] = _stack(recorded, _all_modulated(recorded), step)
        elif kind.cut == "transformer":
            known = {**recorded.calls[names[1]][step]["inputs"], **known}
        elif "modulation" in kind.inputs:
            known["modulation"] = _stack(recorded, names, step)
        calls.append(
            {
                "inputs": {name: known[name] for name in kind.inputs if name in known},
                "outputs": {name: made[name] for name in kind.outputs},
            }
        )
    return tuple(calls)


def _inline_names(part: Part) -> tuple[str, ...]:
    """The names of the first, ..., last of the parts that a whole model has in the place of a split one."""
    if part.kind == "t5":
        return "t5_embed", "t5_final"
    numbers = (prefix.split(".")[1] if kind in ("double", "single") else "" for kind, prefix in part.members)
    return tuple(
        f"{kind}.{int(number):02d}" if number else kind for (kind, _), number in zip(part.members, numbers, strict=True)
    )


def _all_modulated(recorded: Recorded) -> tuple[str, ...]:
    """Blocks and tail, in the order in which the head gives their rows."""
    return tuple(name for group in _MODULATED for name in sorted(recorded.calls) if name.partition(".")[0] == group)


def _stack(recorded: Recorded, names: Sequence[str], step: int) -> str:
    """A file with the modulation [1, rows, D] of several parts one after the other."""
    import numpy as np

    sources = []
    for name in names:
        base, dot, number = name.partition(".")
        sources.append(recorded.calls[f"{base}_modulation{dot}{number}"][step]["outputs"]["modulation"])
    if len(sources) == 1:
        return sources[0]
    label = hashlib.sha256("/".join(sources).encode()).hexdigest()
    file = f"tensors/stacked-{label}.npy"
    path: Path = recorded.root / file
    if not path.is_file():
        data: Any = io.BytesIO()
        np.save(data, np.concatenate([np.load(recorded.root / source) for source in sources], axis=1))
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_bytes(data.getvalue())
        os.replace(partial, path)
    return file
