"""One dataclass of settings for a build, from flags and Make variables; what it leaves open the model decides."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fluxkiln.components import COMPONENTS
from fluxkiln.errors import ShapeError, UsageError

DEFAULT_MODEL = "tiny-dev"
DEFAULT_PROMPT = "a small kiln by a river at night"
STORE_VARIABLE = "FLUXKILN_STORE"


@dataclass(frozen=True, slots=True)
class Settings:
    """What a user asks for.

    Attributes:
        model: a synthetic preset, a folder, or a Hugging Face id.
        size: width and height of the image; None for the model's default.
        tokens: text tokens; None for the model's default.
        scheme: how the blocks are stored; None for the target's default.
        vae: the checkpoint's own decoder, or taef1.
        components: only these of `COMPONENTS`; None for all.
        loras: LoRA files and their strengths, fused into the transformer before anything else.
        modulation: of the transformer: computed in every block in every step, or once per image before the first.
        instance, tp_degree, granularity, lnc, flags: of a target that cuts the model over cores: the instance and how
            many cores share a part, None for the target's default; how many blocks a module holds; physical cores of a
            logical one; the preset of compiler flags.
        jobs: compilers at once; None for one per core.
        build_dir: where bundles and reports go; store: the content-addressed store.
        seed, steps, prompt: of the recorded reference run.
        prompts, seeds: whole images besides it: each of one with each of the other. `prompt` or `seed` stands in for
            the one that is empty; none where both are.
        verify: climb the parity ladder.
        prove: compile one part of each cast kind even if casts from its mould have been proven before.
    """

    target: str
    model: str = DEFAULT_MODEL
    size: tuple[int, int] | None = None
    tokens: int | None = None
    scheme: str | None = None
    vae: Literal["kl", "tiny"] = "kl"
    components: tuple[str, ...] | None = None
    loras: tuple[tuple[Path, float], ...] = ()
    modulation: Literal["inline", "hoisted"] = "hoisted"
    instance: str | None = None
    tp_degree: int | None = None
    granularity: str = "block"
    lnc: int = 1
    flags: Literal["default", "published"] = "default"
    jobs: int | None = None
    build_dir: Path = Path("build")
    store: Path | None = None
    seed: int = 0
    steps: int = 2
    prompt: str = DEFAULT_PROMPT
    prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    verify: bool = True
    prove: bool = False

    def __post_init__(self) -> None:
        if self.vae not in ("kl", "tiny"):
            raise UsageError(f"no VAE is called {self.vae!r}; there are kl (the checkpoint's own) and tiny (taef1)")
        if self.modulation not in ("inline", "hoisted"):
            raise UsageError(f"no form of the transformer is called {self.modulation!r}; there are inline, hoisted")
        if self.flags not in ("default", "published"):
            raise UsageError(f"no preset of compiler flags is called {self.flags!r}; there are default, published")
        for component in self.components or ():
            if component not in COMPONENTS:
                raise UsageError(f"no component is called {component!r}; there are {', '.join(COMPONENTS)}")
        if self.components == ():
            raise UsageError(f"no component was asked for; there are {', '.join(COMPONENTS)}")
        if self.loras and "transformer" not in self.chosen:
            raise UsageError(
                f"LoRAs go into the transformer, and only {', '.join(self.chosen)} is built; leave out --lora, or add "
                "transformer to --components"
            )
        if self.prompts or self.seeds:
            if set(self.chosen) != set(COMPONENTS):
                raise UsageError(
                    f"prompts and seeds make whole images, and only {', '.join(self.chosen)} is built; leave "
                    "--components out"
                )
            if not self.verify:
                raise UsageError("prompts and seeds are for verification, which --no-verify leaves out; drop either")
        for name, value in (
            ("jobs", self.jobs),
            ("tokens", self.tokens),
            ("steps", self.steps),
            ("tp", self.tp_degree),
        ):
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}: at least 1 is needed; leave the option out for the default")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The components to build, in the order of the pipeline."""
        return tuple(name for name in COMPONENTS if name in (self.components or COMPONENTS))

    @property
    def store_path(self) -> Path:
        return self.store or Path(os.environ.get(STORE_VARIABLE) or self.build_dir / "store")


def parse_size(text: str) -> tuple[int, int]:
    """`1024x768` -> (width, height), `1024` -> a square; whether they are legal is for `Shapes` to say."""
    match = re.fullmatch(r"(\d{1,6})(?:[xX*](\d{1,6}))?", text.strip())
    if match is None:
        raise ShapeError(f"size {text!r} is not WIDTHxHEIGHT in pixels; 1024x1024 is FLUX.1's own")
    width = int(match.group(1))
    return width, int(match.group(2) or width)


def parse_loras(texts: Iterable[str]) -> tuple[tuple[Path, float], ...]:
    """`style.safetensors:0.8,other.safetensors` -> files and strengths, 1 where none is given.

    The name of a file that exists is taken as it is, colons and commas included.

    Raises:
        UsageError: no such file, or a strength that is no finite number.
    """
    return tuple(
        _parse_lora(piece.strip())
        for text in texts
        for piece in ([text] if _is_file(text) else text.split(","))
        if piece.strip()
    )


def _parse_lora(text: str) -> tuple[Path, float]:
    head, colon, tail = text.rpartition(":")
    if not colon or _is_file(text):
        head, tail = text, "1"
    file = Path(head).expanduser()
    if not file.is_file():
        what = "is a folder" if file.is_dir() else "there is no such file"
        raise UsageError(f"--lora {text}: {what}; give a LoRA's .safetensors file, as FILE or FILE:STRENGTH")
    try:
        strength = float(tail)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise UsageError(f"--lora {text}: strength {tail!r} is no number; 1 is as trained, 0.8 is weaker")
    return file, strength


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):  # no name that a file could have
        return False
