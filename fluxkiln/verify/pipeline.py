"""A whole pipeline on parts: diffusers' own loop and scheduler, with a part runner in place of the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fluxkiln.patches.model import Model
from fluxkiln.patches.pipeline import OnLatents, PartChain, PipelineFiles, Rendering, Sampling, quiet
from fluxkiln.types import Part, PartRunner, Shapes, check_steps


@dataclass(frozen=True, slots=True)
class PipelineResult(Rendering):
    """A rendering by parts. `seconds_by_kind` and `calls_by_kind` are sums over all parts of a kind and all steps."""

    seconds_by_kind: Mapping[str, float]
    calls_by_kind: Mapping[str, int]


def run_with_parts(
    model: Model,
    files: PipelineFiles,
    shapes: Shapes,
    parts: tuple[Part, ...],
    run_part: PartRunner,
    sampling: Sampling | None = None,
    on_latents: OnLatents | None = None,
) -> PipelineResult:
    """Make an image with `run_part` in place of the torch models, which are not loaded.

    Args:
        shapes: the shapes the parts were made for.
        parts: all parts in the order they run; which VAE and which form of the transformer is meant is seen from them.
            Of the hoisted form, the parts that take all steps at once run before the first step.
        on_latents: called after each denoising step.

    Raises:
        ShapeError: the host constants were made for other shapes. UsageError: too many steps for the hoisted form.
        Whatever `run_part` raises.
    """
    sampling = sampling or Sampling()
    check_steps(parts, sampling.steps)
    chain = PartChain(parts, run_part)
    with quiet():
        model.check_constants(files.constants, shapes)
        pipe = model.build_pipeline(files, chain)
    made = model.render(pipe, shapes, sampling, on_latents)
    fields = (made.latents, made.image, made.prompt_embeds, made.pooled_prompt_embeds, made.seconds)
    return PipelineResult(*fields, dict(chain.seconds), dict(chain.calls))
