"""A data set of small pictures, and one short training that tests look at."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.fingerprint import DigestMemo
from fluxkiln.progress import Silent
from fluxkiln.train.dataset import read_dataset
from fluxkiln.train.lora import LoraResult, Places, train_lora
from fluxkiln.train.settings import LoraSettings
from tests.conftest import SMALLEST

SHORT = LoraSettings(
    iterations=4, grad_accumulate=2, lora_rank=2, learning_rate=1e-3, warmup_steps=0, num_augmentations=2,
    checkpoint_every=2,
)  # fmt: skip


def write_dataset(folder: Path, count: int = 3, size: int = 40) -> Path:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        name = f"{number:02d}.png"
        Image.fromarray(random.integers(0, 255, (size, size, 3), np.uint8)).save(folder / name)
        lines.append(json.dumps({"image": name, "prompt": f"a photo of sks kiln {number}"}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> Path:
    """Three pictures of noise with their prompts. Not to be written to."""
    return write_dataset(tmp_path_factory.mktemp("dataset") / "set")


@pytest.fixture(scope="session")
def train(tiny_checkpoint: Callable[..., Checkpoint], dataset: Path, tmp_path_factory) -> Callable[..., LoraResult]:
    """(folder, progress, settings by name) -> a training of tiny-dev, two steps of the optimizer; all share a cache."""
    shared = tmp_path_factory.mktemp("train")

    def run(output: Path, progress=None, model="tiny-dev", **changes) -> LoraResult:
        places = Places(output, shared / "cache", DigestMemo(shared / "memo.json"))
        samples, settings = read_dataset(str(dataset)), replace(SHORT, **changes)
        return train_lora(tiny_checkpoint(model), samples, SMALLEST, settings, places, progress or Silent())

    return run


@pytest.fixture(scope="session")
def trained(train, tmp_path_factory) -> LoraResult:
    """A training that nothing disturbed."""
    return train(tmp_path_factory.mktemp("trained"), progress_prompt="a photo of sks kiln", progress_steps=1)
