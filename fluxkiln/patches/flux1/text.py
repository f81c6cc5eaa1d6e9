"""The text encoders as parts: CLIP with a finite causal mask, T5's block, and T5 whole but cut over ranks.

Stands for `CLIPTextModel.forward`, `T5EncoderModel.forward` and what they call (checked with transformers 5.23.0),
without an attention mask, as FLUX.1 uses them. CLIP's causal mask is -10000 instead of the dtype's minimum: TPU-MLIR's
own comparison overflows on the latter, and exp(-10000) is 0 in every dtype. The pooled row is picked on the host: an
argmax over token ids rounds in F16 (49406 equals 49407). T5's relative position bias depends on the length alone and is
passed in, so that all its blocks are one kind; the block that computes and returns it does not lower.

Cut over ranks, every rank holds its share of the heads, of their columns of the position bias table and of the gated
MLP, as `kinds.CUTS` says; embedding and norms are whole. The host says which entry of the table belongs to two
positions. Tensors have the dtype of the weights; norms, softmax and GELU compute in float32, as torch's kernels do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkiln.patches.cut import Collectives

MASKED_SCORE = -10000.0


class ClipPart(nn.Module):
    """`CLIPTextModel.forward` without pooling: input_ids [1, 77] -> last_hidden_state [1, 77, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embeddings = model.embeddings
        self.encoder = model.encoder
        self.final_layer_norm = model.final_layer_norm

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_states = self.embeddings.token_embedding(input_ids) + self.embeddings.position_embedding.weight[None]
        tokens = hidden_states.shape[1]
        position = torch.arange(tokens, device=hidden_states.device)
        mask = (position[None, :] > position[:, None]).to(hidden_states.dtype) * MASKED_SCORE
        for layer in self.encoder.layers:
            hidden_states = hidden_states + self._attend(layer.self_attn, layer.layer_norm1(hidden_states), mask)
            hidden_states = hidden_states + layer.mlp(layer.layer_norm2(hidden_states))
        output: Tensor = self.final_layer_norm(hidden_states)
        return output

    @staticmethod
    def _attend(attn: Any, x_BLD: Tensor, mask: Tensor) -> Tensor:
        def heads(projection: nn.Module) -> Tensor:
            split: Tensor = projection(x_BLD).unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)
            return split

        scores = heads(attn.q_proj) @ heads(attn.k_proj).transpose(-1, -2) * attn.scale
        weights = (scores + mask).softmax(dim=-1)
        attended: Tensor = attn.out_proj((weights @ heads(attn.v_proj)).transpose(1, 2).flatten(2))
        return attended


class T5BlockPart(nn.Module):
    """`T5Block.forward` of the encoder: hidden_states [1, T, D], position_bias [1, H, T, T] -> hidden_states."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden_states: Tensor, position_bias: Tensor) -> Tensor:
        attention, feed_forward = self.block.layer[0], self.block.layer[1]
        attn = attention.SelfAttention
        normed = attention.layer_norm(hidden_states)

        def heads(projection: nn.Module) -> Tensor:
            split: Tensor = projection(normed).unflatten(-1, (attn.n_heads, attn.key_value_proj_dim)).transpose(1, 2)
            return split

        weights = (heads(attn.q) @ heads(attn.k).transpose(-1, -2) + position_bias).softmax(dim=-1)
        hidden_states = hidden_states + attn.o((weights @ heads(attn.v)).transpose(1, 2).flatten(2))
        normed, dense = feed_forward.layer_norm(hidden_states), feed_forward.DenseReluDense
        # transformers' own spelling has a Pow, which TPU-MLIR takes for the erf GELU: 8e-5 off, without a word
        gated = F.gelu(dense.wi_0(normed), approximate="tanh") * dense.wi_1(normed)
        output: Tensor = hidden_states + dense.wo(gated)
        return output


class ParallelT5(nn.Module):
    """The whole encoder; two reductions per block.

    Inputs: input_ids [1, T] and position_buckets [T, T], both int32. Output: last_hidden_state [1, T, D].

    Args:
        model: `T5EncoderModel`.
    """

    def __init__(self, model: Any, collectives: Collectives) -> None:
        super().__init__()
        encoder = model.encoder
        self.collectives, self.shared = collectives, model.shared
        self.encoder = nn.ModuleDict({"block": encoder.block, "final_layer_norm": encoder.final_layer_norm})

    def forward(self, input_ids: Tensor, position_buckets: Tensor) -> Tensor:
        blocks: Any = self.encoder["block"]
        table = blocks[0].layer[0].SelfAttention.relative_attention_bias.weight
        bias_BHLL = F.embedding(position_buckets, table).permute(2, 0, 1)[None]
        hidden_states = F.embedding(input_ids, self.shared.weight)
        for block in blocks:
            hidden_states = hidden_states + self._attention(block.layer[0], hidden_states, bias_BHLL)
            hidden_states = hidden_states + self._feed_forward(block.layer[1], hidden_states)
        return _rms_norm(self.encoder["final_layer_norm"], hidden_states)

    def _attention(self, layer: Any, x_BLD: Tensor, bias_BHLL: Tensor) -> Tensor:
        attn, normed = layer.SelfAttention, _rms_norm(layer.layer_norm, x_BLD)

        def heads(projection: nn.Module) -> Tensor:
            split: Tensor = projection(normed).unflatten(-1, (-1, attn.key_value_proj_dim)).transpose(1, 2)
            return split

        # T5 does not scale its scores
        scores_BHLL = heads(attn.q) @ heads(attn.k).transpose(-1, -2) + bias_BHLL
        weights_BHLL = scores_BHLL.float().softmax(dim=-1).to(x_BLD.dtype)
        attended = (weights_BHLL @ heads(attn.v)).transpose(1, 2).flatten(2)
        return self.collectives.all_reduce(F.linear(attended, attn.o.weight))

    def _feed_forward(self, layer: Any, x_BLD: Tensor) -> Tensor:
        dense, normed = layer.DenseReluDense, _rms_norm(layer.layer_norm, x_BLD)
        gate = F.gelu(dense.wi_0(normed).float(), approximate="tanh").to(x_BLD.dtype)
        return self.collectives.all_reduce(F.linear(gate * dense.wi_1(normed), dense.wo.weight))


def _rms_norm(norm: Any, x_BLD: Tensor) -> Tensor:
    """`T5LayerNorm.forward`: normalized in float32, rounded, then times the weight."""
    x = x_BLD.float()
    normed = x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + norm.variance_epsilon)
    scaled: Tensor = norm.weight * normed.to(norm.weight.dtype)
    return scaled
