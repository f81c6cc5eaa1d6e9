"""What a recipe trains on: drawings, their captions, and both as the transformer takes them."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.scenes.drawing import draw
from fluxkiln.scenes.grammar import MOST_WORDS, scenes, write_caption
from fluxkiln.train.recipes import Recipe

if TYPE_CHECKING:
    from torch import Generator, Tensor

_CHUNK = 32


def pictures_NCHW(first: int, count: int, seed: int) -> Tensor:
    """Drawings [count, 3, 128, 128] uint8: those from number `first` on of the scenes of `seed`."""
    import torch

    drawn = [
        np.asarray(draw(scene, first + i)) for i, (scene, _) in enumerate(islice(scenes(seed), first, first + count))
    ]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2)


def scaled(pictures: Tensor) -> Tensor:
    """uint8 -> [-1, 1] float32, channels last."""
    import torch

    return pictures.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Lessons:
    """Latents [N, S, 4C] as the transformer takes them, and the tokens of `captions` captions of each.

    The last row of tokens is the empty caption. `answers` [N, questions] say what the pictures show.
    """

    latents: Tensor
    tokens: Mapping[str, Tensor]
    captions: int
    answers: Tensor

    def draw(self, batch: int, chance: Generator, dropped: float = 0.0) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Latents of random pictures, tokens of their captions, and their answers; so many captions are left out."""
        import torch

        i = torch.randint(len(self.latents), (batch,), generator=chance)
        caption = i * self.captions + torch.randint(self.captions, (batch,), generator=chance)
        if dropped:
            empty = len(self.latents) * self.captions
            caption = torch.where(torch.rand(batch, generator=chance) < dropped, empty, caption)
        return self.latents[i], {name: tokens[caption].long() for name, tokens in self.tokens.items()}, self.answers[i]


def captions_of(recipe: Recipe) -> list[str]:
    """All captions that are trained on, `captions` for each picture."""
    chance, found = random.Random(recipe.seed + 5), []
    for scene, prompt in islice(scenes(recipe.seed + 1), recipe.amounts.pictures):
        told = [prompt.text]
        while len(told) < recipe.amounts.captions:
            text = write_caption(scene, chance).text
            if len(text.split()) <= MOST_WORDS:
                told.append(text)
        found += told
    return found


def encode_pictures(recipe: Recipe, vae: Any, on_step: Callable[[int, int, float], None] | None = None) -> Tensor:
    """Latents [N, C, H, W] of all pictures: means, not yet shifted and scaled."""
    import torch

    count, found = recipe.amounts.pictures, []
    drawn, started = scenes(recipe.seed + 1), time.perf_counter()
    for first in range(0, count, _CHUNK):
        chunk = [
            np.asarray(draw(scene, first + i)) for i, (scene, _) in enumerate(islice(drawn, min(_CHUNK, count - first)))
        ]
        with torch.no_grad():
            pictures = scaled(torch.from_numpy(np.stack(chunk)).permute(0, 3, 1, 2))
            found.append(vae.encode(pictures).latent_dist.mean.contiguous())
        if on_step is not None:
            done = min(first + _CHUNK, count)
            on_step(done, count, (time.perf_counter() - started) / done)
    return torch.cat(found)


def pack(latents_NCHW: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H/2 * W/2, 4C], as FluxPipeline packs latents."""
    n, c, h, w = latents_NCHW.shape
    return latents_NCHW.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h * w // 4, 4 * c)


def tokenize(folder: Path, texts: list[str], tokens: int) -> dict[str, Tensor]:
    """Token ids of both encoders, int32, padded as FluxPipeline pads them.

    CLIP's only to the longest text: what follows a text's end does not reach its output.
    """
    from transformers import AutoTokenizer

    ways = {"text_encoder": ("tokenizer", "longest", 77), "text_encoder_2": ("tokenizer_2", "max_length", tokens)}
    return {
        name: AutoTokenizer.from_pretrained(folder / directory)(
            texts, padding=padding, max_length=length, truncation=True, return_tensors="pt"
        ).input_ids.int()
        for name, (directory, padding, length) in ways.items()
    }
