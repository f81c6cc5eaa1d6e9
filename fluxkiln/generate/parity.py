"""The recording that came with a bundle, replayed by an executor: the rung `device` of the parity ladder.

Parts are given what they were given in the reference run, so that errors do not add up. What they make is compared with
diffusers' outputs, and with those of the highest rung that the build ran.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.patches.pipeline import run_rows
from fluxkiln.progress import Progress, Silent
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Part
from fluxkiln.verify.carried import CARRIED
from fluxkiln.verify.gates import DEVICE
from fluxkiln.verify.ladder import Ladder, compare_outputs
from fluxkiln.verify.reference import INDEX, Recording, read_recording


@dataclass(frozen=True, slots=True)
class Replayed:
    """A ladder with the rows of every part that was replayed, and part -> milliseconds of its fastest run."""

    ladder: Ladder
    recording: Recording
    milliseconds: dict[str, float]


def open_carried(bundle: Bundle) -> Recording:
    """The recording of a bundle.

    Raises:
        UsageError: it has none. IntegrityError: it is damaged, or of another bundle.
    """
    folder = bundle.folder / CARRIED
    if not (folder / INDEX).is_file():
        raise UsageError(
            f"{bundle.folder} has no recording; build it again with --with-recording all, or with the names of parts"
        )
    recording = read_recording(folder)
    strangers = recording.calls.keys() - {part.name for part in bundle.parts}
    made_of = bundle.manifest.checkpoint.fingerprint.removeprefix("sha256:")
    if strangers or recording.shapes != bundle.manifest.shapes or recording.fingerprint != made_of:
        raise IntegrityError(f"{folder} is the recording of another bundle; build or fetch the bundle again")
    return recording


def choose_replayed(bundle: Bundle, recording: Recording, names: Sequence[str]) -> tuple[Part, ...]:
    """The parts of a recording in the order they run, those that `names` has if any; UsageError for one without."""
    for name in names:
        if name not in recording.calls:
            raise UsageError(f"--parts {name}: the recording has none of it; it has {', '.join(recording.calls)}")
    return tuple(part for part in bundle.parts if part.name in (names or recording.calls))


def replay_bundle(
    bundle: Bundle, executor: Executor, names: Sequence[str] = (), progress: Progress | None = None
) -> Replayed:
    """Run the recorded calls of parts and compare; what is missed is for `Ladder.raise_if_failed`.

    Raises: as `open_carried`, `choose_replayed` and the executor's call.
    """
    progress, toolchain, recording = progress or Silent(), toolchain_of(bundle.target), open_carried(bundle)
    ladder = Ladder((*toolchain.rungs, DEVICE), toolchain.gates)
    parts = choose_replayed(bundle, recording, names)
    schemes = {entry.name: parse_scheme(entry.scheme) for entry in bundle.manifest.parts}
    constants, nets = bundle.constants, bundle.nets
    progress.stage("parity", len(parts))
    spent: dict[str, float] = {}
    for part in parts:
        for step in range(len(recording.calls[part.name])):
            # some nets take what the host computes as well
            known = {**constants, **recording.inputs(part.name, step)}
            inputs = {spec.name: known[spec.name] for spec in nets[part.name].inputs if spec.name in known}
            # the first run loads the part
            for _ in range(2 if step == 0 else 1):
                started = time.perf_counter()
                outputs = run_rows(executor, part, inputs)
                took = 1000 * (time.perf_counter() - started)
                spent[part.name] = min(took, spent.get(part.name, took))
            made = {recording.below[part.name]: recording.made_below(part.name, step), DEVICE.name: outputs}
            compare_outputs(ladder, recording, part, schemes[part.name], step, made)
        # the rung below was judged by the build, which had the one below that
        ladder.rows = [row for row in ladder.rows if row.at == DEVICE]
        executor.drop(part.name)
        progress.done("parity", part.name, f"{spent[part.name]:.3g} ms")
    return Replayed(ladder, recording, spent)


def parity_facts(bundle: Bundle, executor: Executor, found: Replayed, memory: int) -> dict[str, Any]:
    """What `verify.report.document.build_report` takes besides the ladder. `memory`: bytes, of the process."""
    manifest, estimates = bundle.manifest, found.recording.estimates
    return {
        "title": f"{manifest.name} on {executor.name}",
        "target": manifest.target,
        "reference": "the recording that came with the bundle: diffusers as published, float32",
        "model": {"name": manifest.checkpoint.source, "fingerprint": manifest.checkpoint.fingerprint,
                  "variant": manifest.variant},
        "shapes": {**asdict(manifest.shapes), "steps": found.recording.steps},
        "schemes": {entry.name: entry.scheme for entry in manifest.parts if entry.name in found.milliseconds},
        "parts": [
            {"name": entry.name, "kind": entry.kind, "scheme": entry.scheme, "bytes": entry.size, "device_memory": 0,
             "estimate_ms": estimates.get(entry.name), "measured_ms": found.milliseconds[entry.name],
             "made": "replayed"}
            for entry in manifest.parts
            if entry.name in found.milliseconds
        ],
        "tools": dict(manifest.tools),
        "machine": {**executor.facts, "peak memory": f"{memory / 1e6:.0f} MB"},
        "provenance": {"bundle": bundle.digest, "prompt": found.recording.prompt, "seed": str(found.recording.seed)},
    }  # fmt: skip
