"""The text encoders as parts: CLIP with a finite causal mask, T5 as embedding, block and final norm.

Stands for `CLIPTextModel.forward`, `T5Stack.forward` and what they call (checked with transformers 5.23.0). The CLIP
mask is -10000 instead of the dtype's minimum: TPU-MLIR's own comparison overflows on the latter, and exp(-10000) is 0
in every dtype. The pooled row is picked on the host: an argmax over token ids rounds in F16 (49406 equals 49407). T5's
relative position bias depends on the length alone and is passed in, so that all its blocks are one kind; the block that
computes and returns it does not lower.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxkiln.patches.patch import Patch

_CLIP = "transformers.models.clip.modeling_clip"
_T5 = "transformers.models.t5.modeling_t5"
_CHECKED = "transformers 5.23.0"
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


class T5EmbedPart(nn.Module):
    """Token embedding: input_ids [1, T] -> hidden_states [1, T, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.shared = model.shared

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.shared(input_ids)
        return embedded


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
        gated = functional.gelu(dense.wi_0(normed), approximate="tanh") * dense.wi_1(normed)
        output: Tensor = hidden_states + dense.wo(gated)
        return output


class T5FinalPart(nn.Module):
    """The stack's final RMSNorm: hidden_states [1, T, D] -> last_hidden_state [1, T, D]."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.block = norm

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.block(hidden_states)
        return output


PATCHES = (
    Patch(
        name="finite_clip_mask",
        replaces={
            f"{_CLIP}.CLIPTextModel.forward": {
                "7bd9205e7609bb38395908dae6ac0cf3a05aac1ebc27e99faf9d3e263d779aae": _CHECKED
            },
            f"{_CLIP}.CLIPTextEmbeddings.forward": {
                "cf1a9d3793910a708113ef12aa47bd2f41cc8ea5191eb660a646a36616dfb47d": _CHECKED
            },
            f"{_CLIP}.CLIPAttention.forward": {
                "45fb45ce967c253b82b398090cb5f2799d3798f620067f2f3b84de00464561a9": _CHECKED
            },
            f"{_CLIP}.CLIPEncoderLayer.forward": {
                "75b63a9d281a8af0fcc3efb6b80f0bb0d9be9d3de4b30877f00e2d04c92abb5b": _CHECKED
            },
        },
        reason="the dtype's minimum as mask value overflows in TPU-MLIR; the pooled row is picked on the host",
        until="TPU-MLIR takes infinite masks",
        kinds=("clip",),
    ),
    Patch(
        name="t5_position_bias_input",
        replaces={
            f"{_T5}.T5Stack.forward": {"174028a21f1b16e5a025b72cff6696cd1b9d3d965275da14b086f89d14ce331b": _CHECKED},
            f"{_T5}.T5Block.forward": {"d9dcb63d53a90b3c2026b093eb88cb2d9e93e4c92deefe941e80e5de29fb4465": _CHECKED},
            f"{_T5}.T5LayerSelfAttention.forward": {
                "fce4997b3576493ffd17aad0c3c9d276478212c96682a3a739407b91a5e4bf46": _CHECKED
            },
            f"{_T5}.T5Attention.forward": {
                "44f188bfdffb355a5d3ce6fdb1333164a717dfe3e032b568791e285a69c7862f": _CHECKED
            },
            f"{_T5}.T5DenseGatedActDense.forward": {
                "3f5c41a204c168ae1ecc5a30477a766edfcbc5cbe83d633a901ecdac24f5b4c2": _CHECKED
            },
            "transformers.activations.NewGELUActivation.forward": {
                "2441603190f0572abc54cdeecd5ec577f12cba976180fd71b0947ec953cf476e": _CHECKED
            },
            f"{_T5}.T5LayerFF.forward": {"b7f2c285f08b51b024fb7d7de741f9f8678234e91b03e3b13d70d95210b94f64": _CHECKED},
            f"{_T5}.T5LayerNorm.forward": {
                "dfa1fc9512845898df464bfd54debb77fb2e6a3e734f0d5d3957ed8b58b2e780": _CHECKED
            },
        },
        reason="one kind for all blocks, the bias of the length computed on the host; GELU spelt so that it stays tanh",
        until="never: it is what makes the blocks one kind",
        kinds=("t5_embed", "t5_block", "t5_final"),
    ),
)
