"""Sophgo BM1688, through TPU-MLIR. Of a board's memory models get what Sophgo's samples of language models set."""

from fluxkiln.compile.targets import Board, Target

TARGET = Target(
    name="bm1688",
    toolchain="tpu_mlir",
    chip="bm1688",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "BF16", "F16", "F32"),
    narrow=True,
    float_norms=True,
    boards=(
        Board("SE9-16", 1, (10240 + 3072) << 20, "10240 + 3072 MiB (NPU, VPP), as Sophgo's samples set it"),
        Board("SE9-8", 1, (6800 + 40) << 20, "6800 + 40 MiB (NPU, VPP), as Sophgo's samples set it"),
    ),
    # of other weights TPU-MLIR 1.30.2 leaves the last rows in BF16, without a word, and fewer rows make it fail
    lanes=32,
)  # fmt: skip
