"""What blocks lose in each scheme: measured on a checkpoint and kept in the store, or as measured once and shipped.

`block_errors.json`: `command` that wrote it, its `conditions` and the `model`; `errors`: scheme -> kind of block -> the
relative L2 of what a block adds, at the rung `dequantized`, on inputs that were not calibrated on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action
from fluxkiln.artifacts.code import code_version
from fluxkiln.build.prepared import Prepared
from fluxkiln.build.verification import record
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.rungs import dequantized_rung, onnxruntime_rung
from fluxkiln.compile.weights import check_methods, component_digest, used_calibrations
from fluxkiln.errors import SchemeError
from fluxkiln.progress import Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Part, PartRunner

if TYPE_CHECKING:
    from fluxkiln.verify.reference import Recording

ERRORS = Path(__file__).with_name("block_errors.json")


def step_blocks(plan: Plan) -> list[Part]:
    """The blocks that run in every step, each once whatever its sizes."""
    parts = plan.at(plan.shapes).parts
    return [part for part in parts if part.traits.is_block and part.traits.each_step]


def known_errors(prepared: Prepared, schemes: Iterable[Scheme]) -> tuple[dict[tuple[str, Scheme], float], str]:
    """Block and scheme -> its error, infinite where none is known or the block cannot have it; and where all of them
    come from."""
    blocks = step_blocks(prepared.plan)
    wanted = [(part, scheme) for part in blocks for scheme in schemes]
    if prepared.checkpoint.digests:
        results = [prepared.cache.lookup(_action(prepared, part, scheme).key) for part, scheme in wanted]
        if all(results):
            measured = [result.facts["error"] for result in results if result]
            errors = [math.inf if error is None else float(str(error)) for error in measured]
            found = {(part.name, scheme): error for (part, scheme), error in zip(wanted, errors, strict=True)}
            return found, "measured on this checkpoint"
    table = shipped()
    errors_of: Mapping[str, Mapping[str, float]] = table["errors"]
    return {
        (part.name, scheme): errors_of.get(scheme.name, {}).get(part.traits.block, math.inf) for part, scheme in wanted
    }, f"measured on {table['model']}; --measure finds this checkpoint's own"


@cache
def shipped() -> Mapping[str, Any]:
    """The table."""
    found: Mapping[str, Any] = json.loads(ERRORS.read_bytes())
    return found


def measure_errors(prepared: Prepared, schemes: Sequence[Scheme], progress: Progress) -> None:
    """Run every block in each scheme on the inputs that builds are verified with; the store keeps what it loses.

    A block that cannot have a scheme, whose products are too large say, is noted.

    Raises:
        SchemeError: a scheme needs a calibration, and the store has none.
    """
    plan, cache = prepared.plan, prepared.cache
    blocks = step_blocks(plan)
    missing = {
        part: [one for one in schemes if cache.lookup(_action(prepared, part, one).key) is None] for part in blocks
    }
    if not any(missing.values()):
        return
    for scheme in schemes:
        every = dict.fromkeys((part.name for part in blocks), scheme)
        check_methods(prepared.checkpoint, replace(plan, parts=tuple(blocks), exceptions=every), cache)
    recording = record(prepared)
    plan = replace(plan, shapes=recording.shapes)
    progress.stage("blocks", len(blocks))
    for part in blocks:
        if missing[part]:
            exact = added(recording, part, onnxruntime_rung(prepared.checkpoint, plan, cache, threads=0))
        for scheme in missing[part]:
            mixed, error = replace(plan, exceptions={**plan.exceptions, part.name: scheme}), None
            try:
                stored = added(recording, part, dequantized_rung(prepared.checkpoint, mixed, cache))
                error = relative_error(exact, stored)
            except SchemeError as refused:
                progress.note(f"{part.name}: {refused}")
            cache.record(_action(prepared, part, scheme), {}, {"error": error})
        progress.done("blocks", part.name, f"{len(missing[part])} schemes")


def added(recording: Recording, part: Part, run: PartRunner) -> list[Any]:
    """What is added to every residual stream at every step, [1, L, D]."""
    found, residual = [], dict(part.traits.residual)
    for step in range(len(recording.calls[part.name])):
        inputs = recording.inputs(part.name, step)
        made = run(part.name, inputs)
        found += [made[name] - inputs[stream] for name, stream in residual.items()]
    return found


def relative_error(exact: Sequence[Any], stored: Sequence[Any]) -> float:
    """Relative L2 of what is added, root mean square over all of it."""
    import numpy as np

    squares = [np.square(two - one).sum() / np.square(one).sum() for one, two in zip(exact, stored, strict=True)]
    return float(np.sqrt(np.mean(squares)))


def _action(prepared: Prepared, part: Part, scheme: Scheme) -> Action:
    """The key of an error: the weights of the part's component, their calibration where it is used, the scheme."""
    checkpoint, plan = prepared.checkpoint, prepared.plan
    mixed = replace(plan, parts=(part,), exceptions={part.name: scheme})
    return Action(
        stage="error",
        what=f"{part.name} {scheme.name}",
        code_version=code_version(measure_errors, model=type(checkpoint.model)),
        inputs={
            "weights": component_digest(checkpoint.digests, part.folder),
            **used_calibrations(checkpoint, mixed, prepared.cache),
        },
        settings={"part": part.name, "scheme": scheme.name},
    )
