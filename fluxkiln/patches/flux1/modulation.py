"""The transformer with its modulation hoisted out of the denoising loop: embedders, modulations, and what is left.

The AdaLN linears of blocks and tail (27 % of FLUX.1's weights) see nothing but temb, which timestep, guidance and the
pooled prompt determine before the first step. Here they are parts that take one row per step, so they run once per
image and can then be released; blocks and tail take the row of their step. Stands for `FluxTransformer2DModel.forward`
and the `forward` of the AdaLN norms (checked with diffusers 0.42.1). Shape suffix legend: see `fluxkiln.types`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fluxkiln.patches.flux1.transformer import Rows, double_block, embed_time, modulate, single_block, time_frequencies


class TimeEmbedPart(nn.Module):
    """`time_text_embed` for all steps of an image.

    Inputs: pooled_projections [1, P], timestep [M] in 0..1 and, for guidance-distilled models, guidance [M].
    Output: temb [M, D].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.time_text_embed = model.time_text_embed
        self.frequencies = time_frequencies(model.time_text_embed.time_proj)

    def forward(self, pooled_projections: Tensor, timestep: Tensor, guidance: Tensor | None = None) -> Tensor:
        return embed_time(self.time_text_embed, self.frequencies, timestep, guidance, pooled_projections)


class TokenEmbedPart(nn.Module):
    """The two token embedders of `FluxTransformer2DModel.forward`.

    Inputs: hidden_states [1, S, 4C], encoder_hidden_states [1, T, joint].
    Outputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.x_embedder = model.x_embedder
        self.context_embedder = model.context_embedder

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        return self.x_embedder(hidden_states), self.context_embedder(encoder_hidden_states)


class ModulationPart(nn.Module):
    """AdaLN linears for all steps of an image: temb [M, D] -> modulation [M, rows, D].

    The rows are in upstream's order: shift, scale, gate of attention and then of the feed-forward in a double block,
    the image's six before the text's; shift, scale, gate in a single block; scale, shift in the tail.

    Args:
        owner: the module that has the norms; names: what they are called in it.
    """

    def __init__(self, owner: Any, *names: str) -> None:
        super().__init__()
        self.block = nn.ModuleDict({name: getattr(owner, name) for name in names})

    def forward(self, temb: Tensor) -> Tensor:
        norms: list[Any] = list(self.block.values())
        made = [norm.linear(norm.silu(temb)) for norm in norms]
        joined: Tensor = made[0] if len(made) == 1 else torch.cat(made, dim=1)
        return joined.reshape(joined.shape[0], -1, temb.shape[1])


def _rows(modulation: Tensor) -> Rows:
    """[1, rows, D] -> rows [1, 1, D]."""
    return [modulation[:, row, :].unsqueeze(1) for row in range(modulation.shape[1])]


class DoubleModulatedPart(nn.Module):
    """`FluxTransformerBlock.forward` without its AdaLN linears.

    Inputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D], modulation [1, 12, D], rotary_cos, rotary_sin
    [J, K]. Outputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D].
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        # the plain LayerNorms in place of AdaLN: they have no weights, and the linears belong to another part
        block.norm1, block.norm1_context = block.norm1.norm, block.norm1_context.norm

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        block, rows = self.block, _rows(modulation)
        norms = block.norm1, block.norm1_context
        return double_block(
            block, norms, (rows[:6], rows[6:]), hidden_states, encoder_hidden_states, (rotary_cos, rotary_sin)
        )


class SingleModulatedPart(nn.Module):
    """`FluxSingleTransformerBlock.forward` without its AdaLN linear, on the joint sequence, text first.

    Inputs: hidden_states [1, J, D], modulation [1, 3, D], rotary_cos, rotary_sin [J, K]. Output: hidden_states
    [1, J, D].
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block
        block.norm = block.norm.norm

    def forward(self, hidden_states: Tensor, modulation: Tensor, rotary_cos: Tensor, rotary_sin: Tensor) -> Tensor:
        block = self.block
        return single_block(block, block.norm, _rows(modulation), hidden_states, (rotary_cos, rotary_sin))


class TailModulatedPart(nn.Module):
    """`norm_out` without its linear, and `proj_out`, of `FluxTransformer2DModel.forward`, on the image tokens.

    Inputs: hidden_states [1, S, D], modulation [1, 2, D], scale first. Output: sample [1, S, 4C].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm_out = model.norm_out.norm
        self.proj_out = model.proj_out

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        normed = modulate(self.norm_out, hidden_states, _rows(modulation), shift=1, scale=0)
        output: Tensor = self.proj_out(normed)
        return output
