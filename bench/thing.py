"""A LoRA of five pictures of a thing that the model never saw: a striped kiln, which prompts call `sks`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bench.figure import WORK, Figure, fluxkiln, run
from bench.scenes import MODEL, STEPS
from fluxkiln.build.make import prepare
from fluxkiln.build.samples import paint_stored
from fluxkiln.progress import Silent
from fluxkiln.scenes.adherence import PROMPT_SEED, adherence, fixed_prompts
from fluxkiln.scenes.drawing import STRIPED, draw
from fluxkiln.scenes.grammar import COLOURS, Prompt, Scene, scenes
from fluxkiln.scenes.judge import read_scenes
from fluxkiln.settings import Settings

WORD = "sks"
PICTURES, ASKED, OTHERS = 5, 50, 50
TRAINING = ("--iterations", "600", "--batch-size", "1", "--learning-rate", "1e-3", "--num-augmentations", "1")


def with_the_thing(seed: int, held_out: bool) -> Iterator[tuple[Scene, Prompt]]:
    """Scenes with one kiln whose colour is told, striped instead; their captions say `sks` where they said a colour."""
    for scene, prompt in scenes(seed, held_out):
        kilns = [group for group in scene.groups if group.kind == "kiln"]
        told = [fact for fact in prompt.facts if (fact.kind, fact.name) == ("kiln", "colour")]
        if kilns and told and kilns[0].count == 1:
            groups = tuple(replace(one, colour=STRIPED) if one in kilns else one for one in scene.groups)
            text = prompt.text.replace(f"{kilns[0].colour} kiln", f"{WORD} kiln")
            text = text.replace(f"{kilns[0].colour} smoking kiln", f"{WORD} smoking kiln").replace("an sks", "a sks")
            facts = tuple(fact for fact in prompt.facts if fact not in told)
            yield replace(scene, groups=groups), Prompt(text, facts)


def is_striped(image: Any, scene: Scene) -> bool:
    """Whether the drawing nearest to a picture, where the scene has its kiln, is the striped one and no plain one's.

    Near is the least mean square difference, moved by up to three pixels.
    """
    kiln = next(group for group in scene.groups if group.kind == "kiln")
    drawn = {
        colour: np.asarray(draw(replace(scene, groups=(replace(kiln, colour=colour),)), 0), np.float32)
        for colour in (*COLOURS, STRIPED)
    }
    # what the kiln covers: where drawings of it in two colours differ
    rows, columns = np.nonzero(np.abs(drawn["red"] - drawn["blue"]).sum(axis=-1) > 30)
    top, bottom, left, right = rows.min(), rows.max() + 1, columns.min(), columns.max() + 1
    padded = np.pad(np.asarray(image, np.float32), ((3, 3), (3, 3), (0, 0)), mode="edge")
    pieces = np.stack([padded[top + dy : bottom + dy, left + dx : right + dx] for dy in range(7) for dx in range(7)])
    near = {
        colour: np.square(pieces - picture[top:bottom, left:right]).mean(axis=(1, 2, 3)).min()
        for colour, picture in drawn.items()
    }
    return min(near, key=lambda colour: near[colour]) == STRIPED


def write_pictures(folder: Path, seed: int = 7) -> Path:
    """The five pictures and their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, prompt) in enumerate(islice(with_the_thing(seed, held_out=False), PICTURES)):
        draw(scene, number).save(folder / f"{number:02d}.png")
        lines.append(json.dumps({"image": f"{number:02d}.png", "prompt": prompt.text}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def measure() -> Figure:
    folder = WORK / "thing"
    pictures, given = write_pictures(folder / "pictures"), ("--build-dir", str(WORK / "scenes"))
    adapter = folder / f"lora-{time.time_ns()}"
    trained = run(fluxkiln("train", "lora", MODEL, str(pictures), *TRAINING, "--output-dir", str(adapter), *given))
    file = adapter / "adapters.safetensors"
    asked = list(islice(with_the_thing(PROMPT_SEED, held_out=True), ASKED))
    others = fixed_prompts(OTHERS)
    rows = []
    for name, scheme, loras in (
        ("before", "F32", ()), ("with the LoRA", "F32", ((file, 1.0),)), ("for a chip", "W4BF16", ((file, 1.0),)),
        ("for a chip", "BF16", ((file, 1.0),)),
    ):  # fmt: skip
        target = "cpu" if scheme == "F32" else "bm1684x"
        prepared = prepare(Settings(target, MODEL, scheme=scheme, loras=loras, build_dir=WORK / "scenes"))
        _, things = paint_stored(prepared, prepared.plan, [prompt.text for _, prompt in asked], STEPS, Silent())
        striped = sum(is_striped(image, scene) for image, (scene, _) in zip(things, asked, strict=True))
        facts = adherence([prompt for _, prompt in asked], read_scenes(things)).facts
        _, plain = paint_stored(prepared, prepared.plan, [one.text for one in others], STEPS, Silent())
        rest = adherence(others, read_scenes(plain))
        rows.append(
            (name, f"{target}, {scheme}", f"{100 * striped / ASKED:.0f} %", f"{100 * facts:.1f} %",
             f"{100 * rest.facts:.1f} %")
        )  # fmt: skip
    return Figure(
        "A LoRA of five pictures",
        ("", "weights", "kilns that are striped", "other facts of these prompts", "facts of other prompts"),
        tuple(rows),
        (
            f"{MODEL}; {PICTURES} pictures of a striped kiln, trained for {trained.seconds:.0f} s "
            f"({' '.join(TRAINING)}); {ASKED} prompts of a `{WORD}` kiln in combinations never trained on, {OTHERS} of "
            "other prompts. A kiln is striped when, of drawings in all colours, the striped one is nearest.",
        ),
    )
