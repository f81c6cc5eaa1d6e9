"""What blocks add, by scheme: of wide-dev, as drawn by default and with the outliers of FLUX.1, and of scenes-dev."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from bench.figure import WORK, Figure
from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate
from fluxkiln.build.make import prepare
from fluxkiln.build.verification import record
from fluxkiln.compile.rungs import dequantized_rung, onnxruntime_rung
from fluxkiln.scenes.grammar import scenes
from fluxkiln.settings import DEFAULT_STATISTICS, Settings, read_prompts
from fluxkiln.types import Part, PartRunner
from fluxkiln.verify.reference import Recording

MODELS = (("wide-dev", DEFAULT_STATISTICS), ("wide-dev", "flux"), ("scenes-dev", DEFAULT_STATISTICS))
SCHEMES = ("W8BF16", "W4BF16-rtn", "W4BF16", "W4BF16-gptq", "W8A8")
PROMPTS, STEPS, SEED = 4, 4, 1000
COMPONENTS = ("text_encoder", "text_encoder_2", "transformer")


def measure() -> Figure:
    columns: dict[str, list[str]] = {}
    for model, statistics in MODELS:
        prompts = read_prompts(DEFAULT_PROMPTS)[:PROMPTS]
        captions = tuple(prompt.text for _, prompt in islice(scenes(1), PROMPTS + 1))
        settings = Settings("bm1684x", model, statistics=statistics, components=COMPONENTS, build_dir=WORK)
        if model == "scenes-dev":  # of captions that it was trained on
            prompts, settings = captions[1:], replace(settings, prompt=captions[0])
        calibrate(replace(settings, seed=SEED, steps=STEPS), prompts)
        label = model if statistics == DEFAULT_STATISTICS else f"{model}, {statistics}"
        for kind, errors in block_errors(settings).items():
            columns[f"{kind}, {label}"] = [f"{error:.4f}" for error in errors]
    return Figure(
        "Blocks by scheme",
        ("scheme", *columns),
        tuple((scheme, *(values[row] for values in columns.values())) for row, scheme in enumerate(SCHEMES)),
        (
            "Relative L2 of what a block adds: the rung `dequantized` against the checkpoint's weights in float32, on "
            "the recorded inputs of diffusers; root mean square over blocks, outputs and steps. W8A8 rounds inputs as "
            f"well. Calibrated with {PROMPTS} prompts of {STEPS} steps, none of which is measured.",
        ),
    )


def block_errors(settings: Settings) -> dict[str, list[float]]:
    """Kind of block -> its error in each of SCHEMES."""
    prepared = prepare(settings)
    context, recording = (prepared.checkpoint, prepared.cache), record(prepared)
    squares: dict[str, list[list[float]]] = {}
    for part in (part for part in prepared.plan.parts if part.traits.is_block and part.component == "transformer"):
        exact = added(recording, part, onnxruntime_rung(context[0], prepared.plan, context[1]))
        found = squares.setdefault(part.kind, [[] for _ in SCHEMES])
        for scheme, errors in zip(SCHEMES, found, strict=True):
            plan = prepare(replace(settings, scheme=scheme)).plan
            stored = added(recording, part, dequantized_rung(context[0], plan, context[1]))
            errors.append(root_mean_square(exact, stored) ** 2)
    return {kind: [float(np.sqrt(np.mean(one))) for one in found] for kind, found in squares.items()}


def added(recording: Recording, part: Part, run: PartRunner) -> list[Any]:
    """What is added to every residual stream at every step, [1, L, D]."""
    found, residual = [], dict(part.traits.residual)
    for step in range(len(recording.calls[part.name])):
        inputs = recording.inputs(part.name, step)
        made = run(part.name, inputs)
        found += [made[name] - inputs[stream] for name, stream in residual.items()]
    return found


def root_mean_square(exact: list[Any], stored: list[Any]) -> float:
    """Relative error of what is added, over all of it."""
    squares = [np.square(two - one).sum() / np.square(one).sum() for one, two in zip(exact, stored, strict=True)]
    return float(np.sqrt(np.mean(squares)))
