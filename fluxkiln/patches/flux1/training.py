"""What training asks of FLUX.1 (checked with diffusers 0.42.1): latents of pictures, the prediction for noisy ones, and
the layout of a LoRA in the FLUX example of ml-explore/mlx-examples.

Shapes: B = pictures, S = image tokens, C = latent channels, T = text tokens, O = out features, I = in features,
R = rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fluxkiln.patches.pipeline import quiet
from fluxkiln.types import Shapes

Pair = tuple[Tensor, Tensor]  # down_RI, up_OR


def encode_image(pipe: Any, image: NDArray[Any]) -> NDArray[np.float32]:
    """Latents [1, S, 4C], packed and scaled as the pipeline's loop has them, of an image [height, width, 3] in 0..1.

    The mean of the encoder's distribution, so that the same picture always has the same latents.
    Source: the reverse of the end of diffusers' `FluxPipeline.__call__`.
    """
    config = pipe.vae.config
    with torch.no_grad(), quiet():
        pixels = torch.from_numpy(np.ascontiguousarray(image, np.float32)).permute(2, 0, 1)[None] * 2 - 1
        latents = (pipe.vae.encode(pixels).latent_dist.mode() - config.shift_factor) * config.scaling_factor
        packed: NDArray[np.float32] = pipe._pack_latents(latents, *latents.shape).numpy()
    return packed


def begin_training(transformer: Any) -> None:
    """Weights to begin with: every block is the identity, as DiT's are (arXiv 2212.09748), and so is the whole.

    What comes in leaves again with the size of pure noise, which at the noisiest level is the velocity but for the
    picture: what is left to learn there is what the text says.
    """
    init = torch.nn.init
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear):
            init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
            if "norm" in name:
                init.zeros_(module.weight)
    init.orthogonal_(transformer.x_embedder.weight)
    with torch.no_grad():
        # the last norm divides by the root mean square over the width, which the embedding has spread the latents over
        width, channels = transformer.x_embedder.weight.shape
        transformer.proj_out.weight.copy_((channels / width) ** 0.5 * transformer.x_embedder.weight.T)


def predict_velocity(
    transformer: Any,
    latents_BSC: Tensor,
    sigma_B: Tensor,
    encoded: Mapping[str, Tensor],
    shapes: Shapes,
    guidance: float | Tensor,
) -> Tensor:
    """What the transformer predicts, noise minus picture, [B, S, 4C].

    Args:
        latents_BSC: noisy. sigma_B: the share of noise, 0 to 1; the transformer multiplies it by 1000.
        encoded: prompt_embeds [B, T, joint] and pooled_prompt_embeds [B, pooled].
        guidance: for a model that embeds it; one for all, or [B].
    """
    from diffusers import FluxPipeline

    device, count = latents_BSC.device, latents_BSC.shape[0]
    rows, columns = shapes.height // 16, shapes.width // 16
    text = encoded["prompt_embeds"]
    guidance_B = torch.as_tensor(guidance, dtype=torch.float32, device=device).expand(count)
    predicted: Tensor = transformer(
        hidden_states=latents_BSC,
        encoder_hidden_states=text,
        pooled_projections=encoded["pooled_prompt_embeds"],
        timestep=sigma_B,
        guidance=guidance_B if transformer.config.guidance_embeds else None,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, rows, columns, device, torch.float32),
        txt_ids=torch.zeros(text.shape[1], 3, device=device),
        return_dict=False,
    )[0]
    return predicted


# One linear layer of the original code -> the layers of diffusers that it joins, one below the other.
_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.layers.0": ("ff.net.0.proj",),
    "img_mlp.layers.2": ("ff.net.2",),
    "txt_mlp.layers.0": ("ff_context.net.0.proj",),
    "txt_mlp.layers.2": ("ff_context.net.2",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_STACKS = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}


def mlx_lora(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """A LoRA of diffusers' layers as the MLX example has it: `lora_a` [I, R] and `lora_b` [R, O] of its own layers.

    A layer that joins several has their ranks in sum: the downs side by side, the ups along the diagonal; a pair of
    rank 0 stands for a layer without one. The example's loader takes any rank. Its scale is 1, so alpha / rank has to
    be in the ups.

    Source: `LoRALinear` and `Flux` of ml-explore/mlx-examples, flux/flux.
    """
    blocks: dict[tuple[str, str], dict[str, Pair]] = {}
    for name, pair in pairs.items():
        match = re.fullmatch(r"(\w+)\.(\d+)\.(.+)", name)
        if match is None or match[1] not in _STACKS:
            raise ValueError(f"{name} is in no block")
        blocks.setdefault((match[1], match[2]), {})[match[3]] = pair
    found: dict[str, Tensor] = {}
    for (stack, number), layers in blocks.items():
        prefix, joined = _STACKS[stack]
        for layer, members in joined.items():
            here = [layers[member] for member in members if member in layers]
            if len(here) == len(members) and any(len(down) for down, _ in here):
                found[f"{prefix}.{number}.{layer}.lora_a"] = torch.cat([down for down, _ in here]).T.contiguous()
                found[f"{prefix}.{number}.{layer}.lora_b"] = _along_diagonal([up for _, up in here]).T.contiguous()
    return found


def _along_diagonal(matrices: Sequence[Tensor]) -> Tensor:
    made: Tensor = torch.block_diag(*matrices)  # type: ignore[no-untyped-call]
    return made


def build_in_guidance(teacher: Any, student: Any, guidance: float) -> None:
    """Give `student`, which has no guidance input, the weights of `teacher` with this guidance built in.

    Both add embeddings of time, guidance and text; a constant one moves into the bias of the first. So they compute the
    same before the student has learned anything.
    """
    state: dict[str, Tensor] = {name: value.clone() for name, value in teacher.state_dict().items()}
    embed: Any = teacher.time_text_embed
    with torch.no_grad():
        told = embed.time_proj(torch.tensor([1000 * guidance]))
        state["time_text_embed.timestep_embedder.linear_2.bias"] += embed.guidance_embedder(told)[0]
    student.load_state_dict({name: state[name] for name in student.state_dict()})
