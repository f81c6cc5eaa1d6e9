"""The official sample's way to a compiled block, restated: one float32 block in memory, traced, transformed, deployed.

Facts taken from sophgo/sophon-demo, `sample/FLUX.1` (`scripts/export_models_from_HF.py`, `scripts/gen_bmodel.sh`,
`tools/diffusers-0.30.0/attention_processor.py`); the code is our own, on today's diffusers:

- The pipeline is loaded in float32 (its README asks for 96 GB), and each of the 57 blocks is traced by
  `torch.jit.trace` with random inputs and default options, its weights inside, and saved.
- Rotary embedding comes as 2x2 rotation matrices [1, J, 1, 64, 2, 2]; q and k are [1, J, H, K] until after it. A single
  block takes and gives the joint sequence.
- Each file goes through `model_transform` (ONNX simplification on, as is its default) and `model_deploy --quantize
  W4BF16 --chip bm1684x`, with no further options.

Two things differ. The sample saves these blocks as TorchScript, for which the compiler needs torch, which its
environment here has not; so the traced block is then written as ONNX, as the sample does with T5 and the VAE. And
RMSNorm is spelt out as diffusers 0.30 did: torch's own has no form in that exporter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

Kind = Literal["double", "single"]
Form = Literal["onnx", "torchscript"]
NAMES: Mapping[str, str] = {"double": "trans_block", "single": "single_trans_block"}
OPSET = 17


def export_block(
    kind: Kind,
    folder: Path,
    *,
    size: tuple[int, int] = (1024, 1024),
    tokens: int = 512,
    heads: int = 24,
    form: Form = "onnx",
    block: nn.Module | None = None,
) -> Path:
    """Trace one block with its weights and write it to `folder`.

    Args:
        size: width and height of the image. tokens: of the text.
        heads: FLUX.1 has 24, of 128 each.
        block: what `make_block` gives; made with random weights by default.

    Returns:
        `trans_block.onnx`, `single_trans_block.onnx` or the same as `.pt`.
    """
    module = wrap_block(kind, block or make_block(kind, heads))
    inputs = tuple(torch.randn(shape) for shape in input_shapes(kind, size=size, tokens=tokens, heads=heads).values())
    path = folder / f"{NAMES[kind]}{'.onnx' if form == 'onnx' else '.pt'}"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(module, inputs)  # type: ignore[no-untyped-call]
        if form == "torchscript":
            traced.save(str(path))
        else:
            torch.onnx.export(traced, inputs, str(path), dynamo=False, opset_version=OPSET)
    return path


def input_shapes(
    kind: Kind, *, size: tuple[int, int] = (1024, 1024), tokens: int = 512, heads: int = 24
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a block's inputs, in the sample's order."""
    image, width = (size[0] // 16) * (size[1] // 16), heads * 128
    rotary = (1, tokens + image, 1, 64, 2, 2)
    if kind == "single":
        return {"hidden_states": (1, tokens + image, width), "temb": (1, width), "image_rotary_emb": rotary}
    return {
        "hidden_states": (1, image, width),
        "encoder_hidden_states": (1, tokens, width),
        "temb": (1, width),
        "image_rotary_emb": rotary,
    }


def compile_arguments(model: Path, shapes: Mapping[str, tuple[int, ...]], quantize: str = "W4BF16") -> list[list[str]]:
    """What the sample calls for one block, in order: arguments of `model_transform` and of `model_deploy`.

    Both write into the folder that they are started in.
    """
    name = model.stem
    listed = str([list(shape) for shape in shapes.values()]).replace(" ", "")
    transform = ["--model_name", f"dev_{name}", "--input_shapes", listed, "--model_def", str(model)]
    deploy = ["--quantize", quantize, "--chip", "bm1684x", "--model", f"{name}_{quantize}.bmodel"]
    return [
        ["model_transform", *transform, "--mlir", f"{name}.mlir"],
        ["model_deploy", "--mlir", f"{name}.mlir", *deploy],
    ]


def make_block(kind: Kind, heads: int = 24) -> nn.Module:
    """A block of diffusers in float32 with random weights: 1.36 GB (double) or 0.57 GB (single) at FLUX.1's width."""
    cls = FluxTransformerBlock if kind == "double" else FluxSingleTransformerBlock
    block: nn.Module = cls(dim=heads * 128, num_attention_heads=heads, attention_head_dim=128)
    return block.eval().requires_grad_(False)


def wrap_block(kind: Kind, block: Any) -> nn.Module:
    """The block with the sample's inputs and its rotary embedding."""
    block.attn.set_processor(_MatrixRotary())
    return _Double(block) if kind == "double" else _Single(block)


def rotation_matrices(cos: Tensor, sin: Tensor) -> Tensor:
    """cos and sin [J, 128] of interleaved pairs, as today's diffusers has them -> [1, J, 1, 64, 2, 2]."""
    c, s = cos[:, ::2], sin[:, ::2]
    return torch.stack([c, -s, s, c], dim=-1).reshape(1, c.shape[0], 1, c.shape[1], 2, 2)


class _Double(nn.Module):
    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, image_rotary_emb: Tensor
    ) -> tuple[Tensor, Tensor]:
        text, image = self.block(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        return text, image


class _Single(nn.Module):
    """diffusers 0.30's `FluxSingleTransformerBlock.forward`: the streams are joined before the first of them."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, temb: Tensor, image_rotary_emb: Tensor) -> Tensor:
        block = self.block
        normed, gate = block.norm(hidden_states, emb=temb)
        mlp = block.act_mlp(block.proj_mlp(normed))
        attended = block.attn(hidden_states=normed, image_rotary_emb=image_rotary_emb)
        update: Tensor = gate.unsqueeze(1) * block.proj_out(torch.cat([attended, mlp], dim=2))
        return hidden_states + update


class _MatrixRotary:
    """Attention with rotary embedding as 2x2 matrices, for both kinds of block."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
    ) -> Any:
        assert image_rotary_emb is not None

        def heads(x_BLD: Tensor, norm: Any = None) -> Tensor:
            x_BLHK = x_BLD.view(1, -1, attn.heads, attn.head_dim)
            return x_BLHK if norm is None else _rms_norm(norm, x_BLHK)

        query = heads(attn.to_q(hidden_states), attn.norm_q)
        key = heads(attn.to_k(hidden_states), attn.norm_k)
        value = heads(attn.to_v(hidden_states))
        text = 0
        if encoder_hidden_states is not None:
            text = encoder_hidden_states.shape[1]
            query = torch.cat([heads(attn.add_q_proj(encoder_hidden_states), attn.norm_added_q), query], dim=1)
            key = torch.cat([heads(attn.add_k_proj(encoder_hidden_states), attn.norm_added_k), key], dim=1)
            value = torch.cat([heads(attn.add_v_proj(encoder_hidden_states)), value], dim=1)
        query, key = _turn(query, image_rotary_emb), _turn(key, image_rotary_emb)
        query, key, value = (x_BLHK.permute(0, 2, 1, 3) for x_BLHK in (query, key, value))
        joint = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        joint = joint.reshape(1, -1, attn.heads * attn.head_dim)
        if encoder_hidden_states is None:
            return joint
        return attn.to_out[0](joint[:, text:]), attn.to_add_out(joint[:, :text])


def _turn(x_BLHK: Tensor, matrices: Tensor) -> Tensor:
    """Each pair of channels times its matrix, in six dimensions: what the compiler does not find to be RoPE."""
    pairs = x_BLHK.reshape(*x_BLHK.shape[:-1], -1, 1, 2)
    turned = matrices[..., 0] * pairs[..., 0] + matrices[..., 1] * pairs[..., 1]
    return turned.reshape(x_BLHK.shape)


def _rms_norm(norm: Any, x: Tensor) -> Tensor:
    normed: Tensor = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps) * norm.weight
    return normed
