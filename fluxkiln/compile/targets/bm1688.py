"""Sophgo BM1688, through TPU-MLIR."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="bm1688",
    toolchain="tpu_mlir",
    chip="bm1688",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "BF16", "F16", "F32"),
    narrow=True,
    float_norms=True,
    device_bytes=16 << 30,
    # of other weights TPU-MLIR 1.30.2 leaves the last rows in BF16, without a word, and fewer rows make it fail
    lanes=32,
)  # fmt: skip
