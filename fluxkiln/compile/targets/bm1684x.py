"""Sophgo BM1684X, through TPU-MLIR."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="bm1684x",
    toolchain="tpu_mlir",
    chip="bm1684x",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "W8A8", "BF16", "F16", "F32"),
    narrow=True,
    # a SE7-32 core module with its NPU memory set to 7615 MB and 2360 MB each for the VPU and VPP parts
    device_bytes=(7615 + 2360 + 2360) << 20,
    # of other weights TPU-MLIR 1.30.2 leaves the last rows in BF16, without a word
    lanes=64,
    partial_lanes=True,
)  # fmt: skip
