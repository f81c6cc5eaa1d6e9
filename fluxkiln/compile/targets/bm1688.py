"""Sophgo BM1688, through TPU-MLIR."""

from fluxkiln.compile.target import Target
from fluxkiln.components import MODULATION_KINDS

TARGET = Target(
    name="bm1688",
    toolchain="tpu_mlir",
    chip="bm1688",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "BF16", "F16", "F32"),
    # its LayerNorm and SiLU take float32, and nothing else reads the tail's inputs or temb in the modulation's parts
    narrow_inputs=(
        "t5_block", "t5_final", "double", "single", "double_modulated", "single_modulated", "tail_modulated",
    ),
    narrow_outputs=(
        "t5_block", "head", "double", "single",
        *MODULATION_KINDS, "token_embed", "double_modulated", "single_modulated",
    ),
    device_bytes=16 << 30,
)  # fmt: skip
