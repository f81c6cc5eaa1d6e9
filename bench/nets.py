"""What every kind of net of FLUX.1 takes on a BM1684X and in the compiler; it fills the table that plans look into."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

from bench.figure import WORK, Figure, conditions
from fluxkiln.build.make import outline
from fluxkiln.build.prepared import Prepared
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import measured
from fluxkiln.compile.toolchains.tpu_mlir.devices import estimate
from fluxkiln.compile.toolchains.tpu_mlir.jobs import planned_binaries
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import MODULATIONS, VAES, Settings

# model, scheme, width and height: what is asked for most comes first
BUILDS = (
    ("full-dev", "W4BF16", (1024, 1024)),
    ("full-schnell", "W4BF16", (1024, 1024)),
    ("full-dev", "W4BF16", (512, 512)),
    ("full-dev", "BF16", (1024, 1024)),
    ("full-dev", "W8BF16", (1024, 1024)),
    ("full-dev", "W4BF16", (768, 1024)),
    ("full-dev", "W8A8", (1024, 1024)),
    ("full-dev", "W8A8-qk", (1024, 1024)),
)


def measure() -> Figure:
    table = json.loads(measured.TABLE.read_bytes())
    nets = {(*(net[name] for name in measured.KEY),): net for net in table["nets"]}
    before, rows = conditions(), []
    for modulation, (model, scheme, size), vae in itertools.product(MODULATIONS, BUILDS, VAES):
        if parse_scheme(scheme).integer and modulation == "inline":
            continue  # there is no such form
        prepared = outline(
            Settings("bm1684x", model, scheme=scheme, size=(size,), vae=vae, modulation=modulation, build_dir=WORK)
        )
        for net in _measure(prepared, nets):
            nets[(*(net[name] for name in measured.KEY),)] = net
            document = {"command": "python -m bench nets", "conditions": before, "nets": list(nets.values())}
            measured.TABLE.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        values, _ = estimate(prepared.checkpoint, planned_binaries(prepared.checkpoint, prepared.plan, prepared.cache))
        name = f"{model}, {scheme}, {size[0]}x{size[1]}"
        rows.append((name, vae, modulation, f"{values['step_ms'] / 1000:.2f} s", f"{values['image_ms'] / 1000:.0f} s"))
    return Figure(
        "What images of FLUX.1 take on a BM1684X, by the compiler's estimate",
        ("build", "vae", "modulation", "a step", "an image"),
        tuple(rows),
        (
            "Every kind of net compiled once, one after the other; seconds are those of the CPU. No board ran. The "
            "nets are in `measured.json`.",
        ),
    )


def _measure(prepared: Prepared, known: dict[tuple[str, ...], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The nets of a build that the table has not."""
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    for kind in plan.kinds():
        key = measured.net_key(checkpoint, plan, kind)
        if key in known:
            continue
        template = make_template(checkpoint, plan, cache, kind, plan.target.graph_format)
        before = sum(os.times()[:4])
        mould = make_mould(checkpoint, plan, cache, template)
        seconds = {} if mould.result.hit else {"seconds": round(sum(os.times()[:4]) - before, 1)}
        facts = {name: mould.result.facts[name] for name in measured.NET_FACTS}
        yield {**dict(zip(measured.KEY, key, strict=True)), **facts, **seconds}
