"""What blocks add, by scheme: of wide-dev, as drawn by default and with the outliers of FLUX.1, and of scenes-dev.

It fills the table that mixtures are chosen by where a checkpoint's own blocks were not measured.
"""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import islice

import numpy as np

from bench.figure import WORK, Figure, conditions
from fluxkiln.build.block_errors import ERRORS, known_errors, measure_errors, step_blocks
from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate
from fluxkiln.build.make import prepare
from fluxkiln.progress import Silent
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.scenes.grammar import scenes
from fluxkiln.settings import DEFAULT_STATISTICS, Settings, read_prompts

MODELS = (("wide-dev", DEFAULT_STATISTICS), ("wide-dev", "flux"), ("scenes-dev", DEFAULT_STATISTICS))
SHIPPED = "wide-dev, flux"
SCHEMES = ("BF16", "W8BF16", "W4BF16-rtn", "W4BF16", "W4BF16-gptq", "W8A8", "W8A8-qk")
PROMPTS, STEPS, SEED = 4, 4, 1000
COMPONENTS = ("text_encoder", "text_encoder_2", "transformer")


def measure() -> Figure:
    before, columns = conditions(), dict[str, list[str]]()
    for model, statistics in MODELS:
        prompts = read_prompts(DEFAULT_PROMPTS)[:PROMPTS]
        captions = tuple(prompt.text for _, prompt in islice(scenes(1), PROMPTS + 1))
        settings = Settings("bm1684x", model, statistics=statistics, components=COMPONENTS, build_dir=WORK)
        if model == "scenes-dev":  # of captions that it was trained on
            prompts, settings = captions[1:], replace(settings, prompt=captions[0])
        calibrate(replace(settings, seed=SEED, steps=STEPS), prompts)
        label = model if statistics == DEFAULT_STATISTICS else f"{model}, {statistics}"
        found = block_errors(settings)
        if label == SHIPPED:
            table = {"command": "python -m bench blocks", "conditions": before, "model": label, "errors": found}
            ERRORS.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
        for kind in found[SCHEMES[0]]:
            columns[f"{kind}, {label}"] = [f"{found[scheme][kind]:.4f}" for scheme in SCHEMES]
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


def block_errors(settings: Settings) -> dict[str, dict[str, float]]:
    """Scheme of SCHEMES -> kind of block -> its error."""
    prepared, schemes = prepare(settings), [parse_scheme(name) for name in SCHEMES]
    measure_errors(prepared, schemes, Silent())
    errors, _ = known_errors(prepared, schemes)
    kinds: dict[str, list[str]] = {}
    for part in step_blocks(prepared.plan):
        kinds.setdefault(part.traits.block, []).append(part.name)
    return {
        scheme.name: {
            kind: round(float(np.sqrt(np.mean([errors[name, scheme] ** 2 for name in names]))), 6)
            for kind, names in kinds.items()
        }
        for scheme in schemes
    }
