"""Casting a single block of FLUX.1's width on one core, beside a plain copy of the bytes it reads."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path

from bench.figure import WORK, Figure, one_core, ratio, repeat
from fluxkiln.build import prepare
from fluxkiln.compile.cast import cast_bmodel
from fluxkiln.compile.mould import CoefficientMap
from fluxkiln.export.bindings import bind_part, binding_refs, weight_reader
from fluxkiln.settings import Settings
from fluxkiln.stages import make_mould, make_template

TIMES = 5
SCHEMES = ("W4BF16", "W8BF16", "BF16")


def measure() -> Figure:
    rows = []
    for scheme in SCHEMES:
        # the shape has no part in a weight; a small one compiles faster
        settings = Settings("bm1684x", "wide-dev", size=(64, 64), tokens=64, scheme=scheme, build_dir=WORK)
        kiln = replace(prepare(settings).kiln, logs=WORK / "logs")
        part = next(part for part in kiln.parts if part.kind == "single")
        template = make_template(kiln, "single", "onnx17")
        mould = make_mould(kiln, template)
        if not mould.castable:
            raise RuntimeError(mould.why)
        blobs = mould.result.outputs
        coefficients = CoefficientMap.from_json(json.loads(kiln.path(blobs["map"]).read_text()))
        binding = bind_part(part, template.slots, kiln.checkpoint)
        refs = binding_refs(binding, kiln.checkpoint)
        reader = weight_reader(binding, kiln.checkpoint)
        size = sum(ref.nbytes for ref in refs)
        with tempfile.TemporaryDirectory(dir=WORK) as folder, one_core():
            target = Path(folder) / "cast.bmodel"

            def cast() -> None:
                cast_bmodel(kiln.path(blobs["bmodel"]), coefficients, reader, "single_00", target)  # noqa: B023

            def copy() -> None:
                with target.with_suffix(".copy").open("wb") as written:  # noqa: B023
                    for ref in refs:  # noqa: B023
                        with ref.file.open("rb") as shard:
                            shard.seek(ref.offset)
                            written.write(shard.read(ref.nbytes))

            cast()
            copy()
            casting, copying = repeat(TIMES, cast)[0], repeat(TIMES, copy)[0]
            written_bytes = target.stat().st_size
        rows.append(
            (
                scheme,
                f"{size / 1e6:.0f} MB",
                f"{written_bytes / 1e6:.0f} MB",
                f"{casting:.2f} s",
                f"{size / casting / 1e9:.2f} GB/s",
                f"{size / copying / 1e9:.2f} GB/s",
                ratio(copying, casting),
            )
        )
    return Figure(
        "Casting a single block of width 3072",
        ("scheme", "weights in", "bmodel out", "cast", "cast, of bfloat16 in", "plain copy", "cast / copy"),
        tuple(rows),
        (
            f"Best of {TIMES}, one core, files in the page cache. A cast copies the mould, reads and packs the "
            "weights, writes them, and hashes the whole coefficient region (the check code). The plain copy reads the "
            "same byte ranges of the checkpoint and writes them to a file; neither waits for the disk.",
        ),
    )
