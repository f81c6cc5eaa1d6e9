"""The rungs of a build for ONNX Runtime, and their gates."""

from __future__ import annotations

from fluxkiln.verify.gates import STORED, Gate, Rung

RUNGS: tuple[Rung, ...] = (
    Rung("executed", 4, "the bundle's own graphs, run by the target's runtime",
         "linking: a quantized weight, scale or zero point in the wrong place of the bundle", STORED, series=4),
)  # fmt: skip

GATES: tuple[Gate, ...] = (
    Gate("executed", "F32", "part", "*", "relative_l2", 5e-6, "reference",
         "float32 by ONNX Runtime's kernels, as at its own rung"),
    Gate("executed", "*", "part", "*", "relative_l2", 2e-3, "previous",
         "the same codes in float32 on both sides; norm weights are rounded to 16 bits before or after the softmax "
         "factor is in them: 5e-4 was measured"),
)  # fmt: skip
