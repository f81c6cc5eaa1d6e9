"""A model's pipeline on parts: what stands between them, and a part runner in place of the models."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fluxkiln.errors import UsageError
from fluxkiln.types import Configs, Part, PartRunner

if TYPE_CHECKING:
    from numpy.typing import NDArray

# packed latents [1, S, 4C] float32, a copy, after each step
OnLatents = Callable[["NDArray[Any]"], None]

PROMPT = "a kiln at night, glowing"
GUIDANCE_SCALE = 3.5


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a picture is made, as diffusers' pipelines take it; guidance counts where the model embeds it."""

    steps: int = 2
    seed: int = 0
    prompt: str = PROMPT
    guidance_scale: float = GUIDANCE_SCALE


@dataclass(frozen=True, slots=True)
class PipelineFiles:
    """What a pipeline is made of besides its parts.

    Attributes:
        root: a folder with scheduler and tokenizers: a checkpoint or a bundle.
        configs: each component's `config.json`, keyed by its folder name.
        constants: what the host hands to the parts, by name.
    """

    root: Path
    configs: Configs
    constants: Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Rendering:
    """What a pipeline computed.

    latents [1, S, 4C] after the last step, packed; image [height, width, 3] in 0..1; prompt_embeds [1, T, joint] and
    pooled_prompt_embeds [1, pooled]; all float32.
    """

    latents: NDArray[Any]
    image: NDArray[Any]
    prompt_embeds: NDArray[Any]
    pooled_prompt_embeds: NDArray[Any]
    seconds: float


class Pipeline(Protocol):
    """A model's loop on parts, in numpy, float32. One image at a time."""

    def encode(
        self, prompt: str, prompt_2: str | None = None, padded: bool = True
    ) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
        """A prompt as `denoise` takes it, by diffusers' argument names, and sentences on what was cut of it.

        Not `padded`, the longer text has as many tokens as it has, for parts that take any number.
        """

    def denoise(
        self,
        encoded: Mapping[str, NDArray[Any]],
        *,
        steps: int,
        guidance: float,
        seed: int,
        latents: NDArray[Any] | None = None,
    ) -> Generator[NDArray[Any], NDArray[Any] | None, None]:
        """Packed latents [1, S, 4C] after each step; what is sent in, if anything, takes their place.

        `latents` is what to begin with, the noise of `seed` for None.
        """

    def decode(self, latents: NDArray[Any]) -> NDArray[Any]:
        """The image [height, width, 3] in 0..1 of packed latents."""


@dataclass(slots=True)
class PartChain:
    """The parts of a pipeline in the order they run, and what runs them; counts calls and seconds by kind."""

    parts: tuple[Part, ...]
    run_part: PartRunner
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def parts_of(self, component: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.component == component)

    def run(self, part: Part, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = run_rows(self.run_part, part, inputs)
        self.seconds[part.kind] = self.seconds.get(part.kind, 0.0) + time.perf_counter() - start
        self.calls[part.kind] = self.calls.get(part.kind, 0) + 1
        return outputs


def run_rows(run_part: PartRunner, part: Part, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run `part`; where its kind takes rows, with any number of them that it has room for.

    The part gets all the rows it was made for, the last one repeated, and the answer is cut back to those that were
    asked for. Other kinds are run as they are.

    Raises:
        UsageError: too many rows, or not equally many in all inputs. Whatever `run_part` raises.
    """
    filled, rows = fill_rows(part, inputs)
    if not rows:
        return run_part(part.name, inputs)
    return {name: output[:rows] for name, output in run_part(part.name, filled).items()}


def fill_rows(part: Part, inputs: Mapping[str, NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], int]:
    """Inputs with all the rows that `part` was made for, and how many were given; 0 where its kind takes no rows.

    Raises:
        UsageError: too many rows, or not equally many in all inputs.
    """
    import numpy as np

    names, most = [name for name in part.traits.rows if name in inputs], part.traits.most_rows
    if not names:
        return dict(inputs), 0
    given = {inputs[name].shape[0] for name in names}
    rows = given.pop()
    if given or not 1 <= rows <= most:
        shown = ", ".join(f"{name} {inputs[name].shape[0]}" for name in names)
        raise UsageError(f"part {part.name} was given rows: {shown}; it takes 1 to {most} of each")
    spread = np.minimum(np.arange(most), rows - 1)
    return {name: array[spread] if name in names else array for name, array in inputs.items()}, rows


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from diffusers and transformers; errors still show."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
