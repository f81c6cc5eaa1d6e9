"""Any CPU, through ONNX Runtime: weights mapped from the checkpoint's own files, arithmetic in float32."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="cpu",
    toolchain="onnxruntime",
    chip="cpu",
    graph_format="onnx23",
    schemes=("BF16", "F32", "F16", "W4BF16"),
)
