"""LoRA files made here, and the sums that fusing them must give."""

import torch
from safetensors.torch import load_file, save_file

Q = "transformer_blocks.0.attn.to_q"
K = "transformer_blocks.0.attn.to_k"
V = "transformer_blocks.0.attn.to_v"
CLIP = "text_model.encoder.layers.0.mlp.fc1"
T5 = "encoder.block.0.layer.0.SelfAttention.q"
OUT = "single_transformer_blocks.0.proj_out"


def weights(folder):
    """Every tensor of the transformer, as it is stored."""
    files = sorted((folder / "transformer").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def exact(rows, columns, seed):
    """Multiples of 1/16 up to 1: sums of a few products of two are exact in float32, in any order."""
    drawn = torch.randint(-16, 17, (rows, columns), generator=torch.Generator().manual_seed(seed))
    return drawn.to(torch.float32) / 16


def pair(shapes, layer, rank=4, seed=0):
    """(down, up) for a layer."""
    out, width = shapes[f"{layer}.weight"]
    return exact(rank, width, seed), exact(out, rank, seed + 1)


def peft(shapes, *layers, rank=4, alpha=None, prefix="transformer."):
    tensors = {}
    for i, layer in enumerate(layers):
        down, up = pair(shapes, layer, rank, 2 * i)
        tensors |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
        if alpha is not None:
            tensors[f"{prefix}{layer}.alpha"] = torch.tensor(alpha)
    return tensors


def write(path, tensors, metadata=None):
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return path


def bits(tensor):
    return tensor.contiguous().view(torch.int16)


def added(old, *terms):
    """W + s * (B @ A) for each term, rounded to bfloat16 at the end."""
    total = old.float()
    for down, up, scale in terms:
        total = total + scale * (up @ down)
    return total.to(torch.bfloat16)
