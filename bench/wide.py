"""wide-dev (FLUX.1's width, two blocks) for bm1684x without verification: wall time and peak memory."""

from __future__ import annotations

import os
import tempfile

from bench.figure import WORK, Figure, fluxkiln, gigabytes, ratio, run
from fluxkiln.export.source import resolve_model

LIMIT = 6e9


def measure() -> Figure:
    resolve_model("wide-dev", WORK / "models")
    with tempfile.TemporaryDirectory(dir=WORK) as store:
        arguments = ["--model", "wide-dev", "--scheme", "W4BF16", "--size", "256x256", "--tokens", "128"]
        folders = ["--build-dir", str(WORK), "--store", store]
        made = run(fluxkiln("build", "bm1684x", *arguments, "--no-verify", *folders, "--json"))
    document = made.document()
    row = (
        str(os.cpu_count()),
        f"{made.seconds:.0f} s",
        gigabytes(made.peak_bytes),
        ratio(made.peak_bytes, LIMIT),
        str(document["compiler_runs"]),
    )
    return Figure(
        "wide-dev, W4BF16, 256x256, 128 tokens",
        ("compilers at once", "time", "peak memory", "of 6 GB", "compiler runs"),
        (row,),
        ("`fluxkiln build bm1684x --no-verify`, empty store, the checkpoint there already. Aim: at most 6 GB.",),
    )
