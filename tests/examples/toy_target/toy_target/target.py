"""Any machine with numpy."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="toy", toolchain="onnx-reference", chip="numpy", graph_format="onnx17", schemes=("BF16", "F32"), uniform=True
)
