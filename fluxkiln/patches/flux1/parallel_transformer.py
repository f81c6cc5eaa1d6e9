"""The transformer as tensor-parallel parts: each rank has its share of the heads and of the MLPs, see `kinds.CUTS`.

Stands for the same upstream functions as `transformer.py` (checked with diffusers 0.42.1), in the form that takes its
modulation as an input. A row-parallel linear is a linear without bias, a reduction, then the bias, once and not once
per rank. Tensors have the dtype of the weights. Norms, softmax and activation functions compute in float32 and round
their result to it, as torch's own kernels do and a compiler does not by itself; the sinusoids of time and guidance and
the rotary embedding are float32 whatever the dtype. Shape suffix legend: see `fluxkiln.types`.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fluxkiln.patches.cut import Collectives
from fluxkiln.patches.flux1.transformer import GATE, GATE_MLP, SCALE, SCALE_MLP, SHIFT, SHIFT_MLP, Rows, embed_time


def _layer_norm(norm: Any, x_BLD: Tensor) -> Tensor:
    """LayerNorm without weights, computed in float32."""
    return F.layer_norm(x_BLD.float(), tuple(norm.normalized_shape), eps=norm.eps).to(x_BLD.dtype)


def _head_norm(norm: Any, x_BLHK: Tensor) -> Tensor:
    """`torch.nn.RMSNorm` of q or k over the head width, computed in float32."""
    x = x_BLHK.float()
    normed: Tensor = x * torch.rsqrt(torch.mean(x * x, dim=-1, keepdim=True) + norm.eps) * norm.weight.float()
    return normed.to(x_BLHK.dtype)


def _rotate(x_BLHK: Tensor, cos_LK: Tensor, sin_LK: Tensor) -> Tensor:
    """Rotary embedding of interleaved pairs in float32, as `diffusers.models.embeddings.apply_rotary_emb`."""
    x = x_BLHK.float()
    real, imag = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    rotated = torch.stack([-imag, real], dim=-1).flatten(3)
    cos, sin = cos_LK.float()[None, :, None, :], sin_LK.float()[None, :, None, :]
    return (x * cos + rotated * sin).to(x_BLHK.dtype)


def _attend(query_BLHK: Tensor, key_BLHK: Tensor, value_BLHK: Tensor) -> Tensor:
    """Softmax attention over the heads of this rank; returns [B, L, H K]."""
    scores_BHLL = query_BLHK.transpose(1, 2) @ key_BLHK.permute(0, 2, 3, 1)
    weights_BHLL = (scores_BHLL.float() * query_BLHK.shape[-1] ** -0.5).softmax(dim=-1).to(value_BLHK.dtype)
    attended: Tensor = weights_BHLL @ value_BLHK.transpose(1, 2)
    return attended.transpose(1, 2).flatten(2)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x.float(), approximate="tanh").to(x.dtype)


def _silu(x: Tensor) -> Tensor:
    return F.silu(x.float()).to(x.dtype)


def _modulate(norm: Any, x_BLD: Tensor, rows: Rows, shift: int, scale: int) -> Tensor:
    """norm(x) (1 + scale) + shift, as the `forward` of every AdaLN norm ends."""
    return _layer_norm(norm, x_BLD) * (1 + rows[scale]) + rows[shift]


def _rows(modulation: Tensor) -> Rows:
    """[1, rows, D] -> rows [1, 1, D]."""
    return [modulation[:, row : row + 1] for row in range(modulation.shape[1])]


class ParallelHead(nn.Module):
    """Token embedders, time embedding, and the AdaLN linears of all blocks and of the tail, of each some rows a rank.

    Inputs: hidden_states [1, S, 4C], encoder_hidden_states [1, T, joint], pooled_projections [1, P], timestep [1] in
    0..1 and, for guidance-distilled models, guidance [1]; the last two float32. Outputs: hidden_states [1, S, D],
    encoder_hidden_states [1, T, D], modulation [1, rows, D] in the order of
    `fluxkiln.patches.flux1.parallel.modulation_rows`. One gather.

    Args:
        head: `fluxkiln.patches.flux1.transformer.HeadPart`.
        norms: the AdaLN norms by the names the checkpoint has for them, double blocks first, then single ones, then the
            tail's: each as a module that has nothing but `linear`.
    """

    def __init__(self, head: Any, norms: dict[str, nn.Module], collectives: Collectives) -> None:
        super().__init__()
        self.x_embedder, self.context_embedder = head.x_embedder, head.context_embedder
        self.time_text_embed, self.frequencies = head.time_text_embed, head.frequencies
        self.collectives, self.names = collectives, tuple(norms)
        for name, norm in norms.items():
            _place(self, name, norm)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype, embed = self.x_embedder.weight.dtype, self.time_text_embed

        def embedder(mlp: Any) -> Any:
            return lambda x: mlp.linear_2(_silu(mlp.linear_1(x.to(dtype))))

        kinds = ("timestep_embedder", "guidance_embedder", "text_embedder")
        embedders = SimpleNamespace(**{kind: embedder(getattr(embed, kind)) for kind in kinds if hasattr(embed, kind)})
        times = timestep.float(), None if guidance is None else guidance.float()
        temb_1D = embed_time(embedders, self.frequencies, *times, pooled_projections)
        return (
            self.x_embedder(hidden_states.to(dtype)),
            self.context_embedder(encoder_hidden_states.to(dtype)),
            self._modulation(_silu(temb_1D)),
        )

    def _modulation(self, active_1D: Tensor) -> Tensor:
        """All rows of modulation of silu(temb): each rank computes a run of the features of every linear."""
        local = [self.get_submodule(f"{name}.linear")(active_1D) for name in self.names]
        gathered = self.collectives.all_gather(torch.cat(local, dim=1))
        rows, start = [], 0
        for part in local:
            stop = start + part.shape[1]
            # the runs of the ranks one after the other are the linear's features as upstream has them
            rows.append(gathered[:, 0, start:stop].reshape(1, -1, active_1D.shape[1]))
            start = stop
        return torch.cat(rows, dim=1)


def _place(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` below `root` where a dotted name says, with plain containers on the way."""
    *path, leaf = name.split(".")
    for piece in path:
        if not hasattr(root, piece):
            root.add_module(piece, nn.Module())
        root = root.get_submodule(piece)
    root.add_module(leaf, module)


class ParallelDouble(nn.Module):
    """`FluxTransformerBlock.forward` without its AdaLN linears.

    Two reductions, of text and image together: one after the attention, one after the MLPs.

    Inputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D], modulation [1, 12, D], rotary_cos, rotary_sin
    [J, K] float32. Outputs: hidden_states [1, S, D], encoder_hidden_states [1, T, D].

    Args:
        block: upstream's, with plain LayerNorms as norm1 and norm1_context.
    """

    def __init__(self, block: Any, collectives: Collectives) -> None:
        super().__init__()
        self.collectives = collectives
        for name, child in block.named_children():
            self.add_module(name, child)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        modulation: Tensor,
        rotary_cos: Tensor,
        rotary_sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        attn: Any = self.attn
        tokens, rows = encoder_hidden_states.shape[1], _rows(modulation)
        rows, text_rows = rows[:6], rows[6:]
        image = _modulate(self.norm1, hidden_states, rows, SHIFT, SCALE)
        text = _modulate(self.norm1_context, encoder_hidden_states, text_rows, SHIFT, SCALE)

        def heads(of_text: Any, of_image: Any, *norms: Any) -> Tensor:
            both = [torch.unflatten(x, -1, (-1, attn.head_dim)) for x in (of_text(text), of_image(image))]
            if norms:
                both = [_head_norm(norm, x_BLHK) for norm, x_BLHK in zip(norms, both, strict=True)]
            return torch.cat(both, dim=1)

        query = heads(attn.add_q_proj, attn.to_q, attn.norm_added_q, attn.norm_q)
        key = heads(attn.add_k_proj, attn.to_k, attn.norm_added_k, attn.norm_k)
        value = heads(attn.add_v_proj, attn.to_v)
        rotary = rotary_cos, rotary_sin
        joint = _attend(_rotate(query, *rotary), _rotate(key, *rotary), value)
        text, image = self._reduce(joint[:, :tokens], joint[:, tokens:], attn.to_add_out, attn.to_out[0])
        encoder_hidden_states = encoder_hidden_states + text_rows[GATE] * text
        hidden_states = hidden_states + rows[GATE] * image

        text = _modulate(self.norm2_context, encoder_hidden_states, text_rows, SHIFT_MLP, SCALE_MLP)
        image = _modulate(self.norm2, hidden_states, rows, SHIFT_MLP, SCALE_MLP)
        of_text: Any = self.ff_context
        of_image: Any = self.ff
        text, image = _gelu(of_text.net[0].proj(text)), _gelu(of_image.net[0].proj(image))
        text, image = self._reduce(text, image, of_text.net[2], of_image.net[2])
        return hidden_states + rows[GATE_MLP] * image, encoder_hidden_states + text_rows[GATE_MLP] * text

    def _reduce(self, text: Tensor, image: Tensor, of_text: Any, of_image: Any) -> tuple[Tensor, Tensor]:
        """Two row-parallel linears with one reduction for both."""
        partial = torch.cat([F.linear(text, of_text.weight), F.linear(image, of_image.weight)], dim=1)
        summed, tokens = self.collectives.all_reduce(partial), text.shape[1]
        return summed[:, :tokens] + of_text.bias, summed[:, tokens:] + of_image.bias


class SplitProjection(nn.Module):
    """A single block's `proj_out` as two: the columns behind the attention and those behind the MLP; one bias."""

    def __init__(self, linear: Any) -> None:
        super().__init__()
        out_features, in_features = linear.weight.shape
        self.weight_attention = nn.Parameter(linear.weight.new_empty(out_features, out_features))
        self.weight_mlp = nn.Parameter(linear.weight.new_empty(out_features, in_features - out_features))
        self.bias = linear.bias


class ParallelSingle(nn.Module):
    """`FluxSingleTransformerBlock.forward` without its AdaLN linear, on the joint sequence, text first.

    One reduction, of what the halves of the projection behind attention and MLP give together.

    Inputs: hidden_states [1, J, D], modulation [1, 3, D], rotary_cos, rotary_sin [J, K] float32. Output: hidden_states
    [1, J, D].

    Args:
        block: upstream's, with a plain LayerNorm as norm.
    """

    def __init__(self, block: Any, collectives: Collectives) -> None:
        super().__init__()
        self.collectives = collectives
        for name, child in block.named_children():
            self.add_module(name, SplitProjection(child) if name == "proj_out" else child)

    def forward(self, hidden_states: Tensor, modulation: Tensor, rotary_cos: Tensor, rotary_sin: Tensor) -> Tensor:
        own: Any = self
        attn, out = own.attn, own.proj_out
        rows = _rows(modulation)
        normed = _modulate(self.norm, hidden_states, rows, SHIFT, SCALE)
        query, key, value = (
            torch.unflatten(linear(normed), -1, (-1, attn.head_dim)) for linear in (attn.to_q, attn.to_k, attn.to_v)
        )
        query = _rotate(_head_norm(attn.norm_q, query), rotary_cos, rotary_sin)
        key = _rotate(_head_norm(attn.norm_k, key), rotary_cos, rotary_sin)
        partial = F.linear(_attend(query, key, value), out.weight_attention)
        partial = partial + F.linear(_gelu(own.proj_mlp(normed)), out.weight_mlp)
        update: Tensor = self.collectives.all_reduce(partial) + out.bias
        return hidden_states + rows[GATE] * update


class ParallelTail(nn.Module):
    """`norm_out` without its linear, and `proj_out`, on the image tokens; the same on every rank.

    Inputs: hidden_states [1, S, D], modulation [1, 2, D], scale first. Output: sample [1, S, 4C].
    """

    def __init__(self, tail: Any) -> None:
        super().__init__()
        self.norm_out, self.proj_out = tail.norm_out, tail.proj_out

    def forward(self, hidden_states: Tensor, modulation: Tensor) -> Tensor:
        output: Tensor = self.proj_out(_modulate(self.norm_out, hidden_states, _rows(modulation), shift=1, scale=0))
        return output
