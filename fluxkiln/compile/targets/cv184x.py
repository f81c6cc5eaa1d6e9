"""Sophgo CV184X, through TPU-MLIR, as far as its compiler goes: all kinds but those that embed the timestep.

TPU-MLIR 1.30.2 has functions for it in bfloat16 alone. The sines of the timestep's multiples of 1000 do not stand that.
Codes of weights lie otherwise than on other chips: parts in codes are compiled one by one.
"""

from fluxkiln.compile.targets import Board, Target

TARGET = Target(
    name="cv184x",
    toolchain="tpu_mlir",
    chip="cv184x",
    graph_format="onnx17",
    schemes=("BF16", "F16", "F32", "W4BF16", "W8BF16"),
    narrow=True,
    narrow_gelus=True,
    boards=(Board("EVB", 1, 2 << 30, "not published"),),
)
