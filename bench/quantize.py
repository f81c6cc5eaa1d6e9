"""Rounding methods on one matrix of FLUX.1's width: speed of one core, and error beside the compiler's rounding."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from bench.figure import Figure, cpu_seconds, one_core, ratio
from fluxkiln.quantize.calibration import DEFAULT_BLOCK, Statistics
from fluxkiln.quantize.pack import dequantize
from fluxkiln.quantize.rounders import pack_sided
from fluxkiln.quantize.schemes import parse_scheme
from tests.quantize.weights import gather, pack_matrix

WIDTH, GROUP, BLOCK = 3072, 64, DEFAULT_BLOCK
ROWS_SEEN, ROWS_UNSEEN = 4096, 512
TIMES = 3
SCHEMES = (
    "W4BF16-rtn", "W4BF16-rtn0", "W4BF16-mse", "W4BF16-ls", "W4BF16-ls-sym", "W4BF16-gptq", "W4BF16-awq", "W4BF16-svd"
)  # fmt: skip
DISTRIBUTIONS = ("Gaussian", "Student, 5", "Student, 3", "outlier channels")


def measure() -> Figure:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    weights = {name: _weight(name) for name in DISTRIBUTIONS}
    seen, unseen = _inputs(ROWS_SEEN, 1), _inputs(ROWS_UNSEEN, 2)
    statistics = gather(seen, BLOCK)
    theirs: Any = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False, bits=4))
    base = {name: _errors(weight, "W4BF16-rtn", statistics, unseen) for name, weight in weights.items()}
    rows = []
    with one_core():
        first = weights["Student, 5"]
        transposed = np.ascontiguousarray(first.astype(np.float32).T)
        slowest = cpu_seconds(lambda: theirs.qbits_block_quant(transposed), TIMES)
        for scheme in SCHEMES:
            taken = cpu_seconds(lambda: _pack(first, scheme, statistics), TIMES)  # noqa: B023
            found = {name: _errors(weight, scheme, statistics, unseen) for name, weight in weights.items()}
            rows.append(
                (
                    scheme,
                    f"{taken:.3f} s",
                    f"{first.nbytes / taken / 1e9:.2f} GB/s",
                    ratio(slowest, taken),
                    *(f"{found[name][0] / base[name][0]:.3f}" for name in DISTRIBUTIONS),
                    *(f"{found[name][1] / base[name][1]:.3f}" for name in DISTRIBUTIONS[1:]),
                )
            )
    absolute = ", ".join(f"{name} {base[name][0]:.4f} and {base[name][1]:.4f}" for name in DISTRIBUTIONS)
    return Figure(
        "Rounding to 4 bits, by method",
        (
            "scheme", "CPU time", "of bfloat16", "speed, ONNX Runtime = 1",
            *(f"weight error, {name}" for name in DISTRIBUTIONS),
            *(f"output error, {name}" for name in DISTRIBUTIONS[1:]),
        ),
        tuple(rows),
        (
            f"One matrix of {WIDTH} x {WIDTH} in bfloat16, groups of {GROUP}; CPU seconds of a core, best of {TIMES}, "
            "the Cholesky factors of gptq included. ONNX Runtime's MatMulNBits quantizer takes float32, already "
            f"transposed, in {slowest:.3f} s. Errors are relative to those of the compiler's own rounding (rtn) of the "
            f"same matrix, weights and outputs: {absolute}.",
            f"Outputs are of inputs that were not calibrated on: correlated, with outlier channels; {ROWS_SEEN} rows "
            f"were, and products of channels were kept in blocks of {BLOCK}. awq and svd change the graph; svd has "
            "rank 32, which is 0.34 bits a weight more.",
        ),
    )  # fmt: skip


def _weight(name: str) -> Any:
    rng = np.random.default_rng(0)
    if name.startswith("Student"):
        values = rng.standard_t(int(name[-1]), (WIDTH, WIDTH))
    else:
        values = rng.standard_normal((WIDTH, WIDTH))
    if name == "outlier channels":
        values[:, rng.choice(WIDTH, WIDTH // 64, replace=False)] *= 8
    return (0.02 * values).astype(ml_dtypes.bfloat16)


def _inputs(count: int, seed: int) -> Any:
    """Rows that mix a quarter as many directions, the same for every seed, with channels of very different size."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    mixing = (fixed.standard_normal((WIDTH // 4, WIDTH)) / np.sqrt(WIDTH // 4)).astype(np.float32)
    channels = np.exp(0.5 * fixed.standard_normal(WIDTH)).astype(np.float32)
    channels[fixed.choice(WIDTH, WIDTH // 100, replace=False)] *= 8
    rows = rng.standard_normal((count, WIDTH // 4), np.float32) @ mixing
    return (rows + 0.5 * rng.standard_normal((count, WIDTH), np.float32)) * channels


def _pack(weight: Any, name: str, statistics: Statistics) -> Any:
    scheme = parse_scheme(name)
    if not scheme.codes_only:
        return pack_sided(weight, scheme, statistics).dequantize(GROUP)
    return pack_matrix(weight, scheme, statistics if scheme.calibrated else None)


def _errors(weight: Any, name: str, statistics: Statistics, inputs: Any) -> tuple[float, float]:
    made = _pack(weight, name, statistics)
    stored = made if isinstance(made, np.ndarray) else dequantize(made, GROUP)
    exact = weight.astype(np.float32)
    error = stored - exact
    return (
        float(np.linalg.norm(error) / np.linalg.norm(exact)),
        float(np.linalg.norm(inputs @ error.T) / np.linalg.norm(inputs @ exact.T)),
    )
