"""What the hoisted form of the transformer asks of verification: rows filled up, and one recording for both forms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from fluxkiln.components import MODULATION_ROWS, Part, find_kind, list_parts, modulation_name
from fluxkiln.errors import UsageError
from fluxkiln.types import PartRunner

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.reference import Files, Recording


def run_rows(run_part: PartRunner, part: Part, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run `part`; where its kind takes rows, with any number of them from 1 to MODULATION_ROWS.

    The part gets all the rows it was made for, the last one repeated, and the answer is cut back to those that were
    asked for. Other kinds are run as they are.

    Raises:
        UsageError: too many rows, or not equally many in all inputs. Whatever `run_part` raises.
    """
    filled, rows = fill_rows(part, inputs)
    if not rows:
        return run_part(part.name, inputs)
    return {name: output[:rows] for name, output in run_part(part.name, filled).items()}


def fill_rows(part: Part, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], int]:
    """Inputs with all the rows that `part` was made for, and how many were given; 0 where its kind takes no rows.

    Raises:
        UsageError: too many rows, or not equally many in all inputs.
    """
    import numpy as np

    names = [name for name in find_kind(part.kind).rows if name in inputs]
    if not names:
        return dict(inputs), 0
    given = {inputs[name].shape[0] for name in names}
    rows = given.pop()
    if given or not 1 <= rows <= MODULATION_ROWS:
        shown = ", ".join(f"{name} {inputs[name].shape[0]}" for name in names)
        raise UsageError(f"part {part.name} was given rows: {shown}; it takes 1 to {MODULATION_ROWS} of each")
    spread = np.minimum(np.arange(MODULATION_ROWS), rows - 1)
    return {name: array[spread] if name in names else array for name, array in inputs.items()}, rows


def recorded_parts(configs: Mapping[str, Mapping[str, Any]], vae: Literal["kl", "tiny"] = "kl") -> tuple[Part, ...]:
    """The parts to record so that one run of the reference serves both forms (see `view_recording`).

    Those of the inline form, and of the hoisted form those that have names of their own.
    """
    inline = list_parts(configs, vae)
    names = {part.name for part in inline}
    return (*inline, *(part for part in list_parts(configs, vae, "hoisted") if part.name not in names))


def view_recording(recording: Recording, parts: tuple[Part, ...]) -> Recording:
    """A recording of `recorded_parts` as if only `parts`, one form or some of it, had been recorded.

    A block or tail that takes its modulation as an input finds it among the recorded outputs. No array is read.

    Raises:
        UsageError: a part was not recorded, or not in a form it can be made of.
    """
    return replace(
        recording,
        kinds={part.name: part.kind for part in parts},
        calls={part.name: _calls(recording, part) for part in parts},
    )


def _calls(recording: Recording, part: Part) -> tuple[Files, ...]:
    found = recording.kinds.get(part.name)
    if found == part.kind:
        return recording.calls[part.name]
    source = modulation_name(part)
    if part.kind != f"{found}_modulated" or source not in recording.calls:
        raise UsageError(
            f"part {part.name} of kind {part.kind} was not recorded (recorded as {found or 'nothing'}); record the "
            "reference again"
        )
    calls = []
    for call, modulation in zip(recording.calls[part.name], recording.calls[source], strict=True):
        known = {**call["inputs"], **modulation["outputs"]}
        calls.append({**call, "inputs": {name: known[name] for name in find_kind(part.kind).inputs}})
    return tuple(calls)
