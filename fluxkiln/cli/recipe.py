"""`fluxkiln train recipe`: a trained preset from nothing."""

from __future__ import annotations

import math
import time
from pathlib import Path

import click

from fluxkiln.cli.generate import peak_bytes
from fluxkiln.cli.options import PATH, build_dir_option
from fluxkiln.cli.output import Output, json_option, open_progress, path_text, seconds_text
from fluxkiln.errors import UsageError
from fluxkiln.progress import Progress

JUDGE = "scenes-judge"


@click.command()
@click.argument("name")
@click.argument("destination", metavar="DIR", type=PATH)
@click.option(
    "--threads", type=click.IntRange(0, 1024), metavar="N", default=0,
    help="Other numbers give other roundings. Default: all.",
)  # fmt: skip
@click.option("--teacher", type=PATH, metavar="DIR", help="Of scenes-schnell: the scenes-dev it learns from.")
@build_dir_option
@json_option
@click.pass_obj
def recipe_command(
    output: Output, name: str, destination: Path, threads: int, teacher: Path | None, build_dir: Path
) -> None:
    """Train a small FLUX.1 that paints drawn scenes, from nothing.

    NAME is scenes-dev, scenes-schnell (four steps, learnt from scenes-dev) or scenes-judge, the network that `judge`
    reads pictures with; that one ships with fluxkiln, the two models do not yet. DIR must be empty or not exist. The
    same command goes on where it was stopped.
    """
    from fluxkiln.train.recipes import RECIPES

    if name != JUDGE and name not in RECIPES:
        raise UsageError(f"no recipe is called {name!r}; there are {', '.join([*RECIPES, JUDGE])}")
    if name == JUDGE and teacher:
        raise UsageError(f"--teacher {teacher}: {JUDGE} learns from drawings alone; leave the teacher out")
    if threads < 0:
        raise UsageError(f"--threads {threads}: give 1 or more, or leave it out for all cores")
    import torch

    from fluxkiln.train.recipe import recipe_digest, train_judge, train_recipe

    if threads:
        torch.set_num_threads(threads)
    started, work = time.perf_counter(), build_dir / "recipes"
    with open_progress() as progress:
        shown = _Shown(progress)
        if name == JUDGE:
            destination.mkdir(parents=True, exist_ok=True)
            train_judge(destination / "judge.safetensors", work / JUDGE, shown)
            digest = None
        else:
            digest = recipe_digest(RECIPES[name])
            train_recipe(RECIPES[name], destination, work, shown, teacher)
    seconds = time.perf_counter() - started
    document = {"recipe": name, "digest": digest, "model": str(destination), "seconds": round(seconds, 3)}
    output.document({**document, "threads": torch.get_num_threads(), "peak_memory": peak_bytes()})
    output.line(f"{path_text(destination)}: {name}, trained in {seconds_text(seconds)}")


class _Shown:
    """Shows the steps of each stage as jobs of the progress."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.name, self.shown = progress, "", 0

    def __call__(self, stage: str, done: int, total: int, loss: float, seconds: float) -> None:
        if stage != self.name:
            self.name, self.shown = stage, 0
            self.progress.stage(stage, total)
        how = f"in {1000 * seconds:.0f} ms" + ("" if math.isnan(loss) else f", loss {loss:.4f}")
        for number in range(self.shown + 1, done + 1):
            self.progress.done(stage, f"step {number}", how)
        self.shown = done
