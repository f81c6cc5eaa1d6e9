"""The recipes of trained presets, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Amounts:
    """How much of everything: steps of each stage, pictures drawn, captions of each, pictures a step."""

    vae: int = 2400
    vae_colour: int = 1400
    vae_tiny: int = 300
    words: int = 3000
    base: int = 5000
    finer: int = 3400
    guidance: int = 400
    steps: int = 600
    pictures: int = 20_000
    vae_pictures: int = 3000
    captions: int = 3
    batch: int = 16
    vae_batch: int = 4
    words_batch: int = 64
    # How many steps of its own the teacher takes where the four-step model takes one.
    substeps: int = 4


@dataclass(frozen=True)
class Recipe:
    """One trained preset: the stages it goes through, what it is made from."""

    name: str
    stages: tuple[str, ...]
    teacher: str = ""
    amounts: Amounts = field(default_factory=Amounts)
    seed: int = 0


RECIPES: Mapping[str, Recipe] = {
    "scenes-dev": Recipe("scenes-dev", ("vae", "vae_colour", "words", "base", "finer", "guidance", "vae_tiny")),
    "scenes-schnell": Recipe("scenes-schnell", ("steps",), teacher="scenes-dev"),
}
