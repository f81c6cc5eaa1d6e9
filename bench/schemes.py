"""Schemes side by side: a step of FLUX.1-dev on a BM1684X, its bytes, what blocks lose, and what images do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from bench.figure import WORK, Figure, gigabytes
from bench.formulations import DOUBLES, SINGLES, estimate
from fluxkiln.build.block_errors import shipped
from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate
from fluxkiln.build.quantization import measure_effects
from fluxkiln.compile.targets.bm1684x import TARGET
from fluxkiln.compile.toolchains.tpu_mlir.environment import default_tpu_mlir_root, find_tpu_mlir
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings, read_prompts

SCHEMES = ("W4BF16", "W4BF16-gptq", "W8BF16", "W8A8", "W8A8-qk", "BF16")
MODELS = {"tiny-dev": (32, 16, 8), "wide-dev": (256, 128, 2)}  # -> side of the image, tokens, prompts calibrated
STEPS, SEED = (2, 8), 1000
UNROUNDED = "BF16"


def measure() -> Figure:
    env = find_tpu_mlir(default_tpu_mlir_root())
    if env is None:
        raise RuntimeError("TPU-MLIR's environment is not there; run make env-tpu-mlir")
    images = {model: dict(_images(model)) for model in MODELS}
    errors: Mapping[str, Mapping[str, float]] = shipped()["errors"]
    rows = []
    for name in SCHEMES:
        single, double = (estimate(env, TARGET, parse_scheme(name), f"{one}_modulated") for one in ("single", "double"))
        step, size = (SINGLES * one + DOUBLES * two for one, two in zip(single, double, strict=True))
        lost = (f"{errors[name][kind]:.4f}" for kind in ("double", "single"))
        found = (images[model].get((name, count), "") for model in MODELS for count in STEPS)
        rows.append((name, f"{step / 1000:.2f} s", gigabytes(size), *lost, *found))
    return Figure(
        "Schemes side by side",
        ("scheme", f"{SINGLES} + {DOUBLES} blocks", "their weights", "a double block loses", "a single block loses",
         *(f"{model}, {count} steps" for model in MODELS for count in STEPS)),
        tuple(rows),
        (
            "A step at 1024x1024, 512 tokens, by the schedule that TPU-MLIR makes of its own code; no board ran. "
            "Modulation is hoisted; head and tail, 4 ms a step, are left out. What a block loses: relative L2 of what "
            f"it adds, {shipped()['model']}. Images: relative L2 of the final latents and PSNR of the image, against "
            f"{UNROUNDED}, weights as stored, calibrated with "
            + ", ".join(f"{count} prompts ({model})" for model, (*_, count) in MODELS.items())
            + " of 4 steps.",
        ),
    )  # fmt: skip


def _images(model: str) -> Iterator[tuple[tuple[str, int], str]]:
    """Scheme and number of steps -> what it does to latents and image."""
    side, tokens, prompts = MODELS[model]
    settings = Settings("bm1684x", model, size=((side, side),), tokens=(tokens,), build_dir=WORK)
    components = ("text_encoder", "text_encoder_2", "transformer")
    calibrate(
        replace(settings, seed=SEED, steps=4, components=components), read_prompts(DEFAULT_PROMPTS)[:prompts]
    )  # fmt: skip
    for one in measure_effects(settings, [name for name in SCHEMES if name != UNROUNDED], STEPS):
        yield (one.scheme, one.steps), f"{one.latents_relative_l2:.4f}, {one.psnr:.1f} dB"
