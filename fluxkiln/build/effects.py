"""What a scheme does to the whole pipeline: latents and images, against the same pipeline with BF16 weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fluxkiln.build.context import prepare
from fluxkiln.build.verification import is_complete, run_pipeline
from fluxkiln.compile.rungs import dequantized_rung
from fluxkiln.compile.weights import check_methods
from fluxkiln.errors import UsageError
from fluxkiln.progress import Progress, Silent
from fluxkiln.settings import Settings

# weights stored in the type that the others compute in: what is left is their rounding
REFERENCE = "BF16"
STEPS = (2, 8)


@dataclass(frozen=True, slots=True)
class Effect:
    """One scheme after some denoising steps: final latents and the image, compared with REFERENCE's."""

    scheme: str
    steps: int
    latents_relative_l2: float
    latents_cosine: float
    psnr: float
    ssim: float

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {name: getattr(self, name) for name in self.__slots__}


def measure_effects(
    settings: Settings, schemes: Sequence[str], steps: Sequence[int] = STEPS, progress: Progress | None = None
) -> list[Effect]:
    """Run diffusers' own loop with every part in float32 arithmetic and its weights as each scheme stores them.

    Args:
        settings: of a build with all components.

    Raises:
        UsageError: not all components are built. SchemeError: a method without its calibration.
    """
    from fluxkiln.verify.metrics import compare, compare_images

    progress = progress or Silent()
    progress.stage("pipeline", len(steps) * (len(schemes) + 1))
    prepared = {}
    for scheme in (REFERENCE, *schemes):
        one = prepared[scheme] = prepare(replace(settings, scheme=scheme))
        checkpoint, plan, cache = one.checkpoint, one.plan, one.cache
        if not is_complete(checkpoint, plan):
            raise UsageError("the effect on the whole pipeline needs all components; leave --components out")
        check_methods(checkpoint, plan, cache)
    effects = []
    for count in steps:
        made = {}
        for scheme, one in prepared.items():
            checkpoint, plan, cache = one.checkpoint, one.plan, one.cache
            runner = dequantized_rung(checkpoint, plan, cache, threads=0)
            made[scheme] = run_pipeline(checkpoint, plan, replace(settings, scheme=scheme, steps=count), runner)
            progress.done("pipeline", scheme, f"{count} steps")
        base = made[REFERENCE]
        for scheme in schemes:
            result = made[scheme]
            latents = compare(result.latents, base.latents)
            image = compare_images(result.image, base.image)
            assert image.psnr is not None
            assert image.ssim is not None
            effects.append(Effect(scheme, count, latents.relative_l2, latents.cosine, image.psnr, image.ssim))
    return effects
