"""Parity over whole images: every prompt with every seed, over all steps, by diffusers and by the parts of a build.

Of a checkpoint that paints drawn scenes the pictures of fixed prompts are judged as well.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.build.budget import name_shapes
from fluxkiln.build.prepared import Prepared
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.rungs import stored_weights
from fluxkiln.compile.templates import pipeline_files
from fluxkiln.digests import digest_json
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.pipeline import Sampling, quiet
from fluxkiln.progress import Progress
from fluxkiln.types import PartRunner, Shapes
from fluxkiln.verify.runs import Run, Sampled, describe_runs, list_runs, measure_run, thumbnail

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder

# what a checkpoint has that was trained to paint scenes
RECIPE = "recipe.json"
# prompts of a report: some 130 facts, so a fact is 0.8 points
JUDGED = 24
JUDGED_SHOWN = 8
# steps of an image that is judged: enough to see what stands where
MOST_JUDGED_STEPS = 4


def sample_runs(
    prepared: Prepared, plan: Plan, ladder: Ladder, runner: PartRunner, rung: str, progress: Progress
) -> dict[str, Any] | None:
    """Make the images that the settings ask for and compare them; their last latents and images go to `ladder`.

    Args:
        plan: at the shapes to run at; its parts are those `runner` runs, all components of them.

    Returns:
        The report's `runs`; None where no prompts and no seeds are asked for. UsageError: too many runs.
    """
    settings = prepared.settings
    pairs = list_runs(settings.prompts, settings.seeds, settings.prompt, settings.seed)
    if not pairs:
        return None
    progress.stage("sample", 2 * len(pairs))
    runs: list[Run] = []
    pictures: dict[tuple[str, int], tuple[NDArray[Any], NDArray[Any]]] = {}
    references = reference_runs(prepared, plan, pairs, prepared.steps, progress)
    scheme = next(plan.scheme(part).base_name for part in plan.parts if part.traits.is_block)
    for number, (prompt, seed) in enumerate(pairs):
        reference = references[prompt, seed]
        made = _sample(prepared, plan, runner, Sampling(prepared.steps, seed, prompt))
        runs.append(measure_run(prompt, seed, reference, made))
        pictures[prompt, seed] = reference.image, made.image
        name, last = f"pipeline.{number:02d}", len(made.latents) - 1
        ladder.compare(name, None, "latents", last, reference.latents[-1], None, [(rung, made.latents[-1])], scheme)
        ladder.compare(name, None, "image", -1, reference.image, None, [(rung, made.image)], scheme)
        progress.done("sample", f"seed {seed}: {_shown(prompt)}", f"{runs[-1].psnr:.1f} dB, SSIM {runs[-1].ssim:.4f}")
    return {**describe_runs(runs, pictures, rung), "shapes": name_shapes(plan.shapes)}


def judge_scenes(
    prepared: Prepared, plan: Plan, progress: Progress, count: int = JUDGED, most_steps: int = MOST_JUDGED_STEPS
) -> dict[str, Any] | None:
    """How well the stored weights paint drawn scenes, beside diffusers with the checkpoint's own.

    Args:
        plan: of the build, with all components.
        count: how many of the fixed prompts.

    Returns:
        The report's `judged`; None of a checkpoint that does not paint scenes, and of parts that are cut over cores:
        no rung of theirs computes many images.
    """
    from fluxkiln.scenes.adherence import fixed_prompts, judge_images

    checkpoint = prepared.checkpoint
    if not (checkpoint.root / RECIPE).is_file() or plan.layout is not None:
        return None
    asked, steps = fixed_prompts(count), min(most_steps, checkpoint.model.steps[checkpoint.variant])
    pairs = [(prompt.text, seed) for seed, prompt in enumerate(asked)]
    progress.stage("judge", 2 * len(pairs))
    reference = [run.image for run in reference_runs(prepared, plan, pairs, steps, progress, "judge").values()]
    rung, made = paint_stored(prepared, plan, [prompt.text for prompt in asked], steps, progress)
    drawn = [(image * 255).round().astype("uint8") for image in reference]
    entries = [
        {"prompt": prompt.text, "reference": thumbnail(one / 255), "actual": thumbnail(other / 255)}
        for prompt, one, other in list(zip(asked, drawn, made, strict=True))[:JUDGED_SHOWN]
    ]
    facts = {"diffusers": judge_images(asked, drawn)["facts"], "rung": rung, "steps": steps, "entries": entries}
    return judge_images(asked, made, drawn) | facts


def paint_stored(
    prepared: Prepared, plan: Plan, prompts: Sequence[str], steps: int, progress: Progress
) -> tuple[str, list[NDArray[Any]]]:
    """Images [height, width, 3] uint8 with the weights as the target stores them, seeds from 0 on; and the rung."""
    rung, runner = stored_weights(prepared.checkpoint, plan, prepared.cache, keep=len(plan.parts))
    images = []
    for seed, prompt in enumerate(prompts):
        image = _sample(prepared, plan, runner, Sampling(steps, seed, prompt)).image
        images.append((image * 255).round().astype("uint8"))
        progress.done("judge", f"seed {seed}: {_shown(prompt)}", f"{steps} steps on {rung}")
    return rung, images


def _sample(prepared: Prepared, plan: Plan, runner: PartRunner, sampling: Sampling) -> Sampled:
    """One image with `runner` in the place of every model."""
    from fluxkiln.verify.pipeline import run_with_parts

    checkpoint = prepared.checkpoint
    latents: list[NDArray[Any]] = []
    files = pipeline_files(checkpoint, plan)
    made = run_with_parts(checkpoint.model, files, plan.shapes, plan.parts, runner, sampling, latents.append)
    return Sampled(tuple(latents), made.image)


def reference_runs(
    prepared: Prepared, plan: Plan, pairs: Sequence[tuple[str, int]], steps: int, progress: Progress,
    stage: str = "sample",
) -> Mapping[tuple[str, int], Sampled]:  # fmt: skip
    """diffusers' own images in float32, from the store or made now; its pipeline is opened once, and only if needed."""
    import numpy as np

    checkpoint, cache = prepared.checkpoint, prepared.cache
    opened: list[Any] = []
    found: dict[tuple[str, int], Sampled] = {}
    for prompt, seed in pairs:

        def produce(folder: Path, prompt: str = prompt, seed: int = seed) -> tuple[dict[str, Path], dict[str, Any]]:
            from fluxkiln.verify.pipeline import weights_in_place

            if not opened:
                opened.append(_open_reference(checkpoint, plan))
            latents: list[NDArray[Any]] = []
            with weights_in_place():
                sampling = Sampling(steps, seed, prompt)
                made = checkpoint.model.render(opened[0], plan.shapes, sampling, latents.append)
            np.savez(folder / "run.npz", image=made.image, latents=np.stack(latents))
            return {"run.npz": folder / "run.npz"}, {}

        result = run_action(cache, _reference_action(prepared, plan.shapes, Sampling(steps, seed, prompt)), produce)
        with np.load(cache.path(result.outputs["run.npz"]), allow_pickle=False) as arrays:
            found[prompt, seed] = Sampled(tuple(arrays["latents"]), arrays["image"])
        progress.done(stage, f"reference, seed {seed}: {_shown(prompt)}", "from the store" if result.hit else "made")
    return found


def _reference_action(prepared: Prepared, shapes: Shapes, sampling: Sampling) -> Action:
    checkpoint = prepared.checkpoint
    return Action(
        stage="sample",
        what=f"reference image, seed {sampling.seed}",
        code_version=code_version(reference_runs, model=type(checkpoint.model)),
        inputs={"checkpoint": digest_json({name: dict(tensors) for name, tensors in checkpoint.digests.items()})},
        settings={
            "configs": digest_json(checkpoint.configs),
            "shapes": [shapes.height, shapes.width, shapes.tokens],
            "steps": sampling.steps,
            "seed": sampling.seed,
            "prompt": sampling.prompt,
            "vae": prepared.settings.vae,
        },
        tools={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    )


def _open_reference(checkpoint: Checkpoint, plan: Plan) -> Any:
    with quiet():
        from fluxkiln.verify.pipeline import open_pipeline

        return open_pipeline(checkpoint, {part.component: part.folder for part in plan.parts})


def _shown(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else prompt[:37] + "..."
