"""4-bit packing on one core, beside ONNX Runtime's own MatMulNBits quantizer on the same matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from bench.figure import Figure, one_core, ratio, repeat
from tests.quantize.weights import pack_int4, pack_int8

ROWS, COLUMNS, GROUP = 12288, 3072, 64
TIMES = 5


def measure() -> Figure:
    from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer

    weight_OI = np.random.default_rng(0).standard_normal((ROWS, COLUMNS), np.float32) / np.float32(COLUMNS**0.5)
    narrow_OI = weight_OI.astype(ml_dtypes.bfloat16)
    wide_OI = narrow_OI.astype(np.float32)
    theirs: Any = DefaultWeightOnlyQuantizer(DefaultWeightOnlyQuantConfig(block_size=GROUP, is_symmetric=False, bits=4))
    transposed = np.ascontiguousarray(wide_OI.T)
    works: dict[str, Callable[[], Any]] = {
        "fluxkiln, 4 bits, bfloat16 in": lambda: pack_int4(narrow_OI, GROUP),
        "fluxkiln, 4 bits, float32 in": lambda: pack_int4(wide_OI, GROUP),
        "fluxkiln, 8 bits, bfloat16 in": lambda: pack_int8(narrow_OI, GROUP),
        "ONNX Runtime MatMulNBits quantizer, float32 in, already transposed": lambda: theirs.qbits_block_quant(
            transposed
        ),
        "plain copy of the bfloat16 matrix": lambda: narrow_OI.copy(),
    }
    with one_core():
        for work in works.values():
            work()  # compiled and warm
        taken = {name: repeat(TIMES, work)[0] for name, work in works.items()}
    base = next(seconds for name, seconds in taken.items() if name.startswith("ONNX Runtime"))
    rows = tuple(
        (name, f"{seconds * 1e3:.0f} ms", f"{narrow_OI.nbytes / seconds / 1e9:.2f} GB/s", ratio(base, seconds))
        for name, seconds in taken.items()
    )
    return Figure(
        "Packing to 4 bits",
        ("", "time", "of bfloat16", "speed, ONNX Runtime = 1"),
        rows,
        (
            f"One matrix of {ROWS} x {COLUMNS}, groups of {GROUP}, asymmetric; best of {TIMES}, on one core. Bytes are "
            "those of the matrix in bfloat16, whatever went in. The two quantizers round differently and ONNX "
            "Runtime's scales are float32.",
        ),
    )
