"""What a step of FLUX.1-dev takes on a BM1684X by scheme, by the compiler's estimate, and the bytes of its blocks."""

from __future__ import annotations

from bench.figure import Figure, gigabytes
from bench.formulations import DOUBLES, SINGLES, estimate
from fluxkiln.compile.targets.bm1684x import TARGET
from fluxkiln.compile.toolchains.tpu_mlir.environment import default_tpu_mlir_root, find_tpu_mlir
from fluxkiln.quantize.schemes import parse_scheme

SCHEMES = ("W4BF16", "W8BF16", "W8A8", "BF16")


def measure() -> Figure:
    env = find_tpu_mlir(default_tpu_mlir_root())
    if env is None:
        raise RuntimeError("TPU-MLIR's environment is not there; run make env-tpu-mlir")
    rows = []
    for name in SCHEMES:
        scheme = parse_scheme(name)
        single, double = (estimate(env, TARGET, scheme, f"{kind}_modulated") for kind in ("single", "double"))
        step, size = (SINGLES * one + DOUBLES * two for one, two in zip(single, double, strict=True))
        rows.append((name, f"{single[0]:.1f} ms", f"{double[0]:.1f} ms", f"{step / 1000:.2f} s", gigabytes(size)))
    return Figure(
        "A step at 1024x1024, 512 tokens, by scheme",
        ("scheme", "single", "double", f"{SINGLES} + {DOUBLES} blocks", "their weights"),
        tuple(rows),
        (
            "By the schedule that TPU-MLIR makes of its own code; no board ran. Modulation is hoisted; head and tail, "
            "4 ms a step, are left out.",
        ),
    )
