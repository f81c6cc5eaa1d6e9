"""A reference run of as much of a pipeline as is there: what a missing component would have made is random numbers."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from fluxkiln.components import Shapes
from fluxkiln.verify.pipeline import OnStep, Rendering, denoise, quiet, render

_COMPONENTS = ("text_encoder", "text_encoder_2", "transformer", "vae")


def render_present(
    pipe: Any,
    shapes: Shapes,
    steps: int,
    seed: int,
    prompt: str,
    guidance_scale: float,
    on_step: OnStep | None = None,
) -> Rendering:
    """Run `pipe`, a `diffusers.FluxPipeline` with None for the models it has not got; all of it as `render` does.

    Without an encoder its embedding is normal random numbers for `seed`, without a transformer so are the latents that
    a VAE is given. What is neither given nor made is empty.
    """
    if all(getattr(pipe, name) is not None for name in _COMPONENTS):
        return render(pipe, shapes, steps, seed, prompt, guidance_scale, on_step)
    random = torch.Generator("cpu").manual_seed(seed)
    embeds, pooled, latents = (torch.empty(0) for _ in range(3))
    image = np.empty((0, 0, 3), np.float32)
    start = time.perf_counter()
    with torch.no_grad(), quiet():
        if pipe.text_encoder_2 is not None:
            embeds = pipe._get_t5_prompt_embeds(
                prompt, max_sequence_length=shapes.tokens, device="cpu", dtype=torch.float32
            )
        elif pipe.transformer is not None:
            embeds = torch.randn(1, shapes.tokens, pipe.transformer.config.joint_attention_dim, generator=random)
        if pipe.text_encoder is not None:
            pooled = pipe._get_clip_prompt_embeds(prompt, device="cpu")
        elif pipe.transformer is not None:
            pooled = torch.randn(1, pipe.transformer.config.pooled_projection_dim, generator=random)
        if pipe.transformer is not None:
            latents, made = denoise(
                pipe,
                embeds,
                pooled,
                shapes,
                steps,
                guidance_scale,
                random,
                "latent" if pipe.vae is None else "np",
                on_step,
            )
            image = image if pipe.vae is None else made[0]
        elif pipe.vae is not None:
            config = pipe.vae.config
            latents = torch.randn(1, config.latent_channels, *shapes.latent_hw, generator=random)
            decoded = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
            image = pipe.image_processor.postprocess(decoded, output_type="np")[0]
    seconds = time.perf_counter() - start
    return Rendering(latents.numpy(), image, embeds.numpy(), pooled.numpy(), seconds)
