"""Sophgo BM1684X2 (CV84X6), through TPU-MLIR."""

from fluxkiln.compile.targets import Board, Target

TARGET = Target(
    name="bm1684x2",
    toolchain="tpu_mlir",
    chip="bm1684x2",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "BF16", "F16", "F32"),
    narrow=True,
    float_groups=True,
    boards=(Board("EVB", 1, 16 << 30, "not published; as much as a BM1688 has"),),
)
