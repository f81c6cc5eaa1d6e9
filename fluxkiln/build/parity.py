"""Verification of a build: record the reference, replay it at every rung, run the whole pipeline on compiled parts."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.build.budget import LIMITS, Limits, multiplications, replayed_shapes
from fluxkiln.compile.corrections import part_weights
from fluxkiln.compile.plan import Binary, BundleFile, Plan
from fluxkiln.compile.rungs import Rungs, bm1684x_rungs, cpu_rungs
from fluxkiln.compile.templates import find_template, make_template, pipeline_files, tell_template
from fluxkiln.compile.weights import part_rounders
from fluxkiln.digests import digest_json
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.pipeline import Sampling, run_rows
from fluxkiln.progress import Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.settings import Settings
from fluxkiln.types import GraphFormat, Part, PartRunner, Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder
    from fluxkiln.verify.pipeline import PipelineResult
    from fluxkiln.verify.reference import Recording


@dataclass(frozen=True, slots=True)
class Parity:
    """A climbed ladder and the reference it was climbed from.

    `pipeline` is the image made by parts at the rung `pipeline_rung`, None where not all components are built. `facts`
    says at which shapes a large model was verified; it is empty where everything ran at the shapes of the build.
    `runs` are the whole images of further prompts and seeds, where they are asked for.
    """

    ladder: Ladder
    recording: Recording
    pipeline: PipelineResult | None
    pipeline_rung: str
    seconds: Mapping[str, float]
    facts: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, Any] | None = None


def record(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    settings: Settings,
    print_: str,
    folder: Path,
    limits: Limits = LIMITS,
) -> Recording:
    """The recorded reference run, from the store or made now, laid out in `folder`.

    Of a model that is too large to be replayed at its own shapes it is one step at smaller ones.

    Args:
        print_: the checkpoint's fingerprint.
    """
    from fluxkiln.verify.reference import view_recording

    shapes, model = replayed_shapes(checkpoint, plan, limits), checkpoint.model
    built = {part.component for part in plan.parts}
    every = model.recorded_parts(checkpoint.configs, settings.vae)
    recorded = tuple(part for part in every if part.component in built)
    steps = settings.steps if shapes == plan.shapes else 1
    recording = record_run(checkpoint, cache, settings, print_, folder, recorded, shapes, steps, settings.prompt)
    return view_recording(recording, model, plan.parts)


def is_complete(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether all components of a pipeline are built."""
    return {part.component for part in plan.parts} == set(checkpoint.model.components)


def record_run(
    checkpoint: Checkpoint,
    cache: ActionCache,
    settings: Settings,
    print_: str,
    folder: Path,
    parts: tuple[Part, ...],
    shapes: Shapes,
    steps: int,
    prompt: str,
    only: bool = False,
) -> Recording:
    """A reference run from the store, or made now; its arguments are those of `verify.record.record_reference`."""
    from fluxkiln.verify.reference import INDEX, read_recording, record_reference

    def produce(work: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        sampling = Sampling(steps, settings.seed, prompt)
        record_reference(checkpoint, parts, shapes, work, sampling, only=only)
        files = [path for path in work.rglob("*") if path.is_file()]
        return {str(path.relative_to(work)): path for path in files}, {}

    action = Action(
        stage="record",
        what=f"reference run of {checkpoint.name}",
        code_version=code_version(record_run, model=type(checkpoint.model)),
        inputs={"checkpoint": f"sha256:{print_}"},
        settings={
            "parts": digest_json([[part.name, part.kind, part.prefix] for part in parts]),
            "only": only,
            "shapes": [shapes.height, shapes.width, shapes.tokens],
            "steps": steps,
            "seed": settings.seed,
            "prompt": prompt,
            "vae": settings.vae,
        },
        tools={
            "torch": _version("torch"),
            "diffusers": _version("diffusers"),
            "transformers": _version("transformers"),
        },
    )
    result = run_action(cache, action, produce)
    for name, blob in result.outputs.items():
        if not (folder / name).is_file() or name == INDEX:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink(missing_ok=True)
            cache.store.export(blob.digest, folder / name)
    return read_recording(folder)


def verify_build(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    settings: Settings,
    print_: str,
    binaries: tuple[Binary, ...],
    files: tuple[BundleFile, ...],
    graphs: Mapping[str, Path],
    recording: Recording,
    folder: Path,
    progress: Progress,
    limits: Limits = LIMITS,
) -> Parity:
    """Replay the recording at every rung of every part, run the whole pipeline, read the stored weights back.

    Args:
        print_: the checkpoint's fingerprint.
        graphs: part -> graph of an ONNX Runtime build.
        recording: of `record`, with the same limits. If it is not at the shapes of the build, the model is large: see
            `fluxkiln.build.blockwise`.
        folder: for files that a rung needs.
    """
    if recording.shapes != plan.shapes:
        from fluxkiln.build.blockwise import verify_blockwise

        parity = verify_blockwise(
            checkpoint, plan, cache, settings, print_, binaries, graphs, recording, folder, progress, limits
        )  # fmt: skip
    else:
        trace_templates(checkpoint, plan, cache, progress)
        rungs: AbstractContextManager[Rungs]
        if plan.target.toolchain == "tpu_mlir":
            simulated = multiplications(checkpoint, plan) <= limits.simulated
            rungs = bm1684x_rungs(checkpoint, plan, cache, binaries, files, folder, simulated)
        else:
            rungs = cpu_rungs(checkpoint, plan, cache, graphs)
        with rungs as made:
            parity = replay(checkpoint, plan, cache, settings, recording, made, progress)
    climb_stored(parity.ladder, checkpoint, plan, cache, binaries, files)
    return parity


def trace_templates(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, progress: Progress) -> None:
    """Make the templates of the rungs below the compiled one, so that tracing them is seen."""
    formats: dict[GraphFormat, bool] = {
        "onnx23": plan.target.graph_format == "onnx17",
        "onnx17": plan.target.graph_format == "onnx17" or plan.quantized,
    }
    for graph_format, needed in formats.items():
        missing = [kind for kind in plan.kinds() if find_template(checkpoint, plan, cache, kind, graph_format) is None]
        if not needed or not missing:
            continue
        progress.stage(f"template {graph_format}", len(missing))
        for kind in missing:
            tell_template(checkpoint, plan, cache, kind, graph_format, progress, f"template {graph_format}")


def replay(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    settings: Settings,
    recording: Recording,
    rungs: Rungs,
    progress: Progress,
) -> Parity:
    """Replay the recording at every rung of every part; run the whole pipeline, if it is all there, on the top rung.

    Args:
        rungs: bottom to top. The top one has a thread of its own: a simulator keeps two cores busy by itself.
    """
    from fluxkiln.verify.ladder import Ladder

    started = time.perf_counter()
    calls = [(part, step) for part in plan.parts for step in range(len(recording.calls[part.name]))]
    complete = is_complete(checkpoint, plan)
    progress.stage("verify", len(calls) + complete)
    ladder = Ladder()
    *_, top = rungs
    below = {rung: runner for rung, runner in rungs.items() if rung != top}
    with ThreadPoolExecutor(1, "below") as lower, ThreadPoolExecutor(1, "top") as upper:
        lower_parts = {part.name: lower.submit(replay_part, below, recording, part) for part in plan.parts}
        upper_parts = {part.name: upper.submit(replay_part, {top: rungs[top]}, recording, part) for part in plan.parts}
        whole = upper.submit(run_pipeline, checkpoint, plan, settings, rungs[top]) if complete else None
        try:
            for part, step in calls:
                made = {**lower_parts[part.name].result()[step], **upper_parts[part.name].result()[step]}
                climb_part(ladder, plan, recording, part, step, made)
                progress.done("verify", part.name, f"{len(rungs)} rungs, step {step}")
            pipeline = whole.result() if whole is not None else None
        except BaseException:
            lower.shutdown(wait=False, cancel_futures=True)
            upper.shutdown(wait=False, cancel_futures=True)
            raise
    if pipeline is not None:
        climb_pipeline(ladder, plan, recording, top, pipeline)
        progress.done("verify", "whole pipeline", f"{recording.steps} steps")
    runs = None
    if pipeline is not None:
        from fluxkiln.build.samples import sample_runs

        runs = sample_runs(checkpoint, plan, cache, settings, ladder, rungs[top], top, progress)
    seconds = {"verify": time.perf_counter() - started, **recording.seconds}
    return Parity(ladder, recording, pipeline, top, seconds, runs=runs)


def climb_pipeline(
    ladder: Ladder,
    plan: Plan,
    recording: Recording,
    rung: str,
    pipeline: PipelineResult,
) -> None:
    """Rows of the final latents and the image, under the scheme of the blocks."""
    blocks = [part for part in plan.parts if part.component == "transformer" and part.traits.residual]
    scheme = _base_name(plan.scheme(blocks[0]))
    ladder.climb_latents(recording.steps - 1, recording.latents, [(rung, pipeline.latents)], scheme)
    ladder.climb_image(-1, recording.image, [(rung, pipeline.image)], scheme)


def climb_stored(
    ladder: Ladder,
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    binaries: tuple[Binary, ...],
    files: tuple[BundleFile, ...],
) -> None:
    """One row per cast part: its weights read back from the bundle's own file, against the checkpoint's.

    What a part computes dilutes one wrong scale among thousands of sound ones; its bytes do not.
    """
    import numpy as np

    from fluxkiln.compile.toolchains.tpu_mlir.cast import compare_stored
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap

    homes = {part: cache.path(file.blob) for file in files for part in file.parts}
    for binary in binaries:
        if "map" not in binary.blobs:
            continue
        reader = part_weights(
            checkpoint, plan, cache, binary.part, make_template(checkpoint, plan, cache, binary.part.kind, "onnx17")
        )
        coefficients = CoefficientMap.from_json(json.loads(cache.path(binary.blobs["map"]).read_text()))
        rounder_of = part_rounders(checkpoint, plan, cache, binary.part)
        differing = compare_stored(homes[binary.part.name], binary.net, coefficients, reader, rounder_of)
        worst = max(differing, key=lambda slot: float(differing[slot].max()))
        output = f"weights of {worst}" if differing[worst].any() else "weights"
        equal = np.concatenate([1 - shares for shares in differing.values()])
        scheme = _base_name(binary.scheme)
        ladder.climb(
            binary.part.name, binary.part.kind, output, -1, np.ones_like(equal), None, [("stored", equal)], scheme
        )


def run_pipeline(checkpoint: Checkpoint, plan: Plan, settings: Settings, runner: PartRunner) -> PipelineResult:
    """diffusers' own loop with `runner` in place of every model."""
    from fluxkiln.verify.pipeline import run_with_parts

    sampling = Sampling(settings.steps, settings.seed, settings.prompt)
    return run_with_parts(checkpoint.model, pipeline_files(checkpoint, plan), plan.shapes, plan.parts, runner, sampling)


def replay_part(rungs: Rungs, recording: Recording, part: Part) -> list[dict[str, Mapping[str, NDArray[Any]]]]:
    """Step -> rung -> outputs. A rung lets go of the part's weights before the next one loads them."""
    steps: list[dict[str, Mapping[str, NDArray[Any]]]] = [{} for _ in recording.calls[part.name]]
    for rung, runner in rungs.items():
        for step, made in enumerate(steps):
            made[rung] = run_rows(runner, part, recording.inputs(part.name, step))
        let_go(runner)
    return steps


def let_go(runner: PartRunner) -> None:
    """Have a runner drop what it holds of its last part; it loads that again when it is needed."""
    close = getattr(runner, "close", None)
    if close is not None:
        close()


def climb_part(
    ladder: Ladder,
    plan: Plan,
    recording: Recording,
    part: Part,
    step: int,
    made: Mapping[str, Mapping[str, Any]],
    label: str = "",
) -> None:
    """Rows of every output of one call of `part`.

    Args:
        made: rung -> outputs.
        label: what the part is called in the rows; its name by default.
    """
    inputs, expected = recording.inputs(part.name, step), recording.outputs(part.name, step)
    residual = dict(part.traits.residual)
    shown = step if part.component == "transformer" else -1
    for output, reference in expected.items():
        base = inputs[residual[output]] if output in residual else None
        rungs = [(rung, outputs[output].reshape(reference.shape)) for rung, outputs in made.items()]
        scheme = _base_name(plan.scheme(part))
        ladder.climb(label or part.name, part.kind, output, shown, reference, base, rungs, scheme)


def _base_name(scheme: Scheme) -> str:
    """The scheme as the gates know it: without group size or method, but with whether that is calibrated."""
    return scheme.base_name + "-calibrated" * scheme.calibrated


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)
