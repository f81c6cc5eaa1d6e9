"""Verification of a model too large to be replayed at its own shapes, with one part's weights in memory at a time.

Every part is replayed at smaller shapes at the rungs that need no compiler, and the whole pipeline runs on one of
them. Of each kind of block some, and of the other parts those that are small enough, are executed in the compiled form
at the shapes of the build. What they are compared with is a run of diffusers' own pipeline at these shapes in which
all other blocks are left out, so that each is given what the one before it made; its prompt fills all text tokens.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.build.budget import Limits, executed_parts, filling_prompt, name_shapes
from fluxkiln.build.parity import (
    Parity,
    climb_part,
    climb_pipeline,
    is_complete,
    let_go,
    record_run,
    replay_part,
    run_pipeline,
    trace_templates,
)
from fluxkiln.build.samples import sample_runs
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.rungs import executed_rung, onnxruntime_rung, rungs_below, stored_rung
from fluxkiln.compile.toolchains.tpu_mlir.environment import installed
from fluxkiln.export.checkpoint import Checkpoint, expect_tensors
from fluxkiln.patches.pipeline import run_rows
from fluxkiln.progress import Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, find_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder
    from fluxkiln.verify.pipeline import PipelineResult
    from fluxkiln.verify.reference import Recording

# The rung that the whole pipeline runs on: how far stored weights lead it astray depends on the number of blocks, and
# what is wrong with them shows part by part.
PIPELINE_RUNG = "onnxruntime"


def verify_blockwise(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    settings: Settings,
    print_: str,
    binaries: tuple[Binary, ...],
    graphs: Mapping[str, Path],
    recording: Recording,
    folder: Path,
    progress: Progress,
    limits: Limits,
) -> Parity:
    """Climb the ladder with all parts at the shapes of the recording, with some at those of the build.

    Arguments as `parity.verify_build`.
    """
    from fluxkiln.verify.ladder import Ladder

    started = time.perf_counter()
    small = replace(plan, shapes=recording.shapes)
    trace_templates(checkpoint, small, cache, progress)
    # what was compiled elsewhere cannot be executed here, its weights are read back all the same
    able = plan.target.toolchain != "tpu_mlir" or installed() is not None
    chosen = executed_parts(checkpoint, plan, cache, settings.seed, limits) if able else ()
    progress.stage("verify", len(plan.parts) + len(chosen) + is_complete(checkpoint, plan))
    prompt = filling_prompt(settings.prompt, plan.shapes.tokens, settings.seed)
    true = recording
    if chosen:
        true = record_run(
            checkpoint, cache, settings, print_, folder / "executed", chosen, plan.shapes, 1, prompt, only=True
        )
    ladder, executed = Ladder(), Ladder()
    # the interpreter is left first: then what runs there ends at once when something else has failed
    with ThreadPoolExecutor(1, "top") as upper, executed_rung(checkpoint, plan, cache, binaries, graphs, folder) as top:
        # a thread of its own: the interpreter is another process, which keeps one core busy
        compiled = {part.name: upper.submit(replay_part, top, true, part) for part in chosen}
        try:
            pipeline = _replay_all(ladder, checkpoint, small, cache, settings, recording, progress)
            interpreted = {name: future.result()[0] for name, future in compiled.items()}
            # only now: both at once would take 5 GB
            stored = stored_rung(checkpoint, plan, cache)
            for part in chosen:
                made = {**replay_part(stored, true, part)[0], **interpreted[part.name]}
                label = f"{part.name} at {plan.shapes.width}x{plan.shapes.height}"
                climb_part(executed, plan, true, part, 0, made, label)
                progress.done("verify", label, f"{len(made)} rungs")
        except BaseException:
            upper.shutdown(wait=False, cancel_futures=True)
            raise
    ladder.absorb(executed)
    runs = None
    if pipeline is not None:
        climb_pipeline(ladder, small, recording, PIPELINE_RUNG, pipeline)
        progress.done("verify", "whole pipeline", f"1 step at {name_shapes(small.shapes)}")
        runs = sample_runs(
            checkpoint,
            small,
            cache,
            settings,
            ladder,
            onnxruntime_rung(checkpoint, small, cache, 0),
            PIPELINE_RUNG,
            progress,
        )
    left_out = dict.fromkeys(part.kind for part in plan.parts if part.kind not in {part.kind for part in chosen})
    facts = {
        "every part replayed at": f"{name_shapes(small.shapes)}, 1 step",
        f"compiled form executed at {name_shapes(plan.shapes)}": ", ".join(part.name for part in chosen) or "none",
        f"compiled form not executed, {'too large' if able else 'no compiler here'}": ", ".join(left_out) or "none",
    }
    seconds = {"verify": time.perf_counter() - started, **recording.seconds}
    return Parity(ladder, recording, pipeline, PIPELINE_RUNG, seconds, facts, runs)


def _replay_all(
    ladder: Ladder,
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    settings: Settings,
    recording: Recording,
    progress: Progress,
) -> PipelineResult | None:
    """Replay every part at the rungs that need no compiler, and run the whole pipeline on one of them meanwhile.

    The pipeline is what leads through the parts, so that its rung does not load their weights a second time. There is
    none where only some components are built.
    """
    rungs = rungs_below(checkpoint, plan, cache, threads=0)
    following = dict(zip(plan.parts, plan.parts[1:], strict=False))

    def run(name: str, inputs: Mapping[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]]:
        part = find_part(plan.parts, name)
        _expect(checkpoint, following.get(part))
        made: dict[str, Any] = {}
        outputs: dict[str, Any] = {}
        for rung, runner in rungs.items():
            made[rung] = run_rows(runner, part, recording.inputs(name))
            if rung == PIPELINE_RUNG and inputs is not None:
                outputs = runner(name, inputs)
            let_go(runner)
        climb_part(ladder, plan, recording, part, 0, made)
        progress.done("verify", name, f"{len(rungs)} rungs at {name_shapes(plan.shapes)}")
        return outputs

    if is_complete(checkpoint, plan):
        return run_pipeline(checkpoint, plan, replace(settings, steps=1), run)
    for part in plan.parts:
        run(part.name, None)
    return None


def _expect(checkpoint: Checkpoint, part: Part | None) -> None:
    """Have the system read a block's weights while another one is computed."""
    if part is not None and part.prefix:
        refs = checkpoint.tensors[part.folder].values()
        expect_tensors(ref for ref in refs if ref.name.startswith(part.prefix))
