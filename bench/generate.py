"""Images of wide-dev from a cpu bundle beside diffusers' own pipeline in float32 and bfloat16."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from bench.figure import WORK, Figure, fluxkiln, gigabytes, ratio, run
from fluxkiln.export.source import resolve_model

SIZE, TOKENS, STEPS = 256, 128, 6
OVERHEAD, LOADING = 0.03, 2.0

BUNDLE = """
import json, os, sys, time
from pathlib import Path
import numpy as np
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.toolchain import open_executor
from fluxkiln.generate.painter import Painter

folder, steps, how = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
import diffusers, onnxruntime, torch, transformers  # the import is not what is measured
from diffusers import FluxPipeline
began = time.perf_counter()
bundle = open_bundle(folder)
checked = time.perf_counter()
executor = open_executor(bundle, threads=int(os.environ.get("OMP_NUM_THREADS", "0")), fast="fast" in how)
inside = [0.0]

class Timed:
    def __init__(self, session):
        self.session = session
    def __getattr__(self, name):
        found = getattr(self.session, name)
        return (lambda *arguments: self.timed(found, arguments)) if name in ("run", "infer") else found
    def timed(self, work, arguments):
        started = time.perf_counter()
        try:
            return work(*arguments)
        finally:
            inside[0] += time.perf_counter() - started

with Painter(bundle, executor) as painter:
    opened = time.perf_counter()
    for component in ("text_encoder", "text_encoder_2", "transformer", "vae"):
        executor.load(component)
    loaded = time.perf_counter()
    executor.sessions.update({part: Timed(session) for part, session in executor.sessions.items()})
    start, cpu = time.perf_counter(), time.process_time()
    encoded = painter.encode("a kiln at night, glowing")
    executor.release("text_encoder")
    executor.release("text_encoder_2")
    taken = []
    for step in painter.denoise(encoded, steps=steps, seed=0):
        taken.append(step.seconds)
    executor.release("transformer")
    painter.decode(step.latents)
    whole, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"check": checked - began, "graphs": loaded - opened, "load": loaded - checked, "steps": taken,
                  "seconds": whole, "cpu": cpu, "overhead": (whole - inside[0]) / whole,
                  "facts": dict(executor.facts), "latents": np.asarray(step.latents, np.float32).tobytes().hex()}))
"""
DIFFUSERS = """
import json, os, sys, time
import torch
from diffusers import FluxPipeline

folder, steps, dtype = sys.argv[1], int(sys.argv[2]), getattr(torch, sys.argv[3])
side, tokens, how = *map(int, sys.argv[4:6]), sys.argv[6:]
if "OMP_NUM_THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
began = time.perf_counter()
pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype)
pipe.set_progress_bar_config(disable=True)
loaded = time.perf_counter()
if "compile" in how:
    pipe.transformer.compile_repeated_blocks()
taken, last = [], [0.0]

def after_step(pipe, index, timestep, tensors):
    now = time.perf_counter()
    taken.append(now - last[0])
    last[0] = now
    return {}

def make(steps):
    pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, height=side, width=side, num_inference_steps=steps,
         generator=torch.Generator("cpu").manual_seed(0), output_type="np", callback_on_step_end=after_step)

with torch.no_grad():
    if "compile" in how:
        embeds, pooled, _ = pipe.encode_prompt("compiling is not what is measured", max_sequence_length=tokens)
        make(1)
        taken.clear()
    start, cpu = time.perf_counter(), time.process_time()
    embeds, pooled, _ = pipe.encode_prompt("a kiln at night, glowing", max_sequence_length=tokens)
    pipe.text_encoder = pipe.text_encoder_2 = None
    last[0] = time.perf_counter()
    make(steps)
whole, cpu = time.perf_counter() - start, time.process_time() - cpu
print(json.dumps({"load": loaded - began, "steps": taken, "seconds": whole, "cpu": cpu}))
"""


def measure() -> Figure:
    checkpoint = resolve_model("wide-dev", WORK / "models")
    built = run(
        fluxkiln(
            "build", "cpu", "--model", "wide-dev", "--size", f"{SIZE}x{SIZE}", "--tokens", str(TOKENS), "--no-verify",
            "--build-dir", str(WORK), "--json",
        )
    )  # fmt: skip
    bundle = built.document()["bundle"]
    runs: dict[str, tuple[dict[str, Any], int]] = {}
    for name, script, arguments in (
        ("bundle, ort", BUNDLE, [bundle, STEPS]),
        ("diffusers, float32", DIFFUSERS, [checkpoint, STEPS, "float32", SIZE, TOKENS]),
        ("diffusers, bfloat16", DIFFUSERS, [checkpoint, STEPS, "bfloat16", SIZE, TOKENS]),
    ):
        made = run([sys.executable, "-c", script, *map(str, arguments)])
        runs[name] = made.document(), made.peak_bytes
    ours, peak = runs["bundle, ort"]
    rows = tuple(
        (
            name,
            f"{found['load']:.1f} s",
            f"{sorted(found['steps'])[len(found['steps']) // 2]:.2f} s",
            f"{found['seconds']:.1f} s",
            f"{found['cpu']:.1f} s",
            gigabytes(memory),
            ratio(ours["seconds"], found["seconds"]),
            ratio(ours["cpu"], found["cpu"]),
            ratio(peak, memory),
        )
        for name, (found, memory) in runs.items()
    )
    threads = os.environ.get("OMP_NUM_THREADS", "all cores")
    return Figure(
        f"wide-dev, {SIZE}x{SIZE}, {TOKENS} tokens, {STEPS} steps",
        (
            "",
            "loading",
            "a step",
            "image",
            "CPU time",
            "peak memory",
            "our time of it",
            "our CPU time of it",
            "our memory of it",
        ),
        rows,
        (
            f"`fluxkiln generate`'s stages beside `FluxPipeline` from the same checkpoint; threads: {threads}. The "
            "image's time is from prompt to pixels, loading and imports apart; memory counts mapped weights.",
            f"Graphs opened in {ours['graphs']:.2f} s (aim: {LOADING:g} s); digests of all files checked in "
            f"{ours['check']:.2f} s, once. Time outside of ONNX Runtime's sessions: {100 * ours['overhead']:.1f} % "
            f"(aim: {100 * OVERHEAD:g} %).",
            f"bfloat16 instructions of this CPU: {', '.join(bf16_instructions()) or 'none'}. PyTorch multiplies with "
            "them at twice the rate of float32; ONNX Runtime's CPU kernels have no bfloat16 arithmetic.",
        ),
    )


def bf16_instructions() -> list[str]:
    """Those of x86 that this CPU says it has."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    except OSError:
        return []
    return sorted({"avx512_bf16", "amx_bf16"}.intersection(flags))
