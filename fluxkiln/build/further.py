"""Verification of a build of several sizes: all of the first, and what is another at the others.

Weights are stored once, and are verified with the first size. Of a further one a part of each kind that it has for
itself is replayed, and where that is not too much the whole image is made: it runs every part, with the size's tables.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from random import Random

from fluxkiln.build.budget import LIMITS, Limits, executed_parts, filling_prompt, name_shapes, replayed_shapes
from fluxkiln.build.prepared import FEWEST_STEPS, Prepared
from fluxkiln.build.verification import Parity, record_run, replay, trace_templates, verify
from fluxkiln.compile.plan import Made
from fluxkiln.compile.rungs import stored_rung
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.patches.pipeline import Sampling
from fluxkiln.progress import Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import SIZE_MARK, Part, Shapes
from fluxkiln.verify.ladder import Ladder, compare_outputs, replay_part
from fluxkiln.verify.reference import Recording, view_recording


def verify_sizes(
    prepared: Prepared, made: Made, recording: Recording, folder: Path, progress: Progress, limits: Limits = LIMITS
) -> Parity:
    """The parity of the first size, as `verify`, with the rows of all others."""
    alone = replace(prepared, plan=prepared.plan.at(prepared.plan.shapes))
    parity = verify(alone, made.at(alone.plan.shapes), recording, folder, progress, limits)
    facts = dict(parity.facts)
    for shapes in prepared.plan.further:
        settings = replace(prepared.settings, prompts=(), seeds=(), recording=())
        at = replace(prepared, plan=prepared.plan.at(shapes), settings=settings)
        own, here = _own_parts(prepared, shapes), made.at(shapes)
        place, mark = folder / shapes.label, f"{SIZE_MARK}{shapes.label}"
        if toolchain_of(at.plan.target).any_shapes or replayed_shapes(at.checkpoint, at.plan, limits) == shapes:
            ladder, what = _replay_at(at, here, own, place, mark, progress, limits)
        else:
            ladder, what = _execute_at(at, here, own, place, mark, progress, limits)
        here = replace(here, binaries=tuple(binary for binary in here.binaries if binary.part in own))
        toolchain_of(at.plan.target).read_back(ladder, at.checkpoint, at.plan, at.cache, here)
        parity.ladder.absorb(ladder)
        facts[f"at {name_shapes(shapes)}"] = what
    return replace(parity, facts=facts)


def _own_parts(prepared: Prepared, shapes: Shapes) -> tuple[Part, ...]:
    """One part of each kind and scheme that is there for this size and not for one before it, as `Plan.at` has it."""
    plan, found = prepared.plan.at(shapes), dict[tuple[str, Scheme], list[Part]]()
    own = {part.base for part in prepared.plan.parts if part.sizes[0] == shapes}
    for part in plan.parts:
        if part.name in own:
            found.setdefault((part.kind, plan.scheme(part)), []).append(part)
    random = Random(f"{prepared.settings.seed} {shapes.label}")
    return tuple(random.choice(parts) for parts in found.values())


def _replay_at(
    at: Prepared, made: Made, own: tuple[Part, ...], folder: Path, mark: str, progress: Progress, limits: Limits
) -> tuple[Ladder, str]:
    checkpoint, cache, settings = at.checkpoint, at.cache, at.settings
    small = replace(at.plan, shapes=replayed_shapes(checkpoint, at.plan, limits))
    built = {part.component for part in at.plan.parts}
    every = checkpoint.model.recorded_parts(checkpoint.configs, settings.vae)
    parts = tuple(part for part in every if part.component in built)
    steps = min(at.steps, FEWEST_STEPS) if small.shapes == at.plan.shapes else 1
    recording = record_run(at, folder, parts, small.shapes, Sampling(steps, settings.seed, settings.prompt))
    recording = view_recording(recording, checkpoint.model, at.plan.parts)
    trace_templates(at, small, progress)
    at = replace(at, settings=replace(settings, steps=steps))
    with toolchain_of(at.plan.target).open_rungs(checkpoint, small, cache, made, folder, progress) as opened:
        found = replay(at, small, recording, opened, progress, only=own, mark=mark)
        opened.finish(found.ladder)
    image = f", an image of {steps} steps at the rung {found.pipeline_rung}" if found.pipeline else ""
    return found.ladder, f"{', '.join(part.name for part in own) or 'no part of its own'}{image}"


def _execute_at(
    at: Prepared, made: Made, own: tuple[Part, ...], folder: Path, mark: str, progress: Progress, limits: Limits
) -> tuple[Ladder, str]:
    checkpoint, plan, cache, settings = at.checkpoint, at.plan, at.cache, at.settings
    toolchain = toolchain_of(plan.target)
    ladder = Ladder(toolchain.rungs, toolchain.gates, mark)
    with toolchain.execute(checkpoint, plan, cache, made, folder) as top:
        able = executed_parts(checkpoint, replace(plan, parts=own), cache, settings.seed, limits) if top else ()
        progress.stage("verify", len(able))
        if able:
            prompt = filling_prompt(settings.prompt, plan.shapes.tokens, settings.seed)
            true = record_run(at, folder, able, plan.shapes, Sampling(1, settings.seed, prompt), only=True)
            rungs = {**stored_rung(checkpoint, plan, cache), **top}
            for part in able:
                compare_outputs(ladder, true, part, plan.scheme(part), 0, replay_part(rungs, true, part)[0])
                progress.done("verify", f"{part.name}{mark}", f"{len(rungs)} rungs")
    return ladder, f"compiled form executed: {', '.join(part.name for part in able) or 'none'}"
