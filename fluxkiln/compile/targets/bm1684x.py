"""Sophgo BM1684X, through TPU-MLIR."""

from fluxkiln.compile.target import Target
from fluxkiln.components import MODULATION_KINDS

TARGET = Target(
    name="bm1684x",
    toolchain="tpu_mlir",
    chip="bm1684x",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "BF16", "F16", "F32"),
    # SiLU alone reads temb in the modulation's parts, and takes float32: time_embed hands it over in float32
    narrow_inputs=(
        "t5_block", "t5_final", "double", "single", "tail", "double_modulated", "single_modulated", "tail_modulated",
    ),
    narrow_outputs=(
        "t5_block", "head", "double", "single",
        *MODULATION_KINDS, "token_embed", "double_modulated", "single_modulated",
    ),
    # a SE7-32 core module with its NPU memory set to 7615 MB and 2360 MB each for the VPU and VPP parts
    device_bytes=(7615 + 2360 + 2360) << 20,
)  # fmt: skip
