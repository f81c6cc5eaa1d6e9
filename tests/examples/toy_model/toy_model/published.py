"""The model as its makers publish it: a pipeline and a transformer in diffusers' manner, with a forward of its own."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers import ModelMixin as ModelMixin  # from_pretrained looks for it beside the class of a component
from diffusers.models.attention import FeedForward
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock
from torch import Tensor, nn

# width of a feed-forward to that of the model; FLUX.1 has 4
RATIO = 2


class ToyTransformer2DModel(FluxTransformer2DModel):
    """Single blocks before double ones, with half of FLUX.1's feed-forwards."""

    @wraps(FluxTransformer2DModel.__init__)
    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        width, heads, head_width = self.inner_dim, self.config.num_attention_heads, self.config.attention_head_dim
        for block in self.transformer_blocks:
            for name in ("ff", "ff_context"):
                setattr(block, name, FeedForward(width, width, mult=RATIO, activation_fn="gelu-approximate"))
        self.single_transformer_blocks = nn.ModuleList(
            FluxSingleTransformerBlock(width, heads, head_width, mlp_ratio=RATIO)
            for _ in self.single_transformer_blocks
        )

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        img_ids: Tensor,
        txt_ids: Tensor,
        guidance: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        """The velocity [1, S, 4C]."""
        image, text = self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)
        times = [time * 1000 for time in (timestep, guidance) if time is not None]
        temb = self.time_text_embed(*times, pooled_projections)
        rotary = self.pos_embed(torch.cat((txt_ids, img_ids)))
        for block in (*self.single_transformer_blocks, *self.transformer_blocks):
            text, image = block(
                hidden_states=image, encoder_hidden_states=text, temb=temb, image_rotary_emb=rotary
            )  # fmt: skip
        return (self.proj_out(self.norm_out(image, temb)),)


class ToyPipeline(FluxPipeline):
    """FLUX.1's loop around this transformer."""
