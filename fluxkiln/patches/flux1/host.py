"""What the host computes once per shape and passes to the parts: RoPE's cos and sin, T5's position bias, CLIP's row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.patches.model import ReadTensor
from fluxkiln.types import Configs, Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

T5_BIAS_TABLE = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


def make_constants(configs: Configs, shapes: Shapes, read: ReadTensor, split: bool) -> dict[str, NDArray[Any]]:
    """What the host hands to the parts of the components that are there, by name.

    `rotary_cos`, `rotary_sin` [J, K] float32; of T5 `position_bias` [1, H, T, T] float32, or where the model is cut
    over ranks `position_buckets` [T, T] int32.
    """
    constants: dict[str, NDArray[Any]] = {}
    if "transformer" in configs:
        constants |= rotary_embedding(configs["transformer"], shapes)
    if "text_encoder_2" in configs and split:
        from fluxkiln.patches.flux1.parallel_text import position_buckets

        constants["position_buckets"] = position_buckets(configs["text_encoder_2"], shapes.tokens)
    elif "text_encoder_2" in configs:
        constants["position_bias"] = position_bias(configs["text_encoder_2"], shapes, read)
    return constants


def rotary_embedding(config: Mapping[str, Any], shapes: Shapes) -> dict[str, NDArray[Any]]:
    """cos and sin [J, K] float32 of every position, text first, by diffusers' own `FluxPosEmbed` in float64.

    Source: `FluxPipeline._prepare_latent_image_ids` for the positions of the image; text stands at 0, 0, 0.
    """
    import torch
    from diffusers import FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    rows, columns = shapes.height // 16, shapes.width // 16
    image_ids = FluxPipeline._prepare_latent_image_ids(1, rows, columns, torch.device("cpu"), torch.float32)
    ids = torch.cat([torch.zeros(shapes.tokens, 3), image_ids])
    cos, sin = FluxPosEmbed(theta=10000, axes_dim=list(config["axes_dims_rope"]))(ids)
    return {"rotary_cos": cos.float().numpy(), "rotary_sin": sin.float().numpy()}


def position_bias(t5: Mapping[str, Any], shapes: Shapes, read: ReadTensor) -> NDArray[Any]:
    """T5's relative position bias [1, H, T, T] float32, by transformers' own bucketing from block 0's table."""
    import numpy as np
    import torch
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    config = T5Config(**t5)
    table = read("text_encoder_2", T5_BIAS_TABLE).astype(np.float32)
    with torch.device("meta"):
        attention = T5Attention(config, has_relative_attention_bias=True, layer_idx=0)
    attention.relative_attention_bias.weight = torch.nn.Parameter(torch.from_numpy(table), requires_grad=False)
    bias = attention.compute_bias(shapes.tokens, shapes.tokens, device=torch.device("cpu"))
    values: NDArray[Any] = bias.detach().float().numpy()
    return values


def pooled_row(input_ids: NDArray[Any], config: Mapping[str, Any]) -> int:
    """The row of CLIP's last hidden state that is the pooled output.

    Source: `CLIPTextModel.forward`: the highest token id when eos_token_id is 2 (as in FLUX.1), else the first end
    token.
    """
    ids = input_ids.reshape(-1)
    eos = int(config.get("eos_token_id", 2))
    return int(ids.argmax() if eos == 2 else (ids == eos).argmax())
