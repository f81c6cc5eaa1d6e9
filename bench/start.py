"""How long `fluxkiln --help` takes, beside the interpreter alone."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

from bench.figure import ROOT, Figure, fluxkiln, ratio, repeat

TIMES = 15
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnxruntime", "numpy", "numba", "rich")


def measure() -> Figure:
    def call(argv: list[str]) -> None:
        subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "fluxkiln --help": fluxkiln("--help"),
        "fluxkiln build --help": fluxkiln("build", "--help"),
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    taken = {name: repeat(TIMES if "torch" not in name else 3, partial(call, argv)) for name, argv in commands.items()}
    base = taken["python -c pass"][1]
    rows = tuple(
        (f"`{name}`", f"{best:.3f} s", f"{median:.3f} s", ratio(median, base)) for name, (best, median) in taken.items()
    )
    code = "import sys; from fluxkiln.cli.main import main; main(['--help']); print([*sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    found = [name for name in HEAVY if f"'{name}'" in loaded]
    note = f"Of {', '.join(HEAVY)}, `--help` imports {', '.join(found) or 'none'}. Aim: at most 0.2 s."
    return Figure("Start", ("command", "best", f"median of {TIMES} (torch: 3)", "ratio"), rows, (note,))
