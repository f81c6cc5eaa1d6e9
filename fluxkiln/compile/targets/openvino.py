"""OpenVINO: weights mapped from the checkpoint's own files, arithmetic in bfloat16 where the CPU has it."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="openvino",
    toolchain="openvino",
    chip="cpu",
    graph_format="onnx23",
    schemes=("BF16", "F32", "F16", "W8BF16", "W4BF16"),
)
