"""The whole FLUX.1 pipeline on parts: diffusers' own loop and scheduler, with a part runner in place of the models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.components import CLIP_TOKENS, Component, Part, Shapes, check_steps
from fluxkiln.errors import ShapeError
from fluxkiln.types import PartRunner
from fluxkiln.verify.modulation import run_rows

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

Configs = Mapping[str, Mapping[str, Any]]
# (input_ids [1, 77], config of text_encoder) -> the row of CLIP's last hidden state that is the pooled output
PooledRow = Callable[["NDArray[Any]", Mapping[str, Any]], int]
# (steps done, steps in all)
OnStep = Callable[[int, int], None]
# packed latents [1, S, 4C] float32, a copy, after each step
OnLatents = Callable[["NDArray[Any]"], None]

PROMPT = "a kiln at night, glowing"
GUIDANCE_SCALE = 3.5


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


@dataclass(frozen=True, slots=True)
class PipelineResult(Rendering):
    """A rendering by parts. `seconds_by_kind` and `calls_by_kind` are sums over all parts of a kind and all steps."""

    seconds_by_kind: Mapping[str, float]
    calls_by_kind: Mapping[str, int]


@dataclass(slots=True)
class PartChain:
    """The parts of a pipeline in the order they run, and what runs them; counts calls and seconds by kind."""

    parts: tuple[Part, ...]
    run_part: PartRunner
    seconds: dict[str, float] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def parts_of(self, component: Component) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.component == component)

    def run(self, part: Part, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        start = time.perf_counter()
        outputs = run_rows(self.run_part, part, inputs)
        self.seconds[part.kind] = self.seconds.get(part.kind, 0.0) + time.perf_counter() - start
        self.calls[part.kind] = self.calls.get(part.kind, 0) + 1
        return outputs


def run_with_parts(
    root: Path,
    configs: Configs,
    shapes: Shapes,
    parts: tuple[Part, ...],
    host_constants: Mapping[str, NDArray[Any]],
    pooled_row: PooledRow,
    run_part: PartRunner,
    *,
    steps: int = 2,
    seed: int = 0,
    prompt: str = PROMPT,
    guidance_scale: float = GUIDANCE_SCALE,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> PipelineResult:
    """Make an image with `run_part` in place of the torch models, which are not loaded.

    Args:
        root: a folder with `scheduler`, `tokenizer` and `tokenizer_2`: a checkpoint or a bundle.
        configs: each component's `config.json`, keyed by its folder name; `vae_tiny` for the tiny decoder.
        shapes: the shapes the parts were made for.
        parts: all parts in the order they run; which VAE and which form of the transformer is meant is seen from them.
            Of the hoisted form, the parts that take all steps at once run before the first step.
        host_constants: `rotary_cos`, `rotary_sin` [J, K] float32, and T5's `position_bias` [1, H, T, T] float32, or
            `position_buckets` [T, T] int32 where it is split.
        pooled_row: picks CLIP's pooled output.
        steps, seed, prompt, guidance_scale: as FluxPipeline takes them; guidance counts where the model embeds it.
        on_step, on_latents: called after each denoising step.

    Raises:
        ShapeError: the host constants were made for other shapes. UsageError: too many steps for the hoisted form.
        Whatever `run_part` raises.
    """
    check_steps(parts, steps)
    with quiet():
        from fluxkiln.verify.stand_ins import build_pipeline

        check_constants(host_constants, shapes)
        chain = PartChain(parts, run_part)
        pipe = build_pipeline(root, configs, chain, host_constants, pooled_row)
    made = render(pipe, shapes, steps, seed, prompt, guidance_scale, on_step, on_latents)
    return PipelineResult(
        made.latents,
        made.image,
        made.prompt_embeds,
        made.pooled_prompt_embeds,
        made.seconds,
        seconds_by_kind={kind: chain.seconds[kind] for kind in chain.seconds},
        calls_by_kind={kind: chain.calls[kind] for kind in chain.calls},
    )


def render(
    pipe: Any,
    shapes: Shapes,
    steps: int,
    seed: int,
    prompt: str,
    guidance_scale: float,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> Rendering:
    """Encode the prompt and run `pipe`, a `diffusers.FluxPipeline`, on the CPU's random numbers for `seed`."""
    import torch

    random = torch.Generator("cpu").manual_seed(seed)
    start = time.perf_counter()
    # quiet: a prompt cut to the build's few tokens is meant, and encode_prompt warns of it
    with torch.no_grad(), quiet():
        embeds, pooled, _ = pipe.encode_prompt(prompt, max_sequence_length=shapes.tokens)
        latents, images = denoise(
            pipe, embeds, pooled, shapes, steps, guidance_scale, random, "np", on_step, on_latents
        )
    seconds = time.perf_counter() - start
    return Rendering(latents.numpy(), images[0], embeds.numpy(), pooled.numpy(), seconds)


def denoise(
    pipe: Any,
    embeds: torch.Tensor,
    pooled: torch.Tensor,
    shapes: Shapes,
    steps: int,
    guidance_scale: float,
    random: torch.Generator,
    output_type: str,
    on_step: OnStep | None = None,
    on_latents: OnLatents | None = None,
) -> tuple[torch.Tensor, Any]:
    """Run `pipe`, a `diffusers.FluxPipeline`, on encoded prompts: the latents after the last step, and its images.

    Args:
        output_type: of the images, as diffusers names it: `np`, or `latent` for none.
    """
    final: dict[str, Any] = {}

    def after_step(_: Any, step: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        final.update(tensors)
        if on_step:
            on_step(step + 1, steps)
        if on_latents:
            on_latents(tensors["latents"].float().numpy().copy())
        return {}

    pipe.set_progress_bar_config(disable=True)
    images = pipe(
        prompt_embeds=embeds,
        pooled_prompt_embeds=pooled,
        height=shapes.height,
        width=shapes.width,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        generator=random,
        output_type=output_type,
        callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["latents"],
    ).images
    return final["latents"], images


def check_constants(host_constants: Mapping[str, NDArray[Any]], shapes: Shapes) -> None:
    """Raise ShapeError when host constants were made for other shapes."""
    lengths = {"rotary_cos": shapes.joint_tokens, "rotary_sin": shapes.joint_tokens, "position_bias": shapes.tokens}
    lengths["position_buckets"] = shapes.tokens
    for name, length in lengths.items():
        if name not in host_constants:
            continue
        found = host_constants[name].shape[-2]
        if found != length:
            raise ShapeError(
                f"{name} is for {found} tokens, {shapes.width}x{shapes.height} with {shapes.tokens} text tokens needs "
                f"{length} (CLIP's {CLIP_TOKENS} do not count); compute the host constants for these shapes"
            )


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
