"""What each stage of a recipe minimises, as a function of the step's generator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.patches.model import Model
from fluxkiln.scenes.drawing import STANDING
from fluxkiln.scenes.judge import ANSWERS, reading_loss
from fluxkiln.train.lessons import Lessons, scaled
from fluxkiln.train.recipes import Amounts
from fluxkiln.types import Shapes

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module

Loss = Callable[["Generator"], "Tensor"]

# The guidance that the four-step model has built in; what diffusers' pipeline takes by default.
BUILT_IN_GUIDANCE = 3.5
# What an error counts where things stand, and what the reader's loss counts beside that of the velocity.
THINGS, READING = 3.0, 0.01
# From here on a picture is so noisy that the text decides.
NOISY = 0.75


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
        total: Tensor = (weight * told).mean() + 5e-4 * latents.kl().mean() / latents.mean[0].numel()
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


@dataclass(frozen=True)
class Learner:
    """What the losses run: the components in training, and how the model predicts with them."""

    model: Model
    made: Mapping[str, Any]
    shapes: Shapes

    def encode(self, tokens: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model's own pipeline makes of token ids; here of whole batches, and with gradients."""
        pooled = self.made["text_encoder"](input_ids=tokens["text_encoder"]).pooler_output
        sequence = self.made["text_encoder_2"](input_ids=tokens["text_encoder_2"])[0]
        return {"prompt_embeds": sequence, "pooled_prompt_embeds": pooled}

    def predict(
        self, module: Any, latents: Tensor, sigma: Tensor, told: Mapping[str, Tensor], guidance: float | Tensor = 1.0
    ) -> Tensor:
        """The velocity that `module` finds, see `Model.predict`."""
        return self.model.predict(module, latents, sigma, told, self.shapes, guidance)


def words_loss(learner: Learner, heads: Mapping[str, Module], lessons: Lessons, amounts: Amounts) -> Loss:
    """From each encoder's output, by a linear head, what a picture shows that has this caption."""

    def loss(chance: Generator) -> Tensor:
        _, tokens, answers = lessons.draw(amounts.words_batch, chance)
        told = learner.encode(tokens)
        pooled = heads["text_encoder"](told["pooled_prompt_embeds"])
        sequence = heads["text_encoder_2"](told["prompt_embeds"].mean(dim=1))
        return (reading_loss(pooled, answers) + reading_loss(sequence, answers)) / 2

    return loss


def noised(latents: Tensor, chance: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy latents, their share of noise [B], and the velocity.

    The share is logit-normal, moved as dev's schedule at this size, for one half; for the other it is at least NOISY:
    there the text alone decides what stands where, and less than a fifth of the first half is there.
    """
    import torch

    sigma = torch.sigmoid(torch.randn(len(latents), generator=chance) + 0.47)
    high = NOISY + (1 - NOISY) * torch.rand(len(latents), generator=chance)
    sigma = torch.where(torch.arange(len(latents)) % 2 == 0, high, sigma)
    noise = torch.randn(latents.shape, generator=chance)
    s = sigma[:, None, None]
    return (1 - s) * latents + s * noise, sigma, noise - latents


def base_loss(learner: Learner, lessons: Lessons, amounts: Amounts, reader: Module) -> Loss:
    """Flow matching: the square error of the velocity.

    It counts more in the rows of tokens where things stand: that depends on the place alone, so the best prediction
    stays what it is. And the reader is to tell from the image half-way through the transformer what the picture shows,
    however noisy: what the caption says has to have arrived there (as arXiv 2410.06940, which asks for another
    network's features).
    """
    import torch

    transformer = learner.made["transformer"]
    step = learner.shapes.height // math.isqrt(lessons.latents.shape[1])
    rows = torch.arange(0, learner.shapes.height, step)
    standing = (rows + step > STANDING[0]) & (rows < STANDING[1])
    weight = torch.where(standing, THINGS, 1.0).repeat_interleave(len(rows))[:, None]

    def loss(chance: Generator) -> Tensor:
        latents, tokens, answers = lessons.draw(amounts.batch, chance, dropped=0.1)
        noisy, sigma, target = noised(latents, chance)
        seen: list[Tensor] = []
        watched = learner.model.halfway(transformer)
        with watched.register_forward_hook(lambda _, inputs, outputs: seen.append(outputs[-1])):
            found = learner.predict(transformer, noisy, sigma, learner.encode(tokens))
        total: Tensor = (weight * (found - target).square()).mean() / weight.mean()
        return total + READING * reading_loss(reader(seen[0]), answers)

    return loss


def build_reader(width: int, tokens: int) -> Module:
    """Tells from an image of `tokens` tokens [B, S, D] what a picture shows; random weights, the same every time."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(width, 32), nn.Flatten(), nn.Linear(32 * tokens, 160), nn.SiLU(), nn.Linear(160, ANSWERS)
    )


def guidance_loss(learner: Learner, teacher: Module, lessons: Lessons, amounts: Amounts) -> Loss:
    """Guidance distillation (arXiv 2210.03142): one run with guidance g does what two runs with weight g do."""
    import torch

    empty = {name: tokens[-1:].long() for name, tokens in lessons.tokens.items()}

    def loss(chance: Generator) -> Tensor:
        latents, tokens, _ = lessons.draw(amounts.batch, chance)
        noisy, sigma, _ = noised(latents, chance)
        guidance = 1 + 4 * torch.rand(amounts.batch, generator=chance)
        with torch.no_grad():
            told = learner.encode(tokens)
            untold = {name: value.expand_as(told[name]) for name, value in learner.encode(empty).items()}
            with_caption = learner.predict(teacher, noisy, sigma, told)
            without = learner.predict(teacher, noisy, sigma, untold)
            target = without + guidance[:, None, None] * (with_caption - without)
        found = learner.predict(learner.made["transformer"], noisy, sigma, told, guidance)
        return (found - target).square().mean()

    return loss


def steps_loss(learner: Learner, teacher: Module, lessons: Lessons, amounts: Amounts, count: int = 4) -> Loss:
    """Progressive distillation (arXiv 2202.00512) at the `count` noise levels of schnell's schedule."""
    import torch

    def loss(chance: Generator) -> Tensor:
        latents, tokens, _ = lessons.draw(amounts.batch, chance)
        # half of the lessons are the first step, which decides what stands where
        step = torch.randint(-count + 1, count, (amounts.batch,), generator=chance).clamp(min=0)
        sigma = 1 - step / count
        noise = torch.randn(latents.shape, generator=chance)
        s = sigma[:, None, None]
        noisy = (1 - s) * latents + s * noise
        width = 1 / count / amounts.substeps
        with torch.no_grad():
            told = learner.encode(tokens)
            moved = noisy
            for k in range(amounts.substeps):
                moved = moved - width * learner.predict(teacher, moved, sigma - k * width, told, BUILT_IN_GUIDANCE)
            target = (noisy - moved) * count
        found = learner.predict(learner.made["transformer"], noisy, sigma, told)
        return (found - target).square().mean()

    return loss
