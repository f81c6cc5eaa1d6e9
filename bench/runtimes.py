"""Images of wide-dev on this CPU by every runtime: ONNX Runtime, OpenVINO, diffusers eager and by torch.compile."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from bench.figure import WORK, Figure, fluxkiln, gigabytes, ratio, run
from bench.generate import BUNDLE, DIFFUSERS, bf16_instructions
from fluxkiln.export.source import resolve_model

SIZE, TOKENS, STEPS = 256, 128, 8
FLOAT32, BFLOAT16 = "diffusers, float32", "diffusers, bfloat16"
# name -> target, scheme, how it is run
BUNDLES = {
    "ONNX Runtime, BF16": ("cpu", "BF16", ()),
    "ONNX Runtime, W4BF16, fast": ("cpu", "W4BF16", ("fast",)),
    "OpenVINO, BF16": ("openvino", "BF16", ()),
    "OpenVINO, W8BF16": ("openvino", "W8BF16", ()),
    "OpenVINO, W8BF16, fast": ("openvino", "W8BF16", ("fast",)),
    "OpenVINO, W4BF16": ("openvino", "W4BF16", ()),
    "OpenVINO, W4BF16, fast": ("openvino", "W4BF16", ("fast",)),
}
THEIRS = {
    FLOAT32: ("float32",),
    BFLOAT16: ("bfloat16",),
    f"{FLOAT32}, torch.compile": ("float32", "compile"),
    f"{BFLOAT16}, torch.compile": ("bfloat16", "compile"),
}
BASE = "OpenVINO, BF16"


def measure() -> Figure:
    checkpoint = resolve_model("wide-dev", WORK / "models")
    runs: dict[str, tuple[dict[str, Any], int]] = {}
    for name, (target, scheme, how) in BUNDLES.items():
        built = run(
            fluxkiln(
                "build", target, "--model", "wide-dev", "--size", f"{SIZE}x{SIZE}", "--tokens", str(TOKENS), "--scheme",
                scheme, "--no-verify", "--build-dir", str(WORK), "--json",
            )
        )  # fmt: skip
        made = run([sys.executable, "-c", BUNDLE, built.document()["bundle"], str(STEPS), *how])
        runs[name] = made.document(), made.peak_bytes
    for name, (dtype, *compiled) in THEIRS.items():
        words = [str(checkpoint), str(STEPS), dtype, str(SIZE), str(TOKENS), *compiled]
        made = run([sys.executable, "-c", DIFFUSERS, *words])
        runs[name] = made.document(), made.peak_bytes
    base = _latents(runs[BASE][0])
    rows = tuple(
        (
            name,
            f"{found['load']:.1f} s",
            f"{sorted(found['steps'])[len(found['steps']) // 2]:.2f} s",
            f"{found['seconds']:.1f} s",
            f"{found['cpu']:.1f} s",
            gigabytes(memory),
            *(ratio(found["seconds"], runs[other][0]["seconds"]) for other in (FLOAT32, BFLOAT16)),
            *(ratio(memory, runs[other][1]) for other in (FLOAT32, BFLOAT16)),
            f"{np.linalg.norm(_latents(found) - base) / np.linalg.norm(base):.4f}" if "latents" in found else "",
        )
        for name, (found, memory) in runs.items()
    )
    return Figure(
        f"wide-dev on every runtime of this CPU, {SIZE}x{SIZE}, {TOKENS} tokens, {STEPS} steps",
        (
            "",
            "loading",
            "a step",
            "image",
            "CPU time",
            "peak memory",
            f"time of {FLOAT32}",
            f"time of {BFLOAT16}",
            f"memory of {FLOAT32}",
            f"memory of {BFLOAT16}",
            f"latents from those of {BASE}",
        ),
        rows,
        (
            "From prompt to pixels, loading, compiling and imports apart; memory counts mapped weights. torch.compile "
            "is diffusers' `compile_repeated_blocks`.",
            f"bfloat16 instructions of this CPU: {', '.join(bf16_instructions()) or 'none'}. "
            + "; ".join(f"{name}: {found['facts']['device']}" for name, (found, _) in runs.items() if "facts" in found)
            + ".",
        ),
    )


def _latents(found: dict[str, Any]) -> Any:
    return np.frombuffer(bytes.fromhex(found["latents"]), np.float32).astype(np.float64)
