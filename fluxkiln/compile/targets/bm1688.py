"""Sophgo BM1688, through TPU-MLIR."""

from fluxkiln.compile.target import Target

TARGET = Target(
    name="bm1688",
    toolchain="tpu_mlir",
    chip="bm1688",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "BF16", "F16", "F32"),
    cast_kinds=("t5_block", "double", "single", "tail"),
    # its LayerNorm and SiLU take float32, and nothing else reads the tail's inputs
    narrow_inputs=("t5_block", "t5_final", "double", "single"),
    narrow_outputs=("t5_block", "head", "double", "single"),
    device_bytes=16 << 30,
)
