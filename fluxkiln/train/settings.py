"""What a fine-tuning is asked for, checked before anything is loaded; options have the MLX FLUX example's names."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.settings import MOST_SEED

# diffusers' names, see its `compute_density_for_timestep_sampling`
WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
MOST_RATE = 1e30  # a step of that size is still a float32
# what may differ when a run goes on: nothing that changes a number
_FREE = ("progress_every", "progress_steps", "progress_prompt", "checkpoint_every", "gradient_checkpointing")


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """How a LoRA is trained.

    Attributes:
        iterations: forward and backward passes of each process; the optimizer steps after every `grad_accumulate`.
        lora_blocks: the last so many of the transformer's blocks; -1 for all.
        base: scheme in which the frozen weights are kept.
        num_augmentations: random crops of each picture, which show 0.8 to 1 of it.
        guidance: what the transformer is told in training, where it embeds that. At 1 a distilled model predicts what
            the loss compares with, without amplification.
        progress_prompt: painted every `progress_every` iterations; nothing is where it is empty.
    """

    iterations: int = 600
    batch_size: int = 1
    grad_accumulate: int = 4
    lora_rank: int = 8
    lora_blocks: int = -1
    learning_rate: float = 1e-4
    warmup_steps: int = 20
    guidance: float = 1.0
    weighting_scheme: str = "none"
    num_augmentations: int = 5
    seed: int = 0
    base: str = "BF16"
    gradient_checkpointing: bool = False
    checkpoint_every: int = 50
    progress_prompt: str = ""
    progress_every: int = 50
    progress_steps: int | None = None

    def __post_init__(self) -> None:
        least = {
            "iterations": 1, "batch_size": 1, "grad_accumulate": 1, "lora_rank": 1, "warmup_steps": 0,
            "num_augmentations": 1, "checkpoint_every": 1, "progress_every": 1, "progress_steps": 1,
        }  # fmt: skip
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UsageError(f"{_flag(name)} {value}: it must be at least {minimum}")
        if self.lora_blocks != -1 and self.lora_blocks < 1:
            raise UsageError(f"--lora-blocks {self.lora_blocks}: give how many of the last blocks, or -1 for all")
        if not 0 < self.learning_rate <= MOST_RATE:
            raise UsageError(f"--learning-rate {self.learning_rate}: it must be a number above 0, 1e-4 say")
        if not (math.isfinite(self.guidance) and self.guidance >= 0):
            raise UsageError(f"--guidance {self.guidance}: it must be a number from 0, 1 or 3.5 say")
        if not 0 <= self.seed <= MOST_SEED:
            raise UsageError(f"--seed {self.seed}: it must be from 0 to {MOST_SEED}")
        if self.weighting_scheme not in WEIGHTING_SCHEMES:
            raise UsageError(
                f"--weighting-scheme {self.weighting_scheme!r} is not known; there are {', '.join(WEIGHTING_SCHEMES)}"
            )
        if self.iterations % self.grad_accumulate:
            below = self.iterations - self.iterations % self.grad_accumulate
            raise UsageError(
                f"--iterations {self.iterations} is no multiple of --grad-accumulate {self.grad_accumulate}, so the "
                f"last would train nothing; give {below or self.grad_accumulate} or {below + self.grad_accumulate}"
            )

    @property
    def updates(self) -> int:
        """Steps of the optimizer."""
        return self.iterations // self.grad_accumulate

    def fixed(self, processes: int) -> dict[str, Any]:
        """What makes the numbers of a run, whatever its processes: the batches of an update count, not who ran them."""
        kept = {name: value for name, value in asdict(self).items() if name not in _FREE}
        del kept["iterations"], kept["grad_accumulate"]
        return {**kept, "updates": self.updates, "batches_per_update": self.grad_accumulate * processes}


def check_same(before: dict[str, Any], now: dict[str, Any], place: str) -> None:
    """Raise UsageError at the first fact that differs from the run that is to go on."""
    for name in dict.fromkeys((*before, *now)):
        if before.get(name) != now.get(name):
            raise UsageError(
                f"{place} was begun with {name.replace('_', ' ')} {_shown(before.get(name))}, now it is "
                f"{_shown(now.get(name))}; run it with the settings it was begun with, or name another --output-dir"
            )


def _shown(value: Any) -> str:
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 24 or not text.startswith("sha256:") else text[:19] + "…"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
