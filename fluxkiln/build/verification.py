"""Verification of a build: the reference recorded, replayed at every rung, and the whole pipeline run on parts.

Of a model whose image step is over the budget all parts are replayed at smaller shapes: every part gets the recorded
inputs, each rung holds one part's weights at a time, and the whole pipeline runs meanwhile on one of these rungs. Some
parts are executed in their compiled form at the shapes of the build as well.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.build.budget import LIMITS, Limits, executed_parts, filling_prompt, name_shapes, replayed_shapes
from fluxkiln.build.prepared import Prepared
from fluxkiln.build.samples import judge_scenes, sample_runs
from fluxkiln.compile.plan import Made, Plan
from fluxkiln.compile.rungs import onnxruntime_rung, rungs_below, stored_rung
from fluxkiln.compile.templates import find_template, pipeline_files, prepare_template
from fluxkiln.compile.tensors import part_cost
from fluxkiln.compile.toolchain import OpenRungs, toolchain_of
from fluxkiln.digests import digest_json
from fluxkiln.export.checkpoint import Checkpoint, expect_tensors
from fluxkiln.patches.pipeline import Sampling, run_rows
from fluxkiln.progress import Progress
from fluxkiln.types import GraphFormat, Part, PartRunner, Shapes, find_part
from fluxkiln.verify.carried import Carried, carried_parts
from fluxkiln.verify.ladder import Ladder, compare_outputs, compare_pipeline, let_go, replay_part
from fluxkiln.verify.report.document import IMAGE_TIME

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.pipeline import PipelineResult
    from fluxkiln.verify.reference import Recording

# The rung that the whole pipeline of a large model runs on: how far stored weights lead it astray depends on the number
# of blocks, and what is wrong with them shows part by part.
PIPELINE_RUNG = "onnxruntime"
# of the mean cost of a part, one in so many is there in every call
LEAST_SHARE = 5


@dataclass(frozen=True, slots=True)
class Parity:
    """A ladder with all its rows, and the reference they compare with.

    `pipeline` is the image made by parts at the rung `pipeline_rung`, None where not all components are built. `facts`
    says at which other shapes a large model was verified. `runs` are whole images of further prompts and seeds,
    `judged` what pictures of drawn scenes show. `carried` is what travels with the bundle.
    """

    ladder: Ladder
    recording: Recording
    pipeline: PipelineResult | None
    pipeline_rung: str
    seconds: Mapping[str, float]
    facts: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, Any] | None = None
    judged: Mapping[str, Any] | None = None
    carried: Carried | None = None


def record(prepared: Prepared, limits: Limits = LIMITS) -> Recording:
    """The recorded reference run, from the store or made now, laid out in the build's folder.

    Of a model that is too large to be replayed at its own shapes it is one step at smaller ones.
    """
    from fluxkiln.verify.reference import view_recording

    checkpoint, settings, plan = prepared.checkpoint, prepared.settings, prepared.plan.at(prepared.plan.shapes)
    shapes = replayed_shapes(checkpoint, plan, limits)
    built = {part.component for part in plan.parts}
    every = checkpoint.model.recorded_parts(checkpoint.configs, settings.vae)
    parts = tuple(part for part in every if part.component in built)
    sampling = Sampling(prepared.steps if shapes == plan.shapes else 1, settings.seed, settings.prompt)
    recording = record_run(prepared, prepared.plan.folder / "recording", parts, shapes, sampling)
    return view_recording(recording, checkpoint.model, plan.parts)


def record_run(
    prepared: Prepared, folder: Path, parts: tuple[Part, ...], shapes: Shapes, sampling: Sampling, only: bool = False
) -> Recording:
    """A reference run from the store, or made now; arguments as `verify.reference.record_reference`."""
    from fluxkiln.verify.reference import INDEX, read_recording, record_reference

    checkpoint, cache = prepared.checkpoint, prepared.cache

    def produce(work: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        record_reference(checkpoint, parts, shapes, work, sampling, only=only)
        files = [path for path in work.rglob("*") if path.is_file()]
        return {str(path.relative_to(work)): path for path in files}, {}

    action = Action(
        stage="record",
        what=f"reference run of {checkpoint.name}",
        code_version=code_version(record_run, model=type(checkpoint.model)),
        inputs={"checkpoint": f"sha256:{prepared.fingerprint}"},
        settings={
            "parts": digest_json([[part.name, part.kind, part.prefix] for part in parts]),
            "only": only,
            "shapes": [shapes.height, shapes.width, shapes.tokens],
            "steps": sampling.steps,
            "seed": sampling.seed,
            "prompt": sampling.prompt,
            "vae": prepared.settings.vae,
        },
        tools={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    )
    result = run_action(cache, action, produce)
    for name, blob in result.outputs.items():
        if not (folder / name).is_file() or name == INDEX:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink(missing_ok=True)
            cache.store.export(blob.digest, folder / name)
    return read_recording(folder)


def verify(
    prepared: Prepared, made: Made, recording: Recording, folder: Path, progress: Progress, limits: Limits = LIMITS
) -> Parity:
    """Replay the recording at every rung of every part, run the whole pipeline, read the stored weights back.

    Args:
        recording: of `record`, with the same limits. If it is not at the shapes of the build, the model is large.
        folder: for files that a rung needs.
    """
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    toolchain = toolchain_of(plan.target)
    # now: two threads that import from a lazy package for the first time find it half there
    checkpoint.model.load_pipeline_class()
    if recording.shapes == plan.shapes or toolchain.any_shapes:
        small = replace(plan, shapes=recording.shapes)
        trace_templates(prepared, small, progress)
        with toolchain.open_rungs(checkpoint, small, cache, made, folder, progress) as opened:
            parity = replay(prepared, small, recording, opened, progress)
            opened.finish(parity.ladder)
        if small.shapes != plan.shapes:
            parity = replace(parity, facts={**parity.facts, "every part replayed at": name_shapes(small.shapes)})
    else:
        parity = _verify_large(prepared, made, recording, folder, progress, limits)
    toolchain.read_back(parity.ladder, checkpoint, plan, cache, made)
    if is_complete(checkpoint, plan):
        parity = replace(parity, judged=judge_scenes(prepared, plan, progress))
    return parity


def trace_templates(prepared: Prepared, plan: Plan, progress: Progress) -> None:
    """Make the templates of the rungs below the compiled one, so that tracing them is seen."""
    compiled = plan.target.graph_format == "onnx17"
    formats: dict[GraphFormat, bool] = {"onnx23": compiled, "onnx17": compiled or plan.quantized}
    for graph_format, piece in product([one for one, needed in formats.items() if needed], plan.alike()):
        context = prepared.checkpoint, piece, prepared.cache
        missing = [kind for kind in piece.kinds() if find_template(*context, kind, graph_format) is None]
        if missing:
            progress.stage(f"template {graph_format}", len(missing))
        for kind in missing:
            prepare_template(*context, kind, graph_format, progress, f"template {graph_format}")


def is_complete(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether all components of a pipeline are built."""
    return {part.component for part in plan.parts} == set(checkpoint.model.components)


def run_pipeline(checkpoint: Checkpoint, plan: Plan, sampling: Sampling, runner: PartRunner) -> PipelineResult:
    """The loop of `fluxkiln generate` with `runner` in place of every model."""
    from fluxkiln.verify.pipeline import run_with_parts

    return run_with_parts(checkpoint.model, pipeline_files(checkpoint, plan), plan.shapes, plan.parts, runner, sampling)


def replay(
    prepared: Prepared,
    plan: Plan,
    recording: Recording,
    opened: OpenRungs,
    progress: Progress,
    *,
    only: Collection[Part] | None = None,
    mark: str = "",
) -> Parity:
    """Replay the recording, at whose shapes the plan is, at every rung of every part, or of `only` some; run the whole
    pipeline, if it is all there, on the top rung. That has a thread of its own: a simulator keeps two cores busy by
    itself. `mark`: see `Ladder`."""
    started, checkpoint, settings = time.perf_counter(), prepared.checkpoint, prepared.settings
    sampling = Sampling(prepared.steps, settings.seed, settings.prompt)
    plan, rungs = replace(plan, parts=opened.parts), opened.rungs
    parts = [part for part in plan.parts if only is None or part in only]
    calls = [(part, step) for part in parts for step in range(len(recording.calls[part.name]))]
    every = [(part, step) for part in plan.parts for step in range(len(recording.calls[part.name]))]
    weighed = {part: part_cost(checkpoint, plan, part) for part in plan.parts}
    costs = [weighed[part] for part, _ in calls]
    floor = sum(costs) / max(len(costs), 1) / LEAST_SHARE  # what a call costs whatever it computes
    costs = [cost + floor for cost in costs]
    progress.stage("verify", costs)
    toolchain = toolchain_of(plan.target)
    ladder = Ladder(toolchain.rungs, toolchain.gates, mark)
    ladder.carried = _carried(prepared, plan, recording, progress) if plan.shapes == prepared.plan.shapes else None
    *_, top = rungs
    below = {rung: runner for rung, runner in rungs.items() if rung != top}

    def run_whole() -> PipelineResult:
        components = list(dict.fromkeys(part.component for part in plan.parts))
        once = [(part, step) for part, step in every if not (part.traits.rows and step)]  # with the rows of all steps
        ordered = sorted(once, key=lambda call: (components.index(call[0].component), call[1]))
        progress.stage("pipeline", [weighed[part] + floor for part, _ in ordered])

        def run(name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
            outputs = rungs[top](name, inputs)
            progress.done("pipeline", name, f"of {prepared.steps} steps at {name_shapes(plan.shapes)}")
            return outputs

        return run_pipeline(checkpoint, plan, sampling, run)

    with ThreadPoolExecutor(1, "below") as lower, ThreadPoolExecutor(1, "top") as upper:
        lower_parts = {part.name: lower.submit(replay_part, below, recording, part) for part in parts}
        upper_parts = {part.name: upper.submit(replay_part, {top: rungs[top]}, recording, part) for part in parts}
        whole = upper.submit(run_whole) if is_complete(checkpoint, plan) else None
        try:
            for part, step in calls:
                made = {**lower_parts[part.name].result()[step], **upper_parts[part.name].result()[step]}
                compare_outputs(ladder, recording, part, plan.scheme(part), step, made)
                progress.done("verify", part.name, f"{len(rungs)} rungs, step {step}")
            pipeline = whole.result() if whole is not None else None
        except BaseException:
            lower.shutdown(wait=False, cancel_futures=True)
            upper.shutdown(wait=False, cancel_futures=True)
            raise
    carried = ladder.carried
    parity = Parity(ladder, recording, pipeline, top, {"verify": started}, opened.facts, carried=carried)
    return _with_pipeline(prepared, plan, parity, rungs[top], progress)


def _carried(prepared: Prepared, plan: Plan, recording: Recording, progress: Progress) -> Carried | None:
    """What collects the recording that travels with the bundle, of those of the plan's parts that were asked for."""
    parts = tuple(
        part for part in plan.parts if part in carried_parts(prepared.plan.parts, prepared.settings.recording)
    )
    if not parts:
        return None
    calls = [call for part in parts for call in recording.calls[part.name]]
    read = {file for call in calls for side in call.values() for file in side.values()}
    made = [file for call in calls for file in call["outputs"].values()]
    size = sum((recording.root / file).stat().st_size for file in (*read, *made))
    progress.note(f"--with-recording: {len(parts)} parts add about {size / 1e6:.1f} MB to the bundle")
    return Carried(parts, prepared.plan.folder / "carried")


def _with_pipeline(prepared: Prepared, plan: Plan, parity: Parity, runner: PartRunner, progress: Progress) -> Parity:
    """The parity, whose `seconds` has when it was begun, with the rows of its whole pipeline by the runner of its
    `pipeline_rung`, and with the images of further prompts and seeds."""
    recording, runs, image = parity.recording, None, dict[str, float]()
    if parity.pipeline is not None:
        image = {IMAGE_TIME: parity.pipeline.seconds}
        scheme = next(plan.scheme(part) for part in plan.parts if part.traits.is_block)
        compare_pipeline(parity.ladder, recording, scheme, parity.pipeline_rung, parity.pipeline)
        runs = sample_runs(prepared, plan, parity.ladder, runner, parity.pipeline_rung, progress)
    spent = time.perf_counter() - parity.seconds["verify"]
    return replace(parity, runs=runs, seconds={"verify": spent, **recording.seconds, **image})


def _verify_large(
    prepared: Prepared, made: Made, recording: Recording, folder: Path, progress: Progress, limits: Limits
) -> Parity:
    """All parts at the shapes of the recording, some in their compiled form at those of the build."""
    started, settings = time.perf_counter(), prepared.settings
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    small, toolchain = replace(plan, shapes=recording.shapes), toolchain_of(plan.target)
    progress.note(
        f"verify: every part at {name_shapes(small.shapes)}, as {name_shapes(plan.shapes)} would take too long, and "
        "some of them in full; --no-verify leaves it out"
    )
    trace_templates(prepared, small, progress)
    ladder, executed = (Ladder(toolchain.rungs, toolchain.gates) for _ in range(2))
    # what executes is left first: then it ends at once when something else has failed
    with ThreadPoolExecutor(1, "top") as upper, toolchain.execute(checkpoint, plan, cache, made, folder) as top:
        # what was compiled elsewhere cannot be executed here, its weights are read back all the same
        chosen = executed_parts(checkpoint, plan, cache, settings.seed, limits) if top else ()
        progress.stage("verify", len(plan.parts) + len(chosen) + is_complete(checkpoint, plan))
        true = recording
        if chosen:
            prompt = filling_prompt(settings.prompt, plan.shapes.tokens, settings.seed)
            sampling = Sampling(1, settings.seed, prompt)
            true = record_run(prepared, folder / "executed", chosen, plan.shapes, sampling, only=True)
            executed.carried = _carried(prepared, replace(plan, parts=chosen), true, progress)
        # a thread of its own: the interpreter is another process, which keeps one core busy
        compiled = {part.name: upper.submit(replay_part, top, true, part) for part in chosen}
        try:
            pipeline = _replay_small(ladder, prepared, small, recording, progress)
            interpreted = {name: future.result()[0] for name, future in compiled.items()}
            # only now: both at once would take 5 GB
            stored = stored_rung(checkpoint, plan, cache)
            for part in chosen:
                found = {**replay_part(stored, true, part)[0], **interpreted[part.name]}
                label = f"{part.name} at {plan.shapes.width}x{plan.shapes.height}"
                compare_outputs(executed, true, part, plan.scheme(part), 0, found, label)
                progress.done("verify", label, f"{len(found)} rungs")
        except BaseException:
            upper.shutdown(wait=False, cancel_futures=True)
            raise
        able = bool(top)
    ladder.absorb(executed)
    left_out = dict.fromkeys(part.kind for part in plan.parts if part.kind not in {part.kind for part in chosen})
    facts = {
        "every part replayed at": f"{name_shapes(small.shapes)}, 1 step",
        f"compiled form executed at {name_shapes(plan.shapes)}": ", ".join(part.name for part in chosen) or "none",
        f"compiled form not executed, {'too large' if able else 'no compiler here'}": ", ".join(left_out) or "none",
    }
    carried = executed.carried
    if pipeline is not None:
        progress.done("verify", "whole pipeline", f"1 step at {name_shapes(small.shapes)}")
    parity = Parity(ladder, recording, pipeline, PIPELINE_RUNG, {"verify": started}, facts, carried=carried)
    return _with_pipeline(prepared, small, parity, onnxruntime_rung(checkpoint, small, cache, 0), progress)


def _replay_small(
    ladder: Ladder, prepared: Prepared, plan: Plan, recording: Recording, progress: Progress
) -> PipelineResult | None:
    """Replay every part at the rungs that need no compiler, and run the whole pipeline on one of them meanwhile.

    The pipeline is what leads through the parts, so that its rung does not load their weights a second time. There is
    none where only some components are built.
    """
    checkpoint = prepared.checkpoint
    rungs = rungs_below(checkpoint, plan, prepared.cache, threads=0)
    following = dict(zip(plan.parts, plan.parts[1:], strict=False))

    def run(name: str, inputs: Mapping[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]]:
        part = find_part(plan.parts, name)
        after = following.get(part)
        if after is not None and after.prefix:  # the system reads a block's weights while another one is computed
            refs = checkpoint.tensors[after.folder].values()
            expect_tensors(ref for ref in refs if ref.name.startswith(after.prefix))
        made: dict[str, Any] = {}
        outputs: dict[str, Any] = {}
        for rung, runner in rungs.items():
            made[rung] = run_rows(runner, part, recording.inputs(name))
            if rung == PIPELINE_RUNG and inputs is not None:
                outputs = runner(name, inputs)
            let_go(runner)
        compare_outputs(ladder, recording, part, plan.scheme(part), 0, made)
        progress.done("verify", name, f"{len(rungs)} rungs at {name_shapes(plan.shapes)}")
        return outputs

    if is_complete(checkpoint, plan):
        return run_pipeline(checkpoint, plan, Sampling(1, prepared.settings.seed, prepared.settings.prompt), run)
    for part in plan.parts:
        run(part.name, None)
    return None
