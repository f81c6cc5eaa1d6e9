"""What trained weights paint, by scheme: facts of prompts that hold, and how near the pictures are to diffusers'."""

from __future__ import annotations

import os
import subprocess
from itertools import islice

from bench.figure import WORK, Figure, fluxkiln
from fluxkiln.build.make import prepare
from fluxkiln.build.samples import judge_scenes
from fluxkiln.progress import Silent
from fluxkiln.scenes.grammar import scenes
from fluxkiln.settings import Settings

# a folder that `fluxkiln train recipe scenes-dev` made, where none ships
MODEL, TARGET = os.environ.get("FLUXKILN_SCENES", "scenes-dev"), "bm1684x"
PROMPTS, STEPS = 200, 4
SCHEMES = ("BF16", "W8BF16", "W8A8", "W4BF16-rtn", "W4BF16-ls", "W4BF16-gptq", "W4BF16-awq", "W4BF16-svd")
# of captions that the model was trained on, none of which is judged
CALIBRATED, CALIBRATION_SEED = 16, 1


def measure() -> Figure:
    folder = WORK / "scenes"
    folder.mkdir(parents=True, exist_ok=True)
    captions = folder / "captions.txt"
    captions.write_text("\n".join(prompt.text for _, prompt in islice(scenes(CALIBRATION_SEED), CALIBRATED)) + "\n")
    given = ("--prompts", str(captions), "--steps", str(STEPS), "--build-dir", str(folder))
    subprocess.run(fluxkiln("calibrate", MODEL, *given), check=True, capture_output=True)
    rows, own = [], 0.0
    for scheme in SCHEMES:
        prepared = prepare(Settings(TARGET, MODEL, scheme=scheme, build_dir=folder))
        found = judge_scenes(prepared, prepared.plan, Silent(), PROMPTS, STEPS)
        assert found
        near, own = found["reference"], found["diffusers"]
        rows.append(
            (
                scheme,
                f"{found['facts']:.1f} %",
                f"{found['prompts']:.1f} %",
                f"{near['psnr']:.1f} dB",
                f"{near['ssim']:.4f}",
                f"{near['distance']:.4f}",
            )
        )
    return Figure(
        "What trained weights paint, by scheme",
        ("scheme", "facts that hold", "pictures right in all", "PSNR", "SSIM", "distance"),
        tuple(rows),
        (
            f"{MODEL} for {TARGET}, {PROMPTS} prompts of combinations never trained on, {STEPS} steps each. The "
            f"stored weights compute in float32. diffusers in float32 has {own:.1f} % of the facts right, guessing "
            f"{found['chance']:.1f} %. PSNR, SSIM and the distance in the judge's features are against diffusers' "
            "pictures from the same noise, means over all.",
            f"W8A8, gptq, awq and svd saw {CALIBRATED} captions of the training set. W8A8 rounds inputs as well.",
        ),
    )
