"""T5's encoder as one tensor-parallel part, and the position buckets that it takes from the host.

Stands for `T5EncoderModel.forward` and what it calls (checked with transformers 5.23.0), without an attention mask, as
FLUX.1 uses it. Every rank holds its share of the heads, of their columns of the position bias table and of the gated
MLP, as `cuts.py` says; embedding and norms are whole. Which entry of the table belongs to two positions
depends on the length alone, so the host computes it, with transformers' own function.

Tensors have the dtype of the weights; norms, softmax and GELU compute in float32, as torch's kernels do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkiln.patches.collectives import Collectives
from fluxkiln.patches.flux1.text import PATCHES as WHOLE_PATCHES
from fluxkiln.patches.patch import Patch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_T5 = "transformers.models.t5.modeling_t5"
_CHECKED = "transformers 5.23.0"


def position_buckets(config: Mapping[str, Any], tokens: int) -> NDArray[np.int32]:
    """[T, T] int32: the row of the position bias table for each query position (first axis) and key position.

    Args:
        config: `config.json` of text_encoder_2.

    Source: `T5Attention.compute_bias` of transformers; the bucketing is its own `_relative_position_bucket`.
    """
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    t5: Any = T5Config(**config)
    position = torch.arange(tokens, device="cpu")
    buckets = T5Attention._relative_position_bucket(
        position[None, :] - position[:, None],
        bidirectional=True,
        num_buckets=t5.relative_attention_num_buckets,
        max_distance=t5.relative_attention_max_distance,
    )
    rows: NDArray[np.int32] = buckets.to(torch.int32).numpy()
    return rows


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


_BLOCKS = next(patch for patch in WHOLE_PATCHES if patch.name == "t5_position_bias_input")
PATCHES = (
    Patch(
        name="parallel_t5",
        replaces={
            **_BLOCKS.replaces,
            f"{_T5}.T5Attention._relative_position_bucket": {
                "a8b2e328358ae60a8cccc4b68fa51b9ff065491b6659c3d2c3ee37dff911959a": _CHECKED
            },
            f"{_T5}.T5Attention.compute_bias": {
                "1404749cb905c8f476666414044af9a33fd2d0a1996da8aad4cc312686b7cb00": _CHECKED
            },
        },
        reason="each rank computes its share of heads and MLP; the table's rows are chosen by the host",
        until="never: it is what cuts the model over cores",
        kinds=("parallel_t5",),
    ),
)
