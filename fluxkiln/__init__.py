"""fluxkiln brings FLUX.1 onto accelerators that are not GPUs, and proves that it computes the same thing.

part: what is compiled as one: a block, an embedder, a decoder.
kind: parts with the same graph, which differ in their weights alone.
template: the graph of a kind for given shapes, without weights.
slot: a weight's place in a template.
binding: which tensors of a checkpoint go into a part's slots, and how they are changed on the way.
scheme: how weights are stored and computed with: W4BF16 is 4-bit codes, bfloat16 arithmetic.
toolchain: a compiler or runtime and everything that knows it: TPU-MLIR, Neuron, ONNX Runtime.
target: a chip or machine to build for, and the toolchain that does it.
mould: a template compiled with random weights, and the map of which byte comes from which slot.
cast: a part made from a mould and a binding, without the compiler.
shell: a compiled file with nothing in the place of its weights.
proof: a part compiled as well as cast, and found identical byte by byte.
rung: one way to compute a part; the ladder compares each with the one before it and with diffusers.
bundle: the folder that a runtime loads: compiled parts, tokenizers, constants, manifest.
store: where finished work is kept by the digest of what it was made from.
"""

__version__ = "0.1.0"
