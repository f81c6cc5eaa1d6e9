"""MLX, as the FLUX example of ml-explore/mlx-examples loads it: Black Forest Labs' names, nothing quantized."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="mlx_example",
    toolchain="mlx",
    # whose layout it is
    chip="bfl",
    graph_format="onnx23",
    schemes=("BF16", "F16", "F32"),
)
