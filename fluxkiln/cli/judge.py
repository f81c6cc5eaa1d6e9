"""`fluxkiln judge`: whether the pictures of a model or a bundle show what their prompts say."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxkiln.cli.bundle import bundle_folder
from fluxkiln.cli.generate import SEED, peak_bytes
from fluxkiln.cli.options import PATH, BundleCommand, build_dir_option
from fluxkiln.cli.output import Output, json_option, open_progress, path_text, seconds_text
from fluxkiln.errors import UsageError
from fluxkiln.settings import MOST_COUNT

if TYPE_CHECKING:
    from fluxkiln.generate.painter import Request
    from fluxkiln.progress import Progress

MOST_PROMPTS = 2000


@click.command(cls=BundleCommand)
@click.argument("subject", metavar="BUNDLE|MODEL")
@click.option("--prompts", type=int, metavar="N", default=200, help="The first N of the fixed prompts. Default: 200.")
@click.option(
    "--steps", type=click.IntRange(1, MOST_COUNT), metavar="N", help="Denoising steps. Default: the model's own."
)
@click.option("--guidance", type=float, metavar="X", help="Guidance scale, dev only. Default: 3.5.")
@click.option("--seed", type=SEED, metavar="N", default=0, help="Of the first image; the others follow. Default: 0.")
@click.option("--against", metavar="MODEL", help="Compare each picture with diffusers' own of this model as well.")
@click.option("--executor", metavar="NAME", help="What runs a bundle's parts, see below. Default: by the bundle.")
@click.option("--out", type=PATH, metavar="DIR", help="Write the pictures there, and the prompts with what is wrong.")
@build_dir_option
@json_option
@click.pass_obj
def judge_command(
    output: Output,
    /,
    subject: str,
    prompts: int,
    steps: int | None,
    guidance: float | None,
    seed: int,
    against: str | None,
    executor: str | None,
    out: Path | None,
    build_dir: Path,
) -> None:
    """Paint fixed prompts and say how many of the facts that they state hold in the pictures.

    For models that paint drawn scenes, as scenes-dev. The prompts are of combinations that no recipe trains on. A
    network that learned from drawings reads the pictures. MODEL, a preset, folder or Hugging Face id, is run by
    diffusers in float32; a bundle by its parts.
    """
    if not 1 <= prompts <= MOST_PROMPTS:
        raise UsageError(f"--prompts {prompts}: give from 1 to {MOST_PROMPTS}")
    if guidance is not None and not 0 <= guidance <= 100:  # NaN is in no range
        raise UsageError(f"--guidance {guidance}: it must be from 0 to 100, 3.5 is the usual one")
    from fluxkiln.generate.pictures import requests_for
    from fluxkiln.scenes.adherence import fixed_prompts, judge_images

    asked = fixed_prompts(prompts)
    requests = requests_for(asked, steps, guidance, seed)
    started = time.perf_counter()
    with open_progress() as progress:
        images, facts = _images(subject, requests, executor, build_dir, progress)
        reference = _images(against, requests, None, build_dir, progress)[0] if against else ()
        seconds = time.perf_counter() - started
        found = judge_images(asked, images, reference)
    if out:
        _write(out, [prompt.text for prompt in asked], images)
        facts["pictures"] = str(out)
    output.document({**facts, **found, "seconds": round(seconds, 3), "peak_memory": peak_bytes()})
    output.line(f"{found['facts']:.1f} % of {found['stated']} facts hold, in {found['images']} pictures")
    output.line(f"{found['prompts']:.1f} % of the pictures are right in every fact")
    output.line(f"{found['chance']:.1f} % of the facts hold in the picture of another prompt, which is chance")
    if wrong := found["wrong"]:
        output.line("wrong most often: " + ", ".join(f"{name} {count}" for name, count in list(wrong.items())[:4]))
    if "reference" in found:
        near = found["reference"]
        measured = f"PSNR {near['psnr']:.1f} dB, SSIM {near['ssim']:.3f}, distance {near['distance']:.4f}"
        output.line(f"from diffusers' pictures of {against}: {measured}")
    output.line(f"{seconds_text(seconds)}{f', pictures in {path_text(out)}' if out else ''}")


def _images(
    subject: str, requests: Sequence[Request], executor: str | None, build_dir: Path, progress: Progress
) -> tuple[list[Any], dict[str, Any]]:
    """Pictures of a bundle where `subject` is one, else of a model."""
    from fluxkiln.compile.opener import open_bundle
    from fluxkiln.compile.toolchain import open_executor
    from fluxkiln.export.source import resolve_model
    from fluxkiln.generate.painter import Painter, check_request
    from fluxkiln.generate.pictures import paint_with_diffusers, paint_with_parts

    folder = bundle_folder(Path(subject))
    if (folder / "manifest.json").is_file():
        bundle = open_bundle(folder, progress, whole=True)
        bundle = bundle.at(bundle.shapes)
        for request in requests[:1]:
            check_request(bundle, request)
        with Painter(bundle, open_executor(bundle, executor)) as painter:
            images = list(paint_with_parts(painter, requests, progress))
            return images, {"bundle": str(folder), "digest": bundle.digest, "executor": dict(painter.executor.facts)}
    if executor:
        raise UsageError(f"--executor {executor}: {subject} is no bundle, and diffusers runs a model; leave it out")
    root = resolve_model(subject, build_dir / "models")
    return list(paint_with_diffusers(root, _shapes(subject), requests, progress)), {"model": str(root)}


def _shapes(subject: str) -> Any:
    """The size that a preset is built at; that of the drawings for other models."""
    from fluxkiln.patches.registry import all_presets
    from fluxkiln.scenes.drawing import SIDE
    from fluxkiln.types import Shapes

    _, preset = all_presets().get(subject, (None, None))
    width, height = preset.size if preset else (SIDE, SIDE)
    return Shapes(height, width, preset.tokens if preset else 24)


def _write(out: Path, prompts: Sequence[str], images: Sequence[Any]) -> None:
    from PIL import Image

    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(out / f"{number:03d}.png")
    (out / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
