"""GGUF files, for stable-diffusion.cpp, ComfyUI and diffusers; any machine that they run on."""

from fluxkiln.compile.targets import Target

TARGET = Target(
    name="gguf",
    toolchain="gguf",
    chip="any",
    graph_format="onnx23",
    schemes=("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "BF16", "F16", "F32"),
)
