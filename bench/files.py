"""The transformer of full-dev (all of FLUX.1-dev's) in files for MLX and GGUF, beside a plain copy of as many bytes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from bench.figure import WORK, Figure, fluxkiln, gigabytes, ratio, run
from bench.full import MODEL, copy_plainly, drop_from_cache
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.source import resolve_model

COMPONENT = "transformer"
CASES = (("mlx", "MLX4"), ("gguf", "Q8_0"), ("gguf", "Q4_0"))


def measure() -> Figure:
    root = resolve_model(MODEL, WORK / "models", components=(COMPONENT,))
    refs = open_checkpoint(root, (COMPONENT,)).tensors[COMPONENT].values()
    rows = []
    for target, scheme in CASES:
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            place = Path(folder)
            (place / "models").symlink_to(WORK / "models")
            asked = ["--model", MODEL, "--components", COMPONENT, "--scheme", scheme, "--no-verify"]
            for ref in refs:
                drop_from_cache(ref.file)
            made = run(fluxkiln("build", target, *asked, "--build-dir", folder, "--store", f"{folder}/store", "--json"))
            bundle = Path(made.document()["bundle"])
            written = sum(
                path.stat().st_size for path in bundle.rglob(f"*{'.gguf' if target == 'gguf' else '.safetensors'}")
            )
            packing = float(made.document()["timings"]["pack"])
            plain = copy_plainly(refs, written, place / "plain")
        rows.append(
            (
                f"{target}, {scheme}", gigabytes(sum(ref.nbytes for ref in refs)), gigabytes(written),
                f"{packing:.0f} s", f"{plain:.0f} s", ratio(packing, plain), gigabytes(made.peak_bytes),
            )
        )  # fmt: skip
    return Figure(
        f"{MODEL}'s {COMPONENT} in files of other programs",
        ("", "weights in", "files", "packed", "plain copy", "packed / plain copy", "peak"),
        tuple(rows),
        (
            "`fluxkiln build TARGET --no-verify --components transformer`: what it says of packing, the files' digests "
            "and their way into the store included. Plain copy: the same byte ranges of the checkpoint read, and as "
            "many bytes as the files have written, in the same run. The peak is that of the whole build.",
        ),
    )
