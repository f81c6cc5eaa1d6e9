"""MLX, as mflux lays out a whole pipeline: Apple silicon, or a CPU."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="mlx",
    toolchain="mlx",
    # whose layout it is
    chip="mflux",
    graph_format="onnx23",
    schemes=("MLX4", "MLX8", "BF16"),
)
