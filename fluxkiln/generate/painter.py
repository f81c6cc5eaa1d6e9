"""Images from a bundle, in steps that can be used alone: encode, denoise step by step, decode, write as PNG.

The published pipeline's loop in numpy, with the bundle's parts as its models; no checkpoint and no torch is needed.

    bundle = open_bundle(Path("build/cpu/tiny-dev/bundle"))
    with Painter(bundle, open_executor(bundle)) as painter:
        encoded = painter.encode("a kiln at night")
        for step in painter.denoise(encoded, steps=4, seed=0):
            print(step.index, step.latents.std())
        image = painter.decode(step.latents)
"""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fluxkiln import __version__
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor
from fluxkiln.errors import ShapeError, UsageError
from fluxkiln.patches.pipeline import GUIDANCE_SCALE, PartChain, Pipeline, PipelineFiles
from fluxkiln.progress import Laps, Progress, Silent
from fluxkiln.settings import MOST_SEED
from fluxkiln.types import Shapes, check_steps

if TYPE_CHECKING:
    from numpy.typing import NDArray


# prompt, second prompt if there is one, and whether the text is padded to all its tokens
Texts = tuple[str, str | None, bool]


@dataclass(frozen=True, slots=True)
class Request:
    """One image to make. None: the model's default, or for `prompt_2` the prompt itself.

    Not `padded`, its text has as many tokens as it has; the executor has to take them.
    """

    prompt: str
    seed: int = 0
    prompt_2: str | None = None
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None
    tokens: int | None = None
    padded: bool = True

    @property
    def texts(self) -> Texts:
        return self.prompt, self.prompt_2, self.padded


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt as the transformer takes it, by diffusers' argument names, float32. `notes` say what was cut.

    FLUX.1's: `prompt_embeds` [1, T, joint] and `pooled_prompt_embeds` [1, pooled].
    """

    embeds: Mapping[str, NDArray[Any]]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Step:
    """A finished denoising step: its number from 1, how many there are, packed latents [1, S, 4C] after it."""

    index: int
    steps: int
    latents: NDArray[Any]
    seconds: float


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished image [height, width, 3] uint8, and the latents [1, S, 4C] it was decoded from."""

    request: Request
    image: NDArray[Any]
    latents: NDArray[Any]
    seconds: float
    notes: tuple[str, ...] = ()


MARGIN = 8  # pixels between the images of a grid
_NEAREST = 3  # sizes, where one is not there
# a step may be given other latents, as diffusers' callback_on_step_end may
OnStep = Callable[[Step], "NDArray[Any] | None"]


@dataclass(slots=True)
class Painter:
    """A model's pipeline on a bundle's parts, of several sizes at the first; `Bundle.at` gives the others. `known` are
    prompts that are encoded already.

    ShapeError: the bundle's constants are for other shapes than its parts.
    """

    bundle: Bundle
    executor: Executor
    laps: Laps = field(default_factory=Laps)
    known: dict[Texts, Encoded] = field(default_factory=dict)
    _chain: PartChain = field(init=False)
    _pipeline: Pipeline = field(init=False)
    # hoisted modulation: a quarter of the transformer's weights, and needed before the first step only; images of the
    # same prompt, steps and guidance have the same
    _once: frozenset[str] = field(init=False)
    _known: dict[str, tuple[bytes, dict[str, NDArray[Any]]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.bundle = bundle = self.bundle.at(self.bundle.shapes)
        self._once = frozenset(part.name for part in bundle.parts if part.traits.rows)
        self._chain = PartChain(bundle.parts, self._run_part)
        files = PipelineFiles(bundle.folder, bundle.configs, bundle.constants)
        self._pipeline = bundle.model.build_pipeline(files, self._chain, bundle.manifest.shapes)

    @property
    def part_seconds(self) -> float:
        """What the parts took up to now, loading included; the rest of the time is the pipeline's own."""
        return sum(self._chain.seconds.values())

    def encode(self, prompt: str, prompt_2: str | None = None, padded: bool = True) -> Encoded:
        """Encode a prompt with both text encoders.

        A prompt longer than the tokens is cut, as diffusers does, and the notes say how much.
        """
        known = self.known.get((prompt, prompt_2, padded))
        return known or Encoded(*self._pipeline.encode(prompt, prompt_2, padded))

    def denoise(
        self,
        encoded: Encoded,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        latents: NDArray[Any] | None = None,
        on_step: OnStep | None = None,
    ) -> Generator[Step, None, None]:
        """Denoise, one step each time the next value is asked for.

        Args:
            steps, guidance: the model's own by default (28 for dev, 4 for schnell; 3.5).
            latents: [1, S, 4C] to begin with, noise of `seed` by default.
            on_step: called in each step; what it returns, if anything, takes the place of the latents.

        Raises:
            UsageError: more steps than the bundle's modulation holds, or guidance for a model without it.
        """
        check_request(self.bundle, Request("", seed, None, steps, guidance))
        count, scale = steps or default_steps(self.bundle), GUIDANCE_SCALE if guidance is None else guidance
        loop = self._pipeline.denoise(encoded.embeds, steps=count, guidance=scale, seed=seed, latents=latents)
        changed: NDArray[Any] | None = None
        for index in range(count):
            began = time.perf_counter()
            made = loop.send(changed)
            step = Step(index + 1, count, made.copy(), time.perf_counter() - began)
            changed = on_step(step) if on_step else None
            yield step

    def decode(self, latents: NDArray[Any]) -> NDArray[Any]:
        """The image [height, width, 3] uint8 of packed latents [1, S, 4C]."""
        return (self._pipeline.decode(latents) * 255).round().astype("uint8")

    def close(self) -> None:
        """Close the executor."""
        self._known.clear()
        self.executor.close()

    def __enter__(self) -> Painter:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run_part(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        if part not in self._once:
            return self.executor(part, inputs)
        digest = _digest(inputs)
        known, outputs = self._known.get(part, (b"", {}))
        if known != digest:
            outputs = self.executor(part, inputs)
            self._known[part] = digest, outputs
        self.executor.drop(part)
        return outputs


def default_steps(bundle: Bundle) -> int:
    """How many steps the model card takes."""
    return bundle.model.steps[bundle.manifest.variant]


def choose_size(bundle: Bundle, size: tuple[int, int] | None = None, tokens: int | None = None) -> Shapes:
    """The first of a bundle's sizes that has this width and height, and so many text tokens, as far as they are given.

    Raises:
        ShapeError: it has none; the nearest are named.
    """
    fitting = [one for one in bundle.sizes if size in (None, (one.width, one.height)) and tokens in (None, one.tokens)]
    if fitting:
        return fitting[0]
    width, height = size or (bundle.shapes.width, bundle.shapes.height)
    wanted = Shapes(height, width, bundle.shapes.tokens if tokens is None else tokens)

    def distance(one: Shapes) -> float:
        sides = abs(math.log(one.width / wanted.width)) + abs(math.log(one.height / wanted.height))
        return sides + abs(math.log(one.tokens / wanted.tokens)) / _NEAREST

    named = [f"{one.width}x{one.height} with {one.tokens} text tokens" for one in sorted(bundle.sizes, key=distance)]
    several = f"{len(named)} sizes, of which the nearest are " * (len(named) > _NEAREST)
    asked = f"size {width}x{height}" if size else f"{tokens} text tokens"
    more = f" with {tokens} text tokens" * bool(size and tokens)
    options = " ".join([f"--size {width}x{height}"] * bool(size) + [f"--tokens {tokens}"] * bool(tokens))
    raise ShapeError(
        f"{asked}{more}: this bundle was compiled for {several}{', '.join(named[:_NEAREST])}; choose one of these, "
        f"or build one with {options}"
    )


def check_request(bundle: Bundle, request: Request) -> None:
    """Refuse what this bundle cannot make.

    Raises:
        ShapeError: another size or token count than it was compiled for. UsageError: guidance for a model that takes
        none, no steps or too many, a seed that is out of range.
    """
    variant = bundle.manifest.variant
    choose_size(bundle, request.size, request.tokens)
    if request.guidance is not None:
        if not bundle.takes_guidance:
            raise UsageError(
                f"guidance {request.guidance:g}: {bundle.model.title}-{variant} was distilled without guidance and "
                "takes none; leave it out"
            )
        if not 0 <= request.guidance <= 100:
            raise UsageError(f"guidance {request.guidance:g}: it must be from 0 to 100, 3.5 is the usual one")
    if request.steps is not None and request.steps < 1:
        raise UsageError(f"{request.steps} steps: at least 1 is needed, {default_steps(bundle)} is the model's own")
    check_steps(bundle.parts, request.steps or default_steps(bundle))
    if not 0 <= request.seed <= MOST_SEED:
        raise UsageError(f"seed {request.seed}: it must be from 0 to {MOST_SEED}")


def paint(
    painter: Painter,
    requests: Iterable[Request],
    progress: Progress | None = None,
    on_step: Callable[[int, Step], None] | None = None,
) -> Iterator[Picture]:
    """Make images: all prompts are encoded, the text encoders released, all images denoised, then decoded.

    `on_step` is called with the number of the image and its step. Errors as `check_request`, before anything runs.
    """
    bundle, executor, laps = painter.bundle, painter.executor, painter.laps
    progress = progress or Silent()
    wanted = list(requests)
    for request in wanted:
        check_request(bundle, request)
    laps.lap("other")
    encoded: dict[Texts, Encoded] = {}
    prompts = list(dict.fromkeys(request.texts for request in wanted))
    progress.stage("encode", len(prompts))
    for prompt in prompts:
        encoded[prompt] = painter.encode(*prompt)
        progress.done("encode", repr(prompt[0][:40]), "encoded")
    for note in dict.fromkeys(note for one in encoded.values() for note in one.notes):
        progress.note(note)
    for component in bundle.model.tokenizers:
        executor.release(component)
    laps.lap("encode")
    executor.load("transformer")
    laps.lap("load")
    finished: list[tuple[Request, NDArray[Any], float]] = []
    progress.stage("denoise", sum(request.steps or default_steps(bundle) for request in wanted))
    for number, request in enumerate(wanted):
        began = time.perf_counter()
        steps = painter.denoise(
            encoded[request.texts],
            steps=request.steps, guidance=request.guidance, seed=request.seed,
        )  # fmt: skip
        for step in steps:
            progress.done("denoise", f"image {number + 1}, step {step.index}", f"in {step.seconds:.1f} s")
            if on_step:
                on_step(number, step)
        finished.append((request, step.latents, time.perf_counter() - began))
    executor.release("transformer")
    laps.lap("denoise")
    progress.stage("decode", len(finished))
    for request, latents, seconds in finished:
        began = time.perf_counter()
        image = painter.decode(latents)
        laps.lap("decode")
        progress.done("decode", f"seed {request.seed}", "decoded")
        notes = encoded[request.texts].notes
        yield Picture(request, image, latents, seconds + time.perf_counter() - began, notes)
    executor.release("vae")


def describe_picture(bundle: Bundle, executor: str, request: Request) -> dict[str, str]:
    """What a PNG carries: prompt, seed, steps, guidance, the bundle's name and digest, and what ran it."""
    guidance = GUIDANCE_SCALE if request.guidance is None else request.guidance
    return {
        "prompt": request.prompt,
        **({"prompt_2": request.prompt_2} if request.prompt_2 else {}),
        "seed": str(request.seed),
        "steps": str(request.steps or default_steps(bundle)),
        **({"guidance": f"{guidance:g}"} if bundle.takes_guidance else {}),
        "model": f"{bundle.model.title}-{bundle.manifest.variant} {bundle.manifest.checkpoint.source}",
        "bundle": bundle.digest,
        "bundle_name": f"{bundle.manifest.name} for {bundle.manifest.target}",
        "executor": executor,
        "Software": f"fluxkiln {__version__}",
    }


def png_bytes(image: NDArray[Any], facts: Mapping[str, str]) -> bytes:
    """A PNG of an image [height, width, 3] uint8, with `facts` as its text chunks."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for name, text in facts.items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def make_grid(images: Sequence[NDArray[Any]], rows: int) -> NDArray[Any]:
    """Images of one size [height, width, 3] uint8 in `rows` rows, filled row by row, white where there is none;
    UsageError for more rows than images, or none."""
    import numpy as np

    if not 1 <= rows <= len(images):
        raise UsageError(f"{rows} rows for {len(images)} images: give from 1 to {len(images)}")
    columns = -(-len(images) // rows)
    height, width, _ = images[0].shape
    shape = (rows * (height + MARGIN) - MARGIN, columns * (width + MARGIN) - MARGIN, 3)
    grid = np.full(shape, 255, np.uint8)
    for number, image in enumerate(images):
        top, left = (number // columns) * (height + MARGIN), (number % columns) * (width + MARGIN)
        grid[top : top + height, left : left + width] = image
    return grid


def _digest(inputs: Mapping[str, NDArray[Any]]) -> bytes:
    import numpy as np

    found = hashlib.blake2b()
    for name in sorted(inputs):
        found.update(f"{name} {inputs[name].dtype} {inputs[name].shape}\n".encode())
        found.update(np.ascontiguousarray(inputs[name]).view(np.uint8).data)
    return found.digest()
