"""Blocks of wide-dev in four bits, by method: what they add, with weights as by default and as FLUX.1's outliers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from bench.figure import WORK, Figure
from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate
from fluxkiln.build.make import prepare
from fluxkiln.build.quantization import find_layers
from fluxkiln.build.slots import Block, Trials, open_trials
from fluxkiln.patches.model import block_kinds
from fluxkiln.progress import Silent
from fluxkiln.quantize.recipes import Stacks
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import DEFAULT_STATISTICS, Settings, read_prompts

METHODS = ("rtn", "ls", "gptq", "awq", "svd")
PROMPTS, STEPS, SEED = 2, 2, 1000
COMPONENTS = ("text_encoder", "text_encoder_2", "transformer")


def measure() -> Figure:
    columns: dict[str, list[str]] = {}
    for statistics in (DEFAULT_STATISTICS, "flux"):
        settings = Settings(
            "cpu", "wide-dev", statistics=statistics, components=COMPONENTS, steps=STEPS, build_dir=WORK
        )
        prompts = read_prompts(DEFAULT_PROMPTS)[:PROMPTS]
        calibrate(replace(settings, seed=SEED), prompts)
        prepared = prepare(settings)
        model = prepared.checkpoint.model
        layers = [layer.name for layer in find_layers(prepared.checkpoint) if layer.component == "transformer"]
        trials = open_trials(prepared, layers, Stacks(block_kinds(model), model.kinds), Silent())
        for kind, parts in trials.blocks.items():
            plain, without = zip(*(_errors(trials, parts[0], method) for method in METHODS), strict=True)
            columns[f"{kind}, {statistics}"] = [f"{error:.4f}" for error in plain]
            if statistics != DEFAULT_STATISTICS:
                columns[f"{kind}, {statistics}, two channels left out"] = [f"{error:.4f}" for error in without]
    return Figure(
        "Blocks of wide-dev in four bits, with weights of two statistics",
        ("W4BF16", *columns),
        tuple((method, *(values[row] for values in columns.values())) for row, method in enumerate(METHODS)),
        (
            "Relative L2 of what a block adds: weights as the scheme stores them against weights in bfloat16, both in "
            "float32 arithmetic, on the recorded inputs of diffusers; root mean square over outputs and steps. "
            f"Calibrated with {PROMPTS} prompts of {STEPS} steps. The two channels are those that are massive in the "
            "stream: what is added to them comes from biases, which are not in codes.",
        ),
    )


def _errors(trials: Trials, part: Any, method: str) -> tuple[float, float]:
    """Of all channels, and of all but the two in which most is added."""
    block = Block(trials, part, parse_scheme(f"W4BF16-{method}"))
    added = [made - given for made, given in _changes(block, block.expected)]
    coded = [made - given for made, given in _changes(block, block.run(trials.slots[part.kind]))]
    sizes = sum(np.square(one).sum((0, 1)) for one in added)
    rest = np.argsort(sizes)[:-2]
    return _rms(added, coded, lambda one: one), _rms(added, coded, lambda one: one[..., rest])


def _changes(block: Block, outputs: list[dict[str, Any]]) -> list[tuple[Any, Any]]:
    """Every output of every step, and the input that it is added to."""
    residual = dict(block.part.traits.residual)
    inputs = [block.recording.inputs(block.part.name, step) for step in range(len(outputs))]
    return [
        (values, given[residual[name]])
        for made, given in zip(outputs, inputs, strict=True)
        for name, values in made.items()
    ]


def _rms(added: list[Any], coded: list[Any], cut: Callable[[Any], Any]) -> float:
    squares = [
        np.square(cut(two) - cut(one)).sum() / np.square(cut(one)).sum() for one, two in zip(added, coded, strict=True)
    ]
    return float(np.sqrt(np.mean(squares)))
