"""The first verified build of tiny-dev with environments in place, by stage."""

from __future__ import annotations

import sys
import tempfile

from bench.figure import WORK, Figure, gigabytes, run

_BUILD = """
import json, sys, time
from pathlib import Path
from fluxkiln.build.make import build
from fluxkiln.settings import Settings

started = time.perf_counter()
stages = {}

class Stamps:
    def stage(self, name, total):
        stages.setdefault(name, [time.perf_counter() - started, 0.0, 0])
    def done(self, stage, what, how):
        entry = stages.setdefault(stage, [time.perf_counter() - started, 0.0, 0])
        entry[1:] = [time.perf_counter() - started, entry[2] + 1]
    def note(self, text):
        pass

result = build(Settings(sys.argv[1], "tiny-dev", build_dir=Path(sys.argv[2])), Stamps())
timings = {one["name"]: one["seconds"] for one in json.loads(result.report.with_suffix(".json").read_text())["timings"]}
print(json.dumps({"stages": stages, "timings": timings, "seconds": time.perf_counter() - started,
                  "compiler_runs": result.compiler_runs, "parity": result.parity["passed"]}))
"""


def measure() -> Figure:
    rows = []
    WORK.mkdir(parents=True, exist_ok=True)
    for target in ("bm1684x", "cpu"):
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            made = run([sys.executable, "-c", _BUILD, target, folder])
        document = made.document()
        for stage, (begun, ended, jobs) in document["stages"].items():
            times = (f"{begun:.1f} s", f"{ended:.1f} s", f"{ended - begun:.1f} s")
            rows.append((target, stage, *times, str(jobs)))
        compiler = f"{document['compiler_runs']} compiler runs"
        total = f"**{made.seconds:.1f} s**, {gigabytes(made.peak_bytes)} at most, {compiler}"
        rows.append((f"**{target}**", "**all**, with the interpreter's start", "", "", total, ""))
    return Figure(
        "First build of tiny-dev (default scheme)",
        ("target", "stage", "begins", "ends", "takes", "jobs"),
        tuple(rows),
        ("Empty build folder and store, environments in place. Compiling and casting overlap. Aim: 90 s for bm1684x.",),
    )
