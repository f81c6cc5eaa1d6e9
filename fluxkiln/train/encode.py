"""Latents of pictures and embeddings of prompts, made once and kept on disk by what they were made from.

A file each, written at once: a killed run goes on with the next one, and a data set may be larger than memory. The
encoders' weights are read while they run, a block at a time.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.digests import digest_json
from fluxkiln.errors import DatasetError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.fingerprint import DigestMemo, digest_tensors
from fluxkiln.files import write_durably
from fluxkiln.progress import Progress
from fluxkiln.train.dataset import Sample
from fluxkiln.types import Shapes
from fluxkiln.verify.pipeline import open_pipeline

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image
    from torch import Tensor

# Raise when other numbers are made of the same input.
_FORMAT = 1
_LEAST_SHOWN = 0.8  # of a picture's sides, in an augmentation

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class CachedSample:
    """Files of a picture's prompt and of the latents of its augmentations; their names say what is in them."""

    text: Path
    latents: tuple[Path, ...]

    def load_text(self) -> dict[str, Tensor]:
        """The prompt as the transformer takes it, by diffusers' argument names, each with one row."""
        from safetensors.torch import load_file

        return load_file(self.text)

    def load_latents(self, number: int) -> NDArray[np.float32]:
        """[1, S, 4C]."""
        loaded: NDArray[np.float32] = np.load(self.latents[number])
        return loaded


@dataclass(frozen=True, slots=True)
class Encoder:
    """diffusers' pipeline of a checkpoint without its transformer, and the cache of what it made.

    Attributes:
        folder: of the cache. shapes: of the pictures to train on. keys: digests of what encodes pictures and prompts.
    """

    checkpoint: Checkpoint
    pipe: Any
    folder: Path
    shapes: Shapes
    keys: Mapping[str, str]

    def text(self, prompt: str) -> Path:
        """The file of a prompt's embeddings, float32; made where it is not there."""
        import torch
        from safetensors.torch import save

        path = self._place("text", [self.keys["text"], self.shapes.tokens, prompt], "safetensors")
        if not path.is_file():
            made = self.checkpoint.model.encode(self.pipe, self.shapes, prompt)
            write_durably(path, save({name: torch.from_numpy(np.array(array)) for name, array in made.items()}))
        return path

    def latents(self, sample: Sample, augmentations: int, seed: int) -> tuple[Path, ...]:
        """The files of a picture's augmentations; made where they are not there, DatasetError where they cannot be."""
        digest, picture = sample.open()
        return tuple(self._augment(sample, digest, picture, f"{seed}/{digest}/{one}") for one in range(augmentations))

    def _augment(self, sample: Sample, digest: str, picture: Image, key: str) -> Path:
        box = augmentation_box(picture.size, self.shapes, key)
        size = [self.shapes.width, self.shapes.height]
        path = self._place("latents", [self.keys["image"], digest, list(box), size], "npy")
        if not path.is_file():
            with sample.readable():
                pixels = _pixels(picture, box, self.shapes)
            made = self.checkpoint.model.encode_image(self.pipe, pixels)
            if not np.isfinite(made).all():
                raise DatasetError(f"{sample.where}: its latents have a NaN or Inf; use another picture")
            data = io.BytesIO()
            np.save(data, made)
            write_durably(path, data.getvalue())
        return path

    def _place(self, kind: str, inputs: list[Any], suffix: str) -> Path:
        key = digest_json([_FORMAT, *inputs]).removeprefix("sha256:")
        path = self.folder / kind / key[:2] / f"{key}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def open_encoder(checkpoint: Checkpoint, shapes: Shapes, cache_dir: Path, memo: DigestMemo) -> Encoder:
    """The encoders of a checkpoint; nothing of them is in memory while they do not run.

    Raises: CheckpointError: a component is missing or damaged.
    """
    model = checkpoint.model
    texts = tuple(model.tokenizers)
    vae = next(name for name in model.components if name not in (*texts, model.adapted))

    def key(components: Sequence[str]) -> str:
        tensors = {name: digest_tensors(checkpoint.tensors[name].values(), memo) for name in components}
        configs: Any = {name: checkpoint.configs[name] for name in components}
        beside = {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in checkpoint.sidecars.items()
            if name.partition("/")[0] in [model.tokenizers.get(one) for one in components]
        }
        return digest_json([tensors, configs, beside])

    pipe = open_pipeline(checkpoint, {name: name for name in (*texts, vae)})
    return Encoder(checkpoint, pipe, cache_dir, shapes, {"text": key(texts), "image": key((vae,))})


def fill_cache(
    encoder: Encoder, samples: Sequence[Sample], augmentations: int, seed: int, progress: Progress
) -> tuple[CachedSample, ...]:
    """What the cache has of these samples; what is missing is made."""
    progress.stage("encode", len(samples))
    cached = []
    for sample in samples:
        found = CachedSample(encoder.text(sample.prompt), encoder.latents(sample, augmentations, seed))
        cached.append(found)
        progress.done("encode", sample.where.rpartition("/")[2], "encoded")
    return tuple(cached)


def augmentation_box(size: tuple[int, int], shapes: Shapes, key: str) -> Box:
    """The part of a picture that an augmentation shows: left, top, right, bottom.

    A random crop of 0.8 to 1 of both sides, but not of fewer pixels than are asked for, then the largest rectangle of
    the shape that is asked for in its middle, as the MLX example crops. `key` decides.
    """
    width, height = size
    random = np.random.Philox(key=int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little"))
    across, down, right, low = np.random.Generator(random).random(4).tolist()
    shown = 1.0 - _LEAST_SHOWN
    crop_w = min(width, max((_LEAST_SHOWN + shown * across) * width, shapes.width))
    crop_h = min(height, max((_LEAST_SHOWN + shown * down) * height, shapes.height))
    left, top = (width - crop_w) * right, (height - crop_h) * low
    ratio = shapes.width / shapes.height
    fit_w, fit_h = min(crop_w, crop_h * ratio), min(crop_h, crop_w / ratio)
    left, top = left + (crop_w - fit_w) / 2, top + (crop_h - fit_h) / 2
    return left, top, left + fit_w, top + fit_h


def _pixels(picture: Image, box: Box, shapes: Shapes) -> NDArray[np.float32]:
    """[height, width, 3] in 0..1."""
    from PIL.Image import Resampling

    resized = picture.convert("RGB").resize((shapes.width, shapes.height), Resampling.LANCZOS, box=box)
    return np.asarray(resized, np.float32) / np.float32(255)
