"""Several images by the reference and by parts, held against one another: step by step, and over all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import UsageError
from fluxkiln.verify.metrics import compare, compare_images
from fluxkiln.verify.report.page import encode_picture

if TYPE_CHECKING:
    from numpy.typing import NDArray

# runs at once: more are a benchmark, not a check
MOST_RUNS = 256
# pictures in a report; of more runs the worst are shown
MOST_SHOWN = 24
THUMBNAIL = 160


@dataclass(frozen=True, slots=True)
class Sampled:
    """One run: packed latents [1, S, 4C] after every step, and the image [height, width, 3] in 0..1; float32."""

    latents: tuple[NDArray[Any], ...]
    image: NDArray[Any]


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one prompt and seed by parts, against the reference.

    Attributes:
        drift: relative L2 of the latents after every step; the noise both start from is the same.
        cosine: of the last latents. psnr, ssim: of the image, in dB and 0..1.
    """

    prompt: str
    seed: int
    drift: tuple[float, ...]
    cosine: float
    psnr: float
    ssim: float


def list_runs(prompts: Sequence[str], seeds: Sequence[int], prompt: str, seed: int) -> tuple[tuple[str, int], ...]:
    """Every prompt with every seed, in this order; none where neither prompts nor seeds are asked for.

    Args:
        prompt, seed: stand in for the list that is empty.

    Raises UsageError: too many.
    """
    if not prompts and not seeds:
        return ()
    pairs = tuple((one, number) for one in (prompts or (prompt,)) for number in (seeds or (seed,)))
    if len(pairs) > MOST_RUNS:
        raise UsageError(
            f"{len(prompts or (prompt,))} prompts with {len(seeds or (seed,))} seeds are {len(pairs)} images; a build "
            f"compares at most {MOST_RUNS}: give fewer prompts or seeds"
        )
    return pairs


def measure_run(prompt: str, seed: int, reference: Sampled, actual: Sampled) -> Run:
    """Compare a run with the reference's. ParityError: shapes differ."""
    steps = [compare(a, e) for a, e in zip(actual.latents, reference.latents, strict=True)]
    image = compare_images(actual.image, reference.image)
    assert image.psnr is not None
    assert image.ssim is not None
    drift = tuple(step.relative_l2 for step in steps)
    return Run(prompt, seed, drift, steps[-1].cosine, image.psnr, image.ssim)


def summarise_runs(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Mean and worst of every measure over all runs, and which run is the worst."""
    measures: tuple[tuple[str, str, Callable[[Run], float], bool], ...] = (
        ("PSNR of the image", "dB", lambda run: run.psnr, True),
        ("SSIM of the image", "", lambda run: run.ssim, True),
        ("drift of the latents after the first step, relative L2", "", lambda run: run.drift[0], False),
        ("drift of the latents after the last step, relative L2", "", lambda run: run.drift[-1], False),
        ("cosine of the last latents", "", lambda run: run.cosine, True),
    )
    lines = []
    for name, unit, value_of, higher_is_better in measures:
        values = [value_of(run) for run in runs]
        # NaN is worse than anything.
        badness = [math.inf if math.isnan(one) else -one if higher_is_better else one for one in values]
        place = badness.index(max(badness))
        lines.append(
            {
                "name": name,
                "unit": unit,
                "mean": math.fsum(values) / len(values) if all(map(math.isfinite, values)) else sum(values),
                "worst": values[place],
                "where": f"{runs[place].prompt}, seed {runs[place].seed}",
            }
        )
    return lines


def describe_runs(
    runs: Sequence[Run], pictures: Mapping[tuple[str, int], tuple[NDArray[Any], NDArray[Any]]], rung: str
) -> dict[str, Any]:
    """The `runs` of a report: entries, statistics, and small pictures of as many as are shown.

    Args:
        pictures: (prompt, seed) -> the reference's image and the parts', [height, width, 3] in 0..1.
    """
    shown = {(run.prompt, run.seed) for run in sorted(runs, key=lambda run: run.psnr)[:MOST_SHOWN]}
    entries = []
    for run in runs:
        entry: dict[str, Any] = asdict(run)
        if (run.prompt, run.seed) in shown:
            reference, actual = pictures[run.prompt, run.seed]
            entry |= {"reference": thumbnail(reference), "actual": thumbnail(actual)}
        entries.append(entry)
    return {"rung": rung, "steps": len(runs[0].drift), "entries": entries, "statistics": summarise_runs(runs)}


def thumbnail(image: NDArray[Any]) -> str:
    """A picture [height, width, 3] in 0..1, THUMBNAIL pixels at most, as a data URI."""
    import numpy as np
    from PIL import Image

    picture = Image.fromarray((np.nan_to_num(image).clip(0.0, 1.0) * 255.0).round().astype(np.uint8))
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return encode_picture(picture, "webp", quality=70)
