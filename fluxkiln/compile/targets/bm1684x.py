"""Sophgo BM1684X, through TPU-MLIR. A chip has 16 GB; what of it models get is set on the board, by `memory_edit`.

Sources: SE7-32 from the published FLUX.1 sample for it, SM7 from Sophgo's samples of language models (sophon-demo), the
chips of a card from the table of boards in Sophgo's firmware (sophgo/mcu).
"""

from fluxkiln.compile.targets import Board, Target

_SAMPLE = (7615 + 2360 + 2360) << 20
_AS_SAMPLE = "not published; as an SE7-32"

TARGET = Target(
    name="bm1684x",
    toolchain="tpu_mlir",
    chip="bm1684x",
    graph_format="onnx17",
    schemes=("W4BF16", "W8BF16", "W8A8", "W8A8-qk", "BF16", "F16", "F32"),
    narrow=True,
    boards=(
        Board("SE7-32", 1, _SAMPLE, "7615 + 2360 + 2360 MiB (NPU, VPU, VPP), as the published FLUX.1 sample sets it"),
        Board("SM7", 1, (7615 + 3072 + 3072) << 20, "7615 + 3072 + 3072 MiB, as Sophgo's language models set it"),
        Board("AIRBOX", 1, _SAMPLE, _AS_SAMPLE),
        Board("SC7-HP75", 3, _SAMPLE, _AS_SAMPLE),
        Board("SC7-FP150", 6, _SAMPLE, _AS_SAMPLE),
        Board("SC7-PRO", 8, _SAMPLE, _AS_SAMPLE),
    ),
    # of other weights TPU-MLIR 1.30.2 leaves the last rows in BF16, without a word
    lanes=64,
    partial_lanes=True,
)  # fmt: skip
