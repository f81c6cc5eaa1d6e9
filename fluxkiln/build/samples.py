"""Parity over whole images: every prompt with every seed, over all steps, by diffusers and by the parts of a build."""

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
from fluxkiln.compile.templates import pipeline_files
from fluxkiln.digests import digest_json
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.pipeline import Sampling, quiet
from fluxkiln.progress import Progress
from fluxkiln.types import PartRunner, Shapes
from fluxkiln.verify.runs import Run, Sampled, describe_runs, list_runs, measure_run

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder


def sample_runs(
    prepared: Prepared, plan: Plan, ladder: Ladder, runner: PartRunner, rung: str, progress: Progress
) -> dict[str, Any] | None:
    """Make the images that the settings ask for and compare them; their last latents and images go to `ladder`.

    Args:
        plan: at the shapes to run at; its parts are those `runner` runs, all components of them.

    Returns:
        The report's `runs`; None where no prompts and no seeds are asked for. UsageError: too many runs.
    """
    from fluxkiln.verify.pipeline import run_with_parts

    checkpoint, settings = prepared.checkpoint, prepared.settings
    pairs = list_runs(settings.prompts, settings.seeds, settings.prompt, settings.seed)
    if not pairs:
        return None
    progress.stage("sample", 2 * len(pairs))
    runs: list[Run] = []
    pictures: dict[tuple[str, int], tuple[NDArray[Any], NDArray[Any]]] = {}
    references = reference_runs(prepared, plan, pairs, progress)
    scheme = next(plan.scheme(part).base_name for part in plan.parts if part.traits.is_block)
    files = pipeline_files(checkpoint, plan)
    for number, (prompt, seed) in enumerate(pairs):
        reference = references[prompt, seed]
        latents: list[NDArray[Any]] = []
        sampling = Sampling(settings.steps, seed, prompt)
        made = run_with_parts(checkpoint.model, files, plan.shapes, plan.parts, runner, sampling, latents.append)
        runs.append(measure_run(prompt, seed, reference, Sampled(tuple(latents), made.image)))
        pictures[prompt, seed] = reference.image, made.image
        name = f"pipeline.{number:02d}"
        ladder.compare(
            name, None, "latents", len(latents) - 1, reference.latents[-1], None, [(rung, latents[-1])], scheme
        )
        ladder.compare(name, None, "image", -1, reference.image, None, [(rung, made.image)], scheme)
        progress.done("sample", f"seed {seed}: {_shown(prompt)}", f"{runs[-1].psnr:.1f} dB, SSIM {runs[-1].ssim:.4f}")
    return {**describe_runs(runs, pictures, rung), "shapes": name_shapes(plan.shapes)}


def reference_runs(
    prepared: Prepared, plan: Plan, pairs: Sequence[tuple[str, int]], progress: Progress
) -> Mapping[tuple[str, int], Sampled]:
    """diffusers' own images in float32, from the store or made now; its pipeline is opened once, and only if needed."""
    import numpy as np

    checkpoint, cache, steps = prepared.checkpoint, prepared.cache, prepared.settings.steps
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

        result = run_action(cache, _reference_action(prepared, plan.shapes, prompt, seed), produce)
        with np.load(cache.path(result.outputs["run.npz"]), allow_pickle=False) as arrays:
            found[prompt, seed] = Sampled(tuple(arrays["latents"]), arrays["image"])
        progress.done("sample", f"reference, seed {seed}: {_shown(prompt)}", "from the store" if result.hit else "made")
    return found


def _reference_action(prepared: Prepared, shapes: Shapes, prompt: str, seed: int) -> Action:
    checkpoint = prepared.checkpoint
    return Action(
        stage="sample",
        what=f"reference image, seed {seed}",
        code_version=code_version(reference_runs, model=type(checkpoint.model)),
        inputs={"checkpoint": digest_json({name: dict(tensors) for name, tensors in checkpoint.digests.items()})},
        settings={
            "configs": digest_json(checkpoint.configs),
            "shapes": [shapes.height, shapes.width, shapes.tokens],
            "steps": prepared.settings.steps,
            "seed": seed,
            "prompt": prompt,
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
