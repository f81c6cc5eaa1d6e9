"""The rungs of a TPU-MLIR build, and their gates."""

from __future__ import annotations

from fluxkiln.verify.gates import STORED, Gate, Rung

RUNGS: tuple[Rung, ...] = (
    Rung("interpreter", 8, "the compiler's lowered graph, interpreted",
         "lowering: the precision of activations, or one operator", STORED, series=4),
    Rung("stored", 9, "the weights in the binary, byte by byte",
         "casting: a code, scale or zero point that is not the one this scheme makes of this weight", series=1,
         exact=True),
    Rung("simulator", 10, "the compiled binary on the chip's simulator",
         "code generation, or coefficients cast into the wrong place", STORED, series=5),
)  # fmt: skip
_COMPILED = "interpreter|simulator"

GATES: tuple[Gate, ...] = (
    Gate("stored", "*", "*", "*", "max_abs", 0.0, "reference",
         "a cast writes the very bytes that the scheme makes of the checkpoint's weights, and no other"),
    Gate("interpreter", "F32", "part", "*", "relative_l2", 5e-6, "reference",
         "float32 by yet other kernels, which sum in another order, as ONNX Runtime's do"),
    Gate("simulator", "F32", "part", "*", "relative_l2", 1e-6, "reference",
         "float32 weights and arithmetic on the chip: 5e-8 was measured on a block"),
    # With quantization out of the way: the compiled arithmetic against the rung before it.
    Gate(_COMPILED, "W4BF16*|W8BF16*", "whole", "*", "relative_l2", 6e-3, "previous",
         "the same codes on both sides, so only BF16 arithmetic may differ"),
    Gate(_COMPILED, "W4BF16*|W8BF16*", "residual", "*", "delta_cosine", 0.999, "previous",
         "the same codes on both sides, so the delta must agree as well as it does in BF16"),
    Gate(_COMPILED, "BF16|W8BF16*|W4BF16*", "block", "*", "worst_channel", 0.2, "previous",
         "a wrong scale or bias moves one channel by its own size, BF16 moves none by more than twice its 4 %",
         proposed=True),
)  # fmt: skip
