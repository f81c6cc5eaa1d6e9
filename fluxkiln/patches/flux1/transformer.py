"""The transformer as parts: head, double, single, tail, with RoPE computed on the host.

`modulation.py` has the other form of the same parts, made of the same functions. Stands for
`FluxTransformer2DModel.forward` and what it calls (checked with diffusers 0.42.1). A part takes cos and sin as inputs,
so the float64 sinusoids of `FluxPosEmbed` never reach a compiler. The block forwards are re-stated for the compiler:
RMSNorm and RoPE act on each stream before the streams are joined, the values are joined before the head axis is split
off, the projection behind the single block's concatenation becomes one matmul per input, feed-forwards run in two
halves, and the softmax scale lies in the RMSNorm weights of q and k. Statements stand in the order in which a chip is
to run them: projections before the norms of their results, and every operation next to the one that reads it. This
saves passes over memory on the chip and changes the result by float rounding only (`python -m bench formulations`).
Each of it can go when a compiler finds it by itself. Shape suffix legend: see `fluxkiln.types`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkiln.errors import PatchError

_TURN_HIGH = 6.28125
# what upstream's AdaLN linear makes of temb, cut into rows [1, 1, D]
Rows = Sequence[Tensor]
# their order in a block; in the tail scale comes first
SHIFT, SCALE, GATE, SHIFT_MLP, SCALE_MLP, GATE_MLP = range(6)


def _rotate(x_BLHK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs, in the form TPU-MLIR fuses to `top.Rope`.

    Source: `diffusers.models.embeddings.apply_rotary_emb` with use_real_unbind_dim=-1, sequence_dim=1.
    """
    real, imag = x_BLHK.reshape(*x_BLHK.shape[:-1], -1, 2).unbind(-1)
    rotated_BLHK = torch.stack([-imag, real], dim=-1).flatten(3)
    return x_BLHK * cos_LK[None, :, None, :] + rotated_BLHK * sin_LK[None, :, None, :]


def _head_norm(norm: Any, x_BLHK: Tensor) -> Tensor:
    """RMSNorm of q or k over the head width, with K^-1/4 in its weight: K^-1/2, the softmax scale, in all."""
    factor = float(norm.normalized_shape[0]) ** -0.25
    return F.rms_norm(x_BLHK, norm.normalized_shape, norm.weight * factor, norm.eps)


def explicit_rms_norm(
    input: Tensor, normalized_shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """`torch.nn.functional.rms_norm` (checked with torch 2.13.0) in plain operators.

    The TorchScript exporter has no symbolic for `aten::rms_norm`. This form exports at opset 17, and TPU-MLIR fuses it
    back into `top.RMSNorm`. `eps` None means the machine epsilon, as in torch.
    """
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    axes = list(range(-len(normalized_shape), 0))
    normed = input * torch.rsqrt(torch.mean(input * input, dim=axes, keepdim=True) + eps)
    return normed if weight is None else normed * weight


def _attend(query_BLHK: Tensor, key_BLHK: Tensor, value_BLD: Tensor, head_dim: int) -> Tensor:
    """Softmax attention over already scaled q and k; returns [B, L, D].

    Matmul, softmax, matmul is the form TPU-MLIR tiles without writing the L x L scores to memory.
    """
    value_BHLK = torch.unflatten(value_BLD, -1, (-1, head_dim)).transpose(1, 2)
    scores_BHLL = query_BLHK.transpose(1, 2) @ key_BLHK.permute(0, 2, 3, 1)
    return (scores_BHLL.softmax(dim=-1) @ value_BHLK).transpose(1, 2).flatten(2)


def _mlp(x_BLD: Tensor, up: Any, down: Any, bias: Tensor | None) -> Tensor:
    """Linear, tanh GELU and linear, in two halves of the inner width that are summed at the end.

    Args:
        up, down: the linears. What `down` has more columns than `up` has rows, in front, belongs to something else.
        bias: `down`'s, if it is to be added here.
    """
    width = up.weight.shape[0]
    first, half = down.weight.shape[1] - width, width // 2

    def branch(start: int, bias: Tensor | None) -> Tensor:
        rows = slice(start, start + half)
        inner = F.gelu(F.linear(x_BLD, up.weight[rows], up.bias[rows]), approximate="tanh")
        return F.linear(inner, down.weight[:, first + start : first + start + half], bias)

    return branch(0, bias) + branch(half, None)


def _feed_forward(ff: Any, x_BLD: Tensor) -> Tensor:
    """`diffusers.models.attention.FeedForward` with tanh GELU."""
    return _mlp(x_BLD, ff.net[0].proj, ff.net[2], ff.net[2].bias)


class HeadPart(nn.Module):
    """Embedders of `FluxTransformer2DModel.forward`, up to the first block.

    Inputs: hidden_states [1, S, 4C], encoder_hidden_states [1, T, joint], pooled_projections [1, pooled],
    timestep [1] in 0..1 and, for guidance-distilled models, guidance [1], as the pipeline hands them over.
    Outputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D], temb [1, D].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder
        self.context_embedder = model.context_embedder
        self.time_text_embed = model.time_text_embed
        self.frequencies = time_frequencies(model.time_text_embed.time_proj)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        temb = embed_time(self.time_text_embed, self.frequencies, timestep, guidance, pooled_projections)
        return self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states), temb


def embed_time(
    embed: Any, frequencies: list[float], timestep_M: Tensor, guidance_M: Tensor | None, pooled_1P: Tensor
) -> Tensor:
    """temb [M, D] of M timesteps in 0..1 for one prompt; guidance for guidance-distilled models only.

    Args:
        embed: upstream's `time_text_embed`; frequencies: see `time_frequencies`.
    """
    temb = embed.timestep_embedder(_sinusoid(frequencies, timestep_M * 1000))
    if guidance_M is not None:
        temb = temb + embed.guidance_embedder(_sinusoid(frequencies, guidance_M * 1000))
    temb_MD: Tensor = temb + embed.text_embedder(pooled_1P)
    return temb_MD


def _sinusoid(frequencies: list[float], time_M: Tensor) -> Tensor:
    """`get_timestep_embedding` with flip_sin_to_cos: times or guidances [M], times 1000 -> [M, 256].

    Whole turns are taken off first: the chip's own sin and cos lose 2e-5 at large angles. The first of the two
    constants of a turn has 8 bits, so that its product with the number of turns is exact (Cody and Waite).
    """
    angle = time_M[:, None] * torch.tensor([frequencies], device=time_M.device)
    turns = torch.round(angle * (1 / math.tau))
    angle = (angle - turns * _TURN_HIGH) - turns * (math.tau - _TURN_HIGH)
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def time_frequencies(time_proj: Any) -> list[float]:
    """The sinusoid's frequencies as upstream computes them in float32 on the CPU.

    They are constants of the graph: an exp that is one bit off moves the embedding by 2e-5, the angle being up to 1000.
    """
    if not time_proj.flip_sin_to_cos or time_proj.downscale_freq_shift != 0 or time_proj.scale != 1:
        raise PatchError("the time projection is not FLUX.1's: flip_sin_to_cos, no shift, scale 1 are expected")
    half = time_proj.num_channels // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device="cpu") / half
    frequencies: list[float] = torch.exp(exponent).tolist()
    return frequencies


class DoublePart(nn.Module):
    """`FluxTransformerBlock.forward`.

    Inputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D], temb [1, D], rotary_cos, rotary_sin [J, K].
    Outputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D].
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(
        self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_cos: Tensor, rotary_sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        block = self.block
        norms = block.norm1.norm, block.norm1_context.norm
        rows = _rows(block.norm1, temb, 6), _rows(block.norm1_context, temb, 6)
        return double_block(block, norms, rows, hidden_states, encoder_hidden_states, (rotary_cos, rotary_sin))


def _rows(norm: Any, temb: Tensor, count: int) -> Rows:
    """What upstream's AdaLN norms make of temb before they normalize."""
    return [row_1D[:, None] for row_1D in norm.linear(norm.silu(temb)).chunk(count, dim=1)]


def modulate(norm: nn.Module, x_BLD: Tensor, rows: Rows, shift: int, scale: int) -> Tensor:
    """norm(x) (1 + scale) + shift, as the `forward` of every AdaLN norm ends."""
    modulated: Tensor = norm(x_BLD) * (1 + rows[scale]) + rows[shift]
    return modulated


def double_block(
    block: Any,
    norms: tuple[nn.Module, nn.Module],
    both_rows: tuple[Rows, Rows],
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    rotary: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    """`FluxTransformerBlock.forward` with the modulation given; returns image and text tokens.

    Args:
        norms: the plain LayerNorms in front of the attention; these and `both_rows` are of the image, then of the text.
    """
    attn, tokens = block.attn, encoder_hidden_states.shape[1]
    rotary_cos, rotary_sin = rotary
    rows, text_rows = both_rows
    image_norm = modulate(norms[0], hidden_states, rows, SHIFT, SCALE)
    text_norm = modulate(norms[1], encoder_hidden_states, text_rows, SHIFT, SCALE)

    def heads(x_BLD: Tensor, norm: Any, place: slice) -> Tensor:
        x_BLHK = _head_norm(norm, torch.unflatten(x_BLD, -1, (-1, attn.head_dim)))
        return _rotate(x_BLHK, rotary_cos[place], rotary_sin[place])

    of_text, of_image = slice(0, tokens), slice(tokens, None)
    value = torch.cat([attn.add_v_proj(text_norm), attn.to_v(image_norm)], dim=1)
    text_key, image_key = attn.add_k_proj(text_norm), attn.to_k(image_norm)
    text_query, image_query = attn.add_q_proj(text_norm), attn.to_q(image_norm)
    key = torch.cat([heads(text_key, attn.norm_added_k, of_text), heads(image_key, attn.norm_k, of_image)], dim=1)
    query = torch.cat([heads(text_query, attn.norm_added_q, of_text), heads(image_query, attn.norm_q, of_image)], dim=1)
    joint = _attend(query, key, value, attn.head_dim)

    hidden_states = hidden_states + rows[GATE] * attn.to_out[0](joint[:, tokens:])
    image_norm = modulate(block.norm2, hidden_states, rows, SHIFT_MLP, SCALE_MLP)
    encoder_hidden_states = encoder_hidden_states + text_rows[GATE] * attn.to_add_out(joint[:, :tokens])
    text_norm = modulate(block.norm2_context, encoder_hidden_states, text_rows, SHIFT_MLP, SCALE_MLP)
    encoder_hidden_states = encoder_hidden_states + text_rows[GATE_MLP] * _feed_forward(block.ff_context, text_norm)
    return hidden_states + rows[GATE_MLP] * _feed_forward(block.ff, image_norm), encoder_hidden_states


class SinglePart(nn.Module):
    """`FluxSingleTransformerBlock.forward` on the joint sequence, text first.

    Inputs: hidden_states [1, J, D], temb [1, D], rotary_cos, rotary_sin [J, K]. Output: hidden_states [1, J, D].
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, temb: Tensor, rotary_cos: Tensor, rotary_sin: Tensor) -> Tensor:
        norm = self.block.norm
        return single_block(self.block, norm.norm, _rows(norm, temb, 3), hidden_states, (rotary_cos, rotary_sin))


def single_block(
    block: Any, norm: nn.Module, rows: Rows, hidden_states: Tensor, rotary: tuple[Tensor, Tensor]
) -> Tensor:
    """`FluxSingleTransformerBlock.forward` on the joint sequence, with its plain LayerNorm and the modulation given."""
    attn = block.attn
    normed = modulate(norm, hidden_states, rows, SHIFT, SCALE)

    def heads(x_BLD: Tensor, norm: Any) -> Tensor:
        return _rotate(_head_norm(norm, torch.unflatten(x_BLD, -1, (-1, attn.head_dim))), *rotary)

    value, key, query = attn.to_v(normed), attn.to_k(normed), attn.to_q(normed)
    key, query = heads(key, attn.norm_k), heads(query, attn.norm_q)
    attended = _attend(query, key, value, attn.head_dim)
    update = F.linear(attended, block.proj_out.weight[:, : attended.shape[-1]], block.proj_out.bias)
    return hidden_states + rows[GATE] * (update + _mlp(normed, block.proj_mlp, block.proj_out, None))


class TailPart(nn.Module):
    """`norm_out` and `proj_out` of `FluxTransformer2DModel.forward`, on the image tokens.

    Inputs: hidden_states [1, S, D], temb [1, D]. Output: sample [1, S, 4C].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out = model.norm_out
        self.proj_out = model.proj_out

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        rows = _rows(self.norm_out, temb, 2)
        output: Tensor = self.proj_out(modulate(self.norm_out.norm, hidden_states, rows, shift=1, scale=0))
        return output
