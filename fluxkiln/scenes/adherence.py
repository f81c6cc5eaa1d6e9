"""Adherence: how many of the facts that prompts state hold in the pictures made of them, and how near pictures are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from fluxkiln.scenes.grammar import Prompt, Scene, holds, scenes
from fluxkiln.scenes.judge import distance, read_scenes

if TYPE_CHECKING:
    from numpy.typing import NDArray

PROMPTS, PROMPT_SEED = 200, 2_000_003


def fixed_prompts(count: int = PROMPTS) -> list[Prompt]:
    """The fixed set of prompts, of combinations that no recipe trains on."""
    return [prompt for _, prompt in islice(scenes(PROMPT_SEED, held_out=True), count)]


@dataclass(frozen=True)
class Adherence:
    """How pictures follow their prompts.

    Attributes:
        facts: share of the stated facts that hold in the picture.
        prompts: share of the prompts all of whose facts hold.
        chance: share of the facts that hold in the picture of the next prompt: what guessing would get.
        wrong: facts that do not hold, by name, most frequent first.
    """

    facts: float
    prompts: float
    chance: float
    wrong: Mapping[str, int]


def adherence(asked: Sequence[Prompt], seen: Sequence[Scene]) -> Adherence:
    """Compare what was asked for with what is seen, in the same order."""
    wrong: dict[str, int] = {}
    whole = right = lucky = total = 0
    for prompt, scene, other in zip(asked, seen, [*seen[1:], *seen[:1]], strict=True):
        missed = [fact.name for fact in prompt.facts if not holds(fact, scene)]
        whole += not missed
        total += len(prompt.facts)
        right += len(prompt.facts) - len(missed)
        lucky += _count(prompt, other)
        for name in missed:
            wrong[name] = wrong.get(name, 0) + 1
    ordered = dict(sorted(wrong.items(), key=lambda item: -item[1]))
    return Adherence(right / total, whole / len(asked), lucky / total, ordered)


def _count(prompt: Prompt, scene: Scene) -> int:
    return sum(holds(fact, scene) for fact in prompt.facts)


def judge_images(
    asked: Sequence[Prompt], images: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]] = ()
) -> dict[str, Any]:
    """Adherence of images to their prompts in percent and, with a reference, how far they are from its images."""
    found = adherence(asked, read_scenes(images))
    shares = {name: round(100 * getattr(found, name), 2) for name in ("facts", "prompts", "chance")}
    document = {**shares, "stated": sum(len(prompt.facts) for prompt in asked), "images": len(images)}
    document["wrong"] = dict(found.wrong)
    if reference:
        document["reference"] = compare_with_reference(images, reference)
    return document


def compare_with_reference(images: Sequence[NDArray[Any]], reference: Sequence[NDArray[Any]]) -> Mapping[str, float]:
    """Means over pairs of images: PSNR in dB, SSIM, and the judge's feature distance."""
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    pairs = list(zip(images, reference, strict=True))
    # equal pictures have no noise: 100 dB stands for them
    psnr = [100.0 if (a == b).all() else min(100.0, peak_signal_noise_ratio(b, a)) for a, b in pairs]
    ssim = [structural_similarity(b, a, channel_axis=-1) for a, b in pairs]
    seen = [distance(a, b) for a, b in pairs]
    means = {"psnr": sum(psnr), "ssim": sum(ssim), "distance": sum(seen)}
    return {name: round(float(total) / len(pairs), 5) for name, total in means.items()}
