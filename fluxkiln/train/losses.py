"""What each stage of a recipe minimises, as a function of the step's generator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.train.lessons import Lessons, scaled
from fluxkiln.train.recipes import Amounts

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module

Loss = Callable[["Generator"], "Tensor"]

# The guidance that the four-step model has built in; what diffusers' pipeline takes by default.
BUILT_IN_GUIDANCE = 3.5


def vae_loss(vae: Any, pictures: Tensor, amounts: Amounts, chroma: float = 0.0) -> Loss:
    """Error of what comes back, and a little of the KL divergence, which keeps latents small.

    Where a picture differs from its blurred self the error counts more: most of a drawing is plain ground and sky.
    `chroma` is what an error of the colour counts beside one of the brightness.
    """
    import torch
    from torch.nn import functional as F

    def loss(chance: Generator) -> Tensor:
        x_NCHW = scaled(pictures[torch.randint(len(pictures), (amounts.vae_batch,), generator=chance)])
        latents = vae.encode(x_NCHW).latent_dist
        z = latents.mean + latents.std * torch.randn(latents.mean.shape, generator=chance)
        error = vae.decode(z).sample - x_NCHW
        plain = F.avg_pool2d(x_NCHW, 9, 1, 4, count_include_pad=False)
        weight = 1 + 8 * F.avg_pool2d((x_NCHW - plain).abs().mean(dim=1, keepdim=True), 5, 1, 2)
        told = error.abs() + error.square()
        if chroma:
            told = told + chroma * (error - error.mean(dim=1, keepdim=True)).abs()
        total: Tensor = (weight * told).mean() + 1e-4 * latents.kl().mean() / latents.mean[0].numel()
        return total

    return loss


def vae_tiny_loss(tiny: Any, vae: Any, pictures: Tensor, amounts: Amounts) -> Loss:
    """The tiny VAE learns the other one's scaled latents, both ways."""
    import torch

    shift, factor = vae.config.shift_factor, vae.config.scaling_factor

    def loss(chance: Generator) -> Tensor:
        x_NCHW = scaled(pictures[torch.randint(len(pictures), (amounts.vae_batch,), generator=chance)])
        with torch.no_grad():
            latents = (vae.encode(x_NCHW).latent_dist.mean - shift) * factor
        error = tiny.decode(latents).sample - x_NCHW
        back = (tiny.encode(x_NCHW).latents - latents).abs().mean()
        total: Tensor = error.abs().mean() + error.square().mean() + 0.1 * back
        return total

    return loss


class Velocity:
    """The transformer with its text encoders: token ids and noisy latents in, velocity out."""

    def __init__(self, made: Mapping[str, Module], tokens: int, side: int) -> None:
        import torch

        self.made = made
        ids = torch.zeros(side, side, 3)
        ids[..., 1] = torch.arange(side)[:, None]
        ids[..., 2] = torch.arange(side)[None]
        self.img_ids, self.txt_ids = ids.reshape(-1, 3), torch.zeros(tokens, 3)

    def encode(self, tokens: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Pooled [B, D] of CLIP and the sequence [B, T, E] of T5."""
        pooled = self.made["text_encoder"](input_ids=tokens["text_encoder"]).pooler_output
        return pooled, self.made["text_encoder_2"](input_ids=tokens["text_encoder_2"])[0]

    def __call__(
        self, transformer: Module, latents: Tensor, sigma: Tensor, told: tuple[Tensor, Tensor], guidance: Tensor | None
    ) -> Tensor:
        velocity: Tensor = transformer(
            hidden_states=latents, encoder_hidden_states=told[1], pooled_projections=told[0], timestep=sigma,
            img_ids=self.img_ids, txt_ids=self.txt_ids, guidance=guidance, return_dict=False,
        )[0]  # fmt: skip
        return velocity


def noised(latents: Tensor, chance: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their share of noise [B] (logit-normal, moved as dev's schedule at this size), the velocity."""
    import torch

    sigma = torch.sigmoid(torch.randn(len(latents), generator=chance) + 0.47)
    noise = torch.randn(latents.shape, generator=chance)
    s = sigma[:, None, None]
    return (1 - s) * latents + s * noise, sigma, noise - latents


def base_loss(velocity: Velocity, lessons: Lessons, amounts: Amounts) -> Loss:
    """Flow matching: the square error of the velocity."""
    import torch

    def loss(chance: Generator) -> Tensor:
        latents, tokens = lessons.draw(amounts.batch, chance, dropped=0.1)
        noisy, sigma, target = noised(latents, chance)
        found = velocity(velocity.made["transformer"], noisy, sigma, velocity.encode(tokens), torch.ones(amounts.batch))
        return (found - target).square().mean()

    return loss


def guidance_loss(velocity: Velocity, teacher: Module, lessons: Lessons, amounts: Amounts) -> Loss:
    """Guidance distillation (arXiv 2210.03142): one run with guidance g does what two runs with weight g do."""
    import torch

    empty = {name: tokens[-1:].long() for name, tokens in lessons.tokens.items()}

    def loss(chance: Generator) -> Tensor:
        latents, tokens = lessons.draw(amounts.batch, chance)
        noisy, sigma, _ = noised(latents, chance)
        guidance = 1 + 4 * torch.rand(amounts.batch, generator=chance)
        one = torch.ones(amounts.batch)
        with torch.no_grad():
            told = velocity.encode(tokens)
            pooled, sequence = velocity.encode(empty)
            untold = (pooled.expand_as(told[0]), sequence.expand_as(told[1]))
            with_caption = velocity(teacher, noisy, sigma, told, one)
            without = velocity(teacher, noisy, sigma, untold, one)
            target = without + guidance[:, None, None] * (with_caption - without)
        found = velocity(velocity.made["transformer"], noisy, sigma, told, guidance)
        return (found - target).square().mean()

    return loss


def steps_loss(velocity: Velocity, teacher: Module, lessons: Lessons, amounts: Amounts, count: int = 4) -> Loss:
    """Progressive distillation (arXiv 2202.00512) at the `count` noise levels of schnell's schedule."""
    import torch

    def loss(chance: Generator) -> Tensor:
        latents, tokens = lessons.draw(amounts.batch, chance)
        # half of the lessons are the first step, which decides what stands where
        step = torch.randint(-count + 1, count, (amounts.batch,), generator=chance).clamp(min=0)
        sigma = 1 - step / count
        noise = torch.randn(latents.shape, generator=chance)
        s = sigma[:, None, None]
        noisy = (1 - s) * latents + s * noise
        guidance = torch.full((amounts.batch,), BUILT_IN_GUIDANCE)
        width = 1 / count / amounts.substeps
        with torch.no_grad():
            told = velocity.encode(tokens)
            moved = noisy
            for k in range(amounts.substeps):
                moved = moved - width * velocity(teacher, moved, sigma - k * width, told, guidance)
            target = (noisy - moved) * count
        found = velocity(velocity.made["transformer"], noisy, sigma, told, None)
        return (found - target).square().mean()

    return loss
