"""diffusers' FluxPipeline (checked with 0.42.1) run on one prompt, all of it or as much of it as is there, or stage by
stage: the reference, and what training takes from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fluxkiln.patches.pipeline import OnLatents, Rendering, Sampling, quiet
from fluxkiln.types import Shapes


def render(pipe: Any, shapes: Shapes, sampling: Sampling, on_latents: OnLatents | None = None) -> Rendering:
    """Run `pipe`, a `diffusers.FluxPipeline` with None for the models it has not got, on the CPU's random numbers.

    Without an encoder its embedding is normal random numbers for the seed, without a transformer so are the latents
    that a VAE is given. What is neither given nor made is empty.
    """
    random = torch.Generator("cpu").manual_seed(sampling.seed)
    embeds, pooled, latents = (torch.empty(0) for _ in range(3))
    image = np.empty((0, 0, 3), np.float32)
    start = time.perf_counter()

    def after_step(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = tensors["latents"]
        if on_latents:
            on_latents(latents.float().numpy().copy())
        return {}

    # quiet: a prompt cut to the build's few tokens is meant, and diffusers warns of it
    with torch.no_grad(), quiet():
        if pipe.text_encoder is not None:
            pooled = pipe._get_clip_prompt_embeds(sampling.prompt, device="cpu")
        if pipe.text_encoder_2 is not None:
            embeds = pipe._get_t5_prompt_embeds(
                sampling.prompt, max_sequence_length=shapes.tokens, device="cpu", dtype=torch.float32
            )
        elif pipe.transformer is not None:
            embeds = torch.randn(1, shapes.tokens, pipe.transformer.config.joint_attention_dim, generator=random)
        if pipe.text_encoder is None and pipe.transformer is not None:
            pooled = torch.randn(1, pipe.transformer.config.pooled_projection_dim, generator=random)
        if pipe.transformer is not None:
            encoded = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            denoise(
                pipe, encoded, shapes, after_step, steps=sampling.steps, guidance=sampling.guidance_scale, random=random
            )
            if pipe.vae is not None:
                image = decode(pipe, shapes, latents.numpy())
        elif pipe.vae is not None:
            config = pipe.vae.config
            latents = torch.randn(1, config.latent_channels, *shapes.latent_hw, generator=random)
            decoded = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
            image = pipe.image_processor.postprocess(decoded, output_type="np")[0]
    seconds = time.perf_counter() - start
    return Rendering(latents.numpy(), image, embeds.numpy(), pooled.numpy(), seconds)


def denoise(
    pipe: Any, encoded: Mapping[str, Any], shapes: Shapes, after_step: Callable[..., dict[str, Any]], *,
    steps: int, guidance: float, random: Any,
) -> None:  # fmt: skip
    """Run the loop of `pipe` on encoded prompts.

    Args:
        encoded: by diffusers' argument names. after_step: diffusers' `callback_on_step_end`, given the latents.
        random: a torch.Generator.
    """
    pipe.set_progress_bar_config(disable=True)
    pipe(
        **encoded, height=shapes.height, width=shapes.width, num_inference_steps=steps, guidance_scale=guidance,
        generator=random, output_type="latent", callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["latents"],
    )  # fmt: skip


def encode(pipe: Any, shapes: Shapes, prompt: str) -> dict[str, NDArray[Any]]:
    """A prompt as `denoise` takes it, float32."""
    with torch.no_grad(), quiet():
        embeds, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length=shapes.tokens)
    return {"prompt_embeds": embeds.numpy(), "pooled_prompt_embeds": pooled.numpy()}


def decode(pipe: Any, shapes: Shapes, latents: NDArray[Any]) -> NDArray[Any]:
    """The image [height, width, 3] in 0..1 of packed latents [1, S, 4C].

    Source: the end of diffusers' `FluxPipeline.__call__`.
    """
    config = pipe.vae.config
    with torch.no_grad(), quiet():
        packed = torch.from_numpy(np.array(latents, np.float32))
        unpacked = pipe._unpack_latents(packed, shapes.height, shapes.width, pipe.vae_scale_factor)
        image = pipe.vae.decode(unpacked / config.scaling_factor + config.shift_factor)[0]
        made: NDArray[Any] = pipe.image_processor.postprocess(image, output_type="np")[0]
    return made
