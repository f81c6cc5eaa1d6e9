"""Casting a block of FLUX.1's width into its region of a file on one core, beside a plain copy of what it reads."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from bench.figure import WORK, Figure, cpu_seconds, one_core, ratio
from fluxkiln.build.calibration import calibrate
from fluxkiln.build.make import prepare
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import Span
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region, cast_source
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould
from fluxkiln.export.bindings import bind_part, binding_refs
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings

TIMES = 5
SCHEMES = ("W4BF16-rtn", "W4BF16", "W8BF16", "W8A8", "BF16", "F16", "F32")
KIND = "single_modulated"
BLOCK = 1 << 20


def measure() -> Figure:
    rows, searched = [], 0.0
    for scheme in SCHEMES:
        # the shape has no part in a weight; a small one compiles faster
        settings = Settings(
            "bm1684x",
            "wide-dev",
            size=((64, 64),),
            tokens=(64,),
            scheme=scheme,
            components=("transformer",),
            build_dir=WORK,
        )
        if parse_scheme(scheme).calibrated:
            calibrate(settings, (settings.prompt,))
        prepared = prepare(settings)
        checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
        part = next(part for part in plan.parts if part.kind == KIND)
        template = make_template(checkpoint, plan, cache, KIND, "onnx17")
        mould = make_mould(checkpoint, plan, cache, template)
        if not mould.castable:
            raise RuntimeError(mould.why)
        coefficients = CoefficientMap.from_json(
            json.loads(cache.path(mould.result.outputs["map"]).read_text(encoding="utf-8"))
        )
        binding = bind_part(part, template.slots, checkpoint)
        refs = binding_refs(binding, checkpoint)
        before = sum(os.times()[:2])
        reader, rounder_of = cast_source(checkpoint, plan, cache, part)
        if parse_scheme(scheme).integer:
            searched = sum(os.times()[:2]) - before
        size = sum(ref.nbytes for ref in refs)
        with tempfile.TemporaryDirectory(dir=WORK) as folder, one_core():
            target, block = Path(folder) / "cast", np.empty(BLOCK, np.uint8)

            def cast() -> None:
                target.write_bytes(b"")  # noqa: B023
                os.truncate(target, coefficients.size)  # noqa: B023
                cast_region(target, Span(0, coefficients.size), coefficients, reader, rounder_of)  # noqa: B023

            def copy() -> None:
                with target.open("wb", buffering=0) as written:  # noqa: B023
                    for ref in refs:  # noqa: B023
                        with ref.file.open("rb", buffering=0) as shard:
                            shard.seek(ref.offset)
                            for start in range(0, ref.nbytes, BLOCK):
                                part_of = block[: min(BLOCK, ref.nbytes - start)]  # noqa: B023
                                shard.readinto(part_of.data)
                                written.write(part_of.data)

            def check_code() -> None:
                digest = hashlib.sha256()
                for start in range(0, coefficients.size, BLOCK):  # noqa: B023
                    digest.update(block[: min(BLOCK, coefficients.size - start)].data)  # noqa: B023
                digest.digest()

            casting, copying, hashing = (cpu_seconds(work, TIMES) for work in (cast, copy, check_code))
        rows.append(
            (
                scheme,
                f"{size / 1e6:.0f} MB",
                f"{coefficients.size / 1e6:.0f} MB",
                f"{casting:.3f} s",
                f"{hashing:.3f} s",
                f"{size / casting / 1e9:.2f} GB/s",
                f"{size / copying / 1e9:.2f} GB/s",
                ratio(copying, casting),
            )
        )
    return Figure(
        "Casting a single block of width 3072",
        (
            "scheme", "weights in", "out", "cast", "its check code alone", "cast, of bfloat16 in", "plain copy",
            "cast / copy",
        ),
        tuple(rows),
        (
            f"CPU seconds of one core, best of {TIMES}, files in the page cache. A cast reads the weights, packs or "
            "reorders them, writes them to their region of a file without blocks, and hashes the region (the check "
            "code, sha256, which no method can leave out). W4BF16-rtn rounds as the compiler does, W4BF16 "
            "searches, see `bench quantize`. The plain copy reads the same byte ranges of the checkpoint "
            "and writes them to such a file; neither waits for the disk.",
            f"W8A8's channel scales are found once for a checkpoint, before that, in {searched:.2f} s of CPU time.",
        ),
    )  # fmt: skip
