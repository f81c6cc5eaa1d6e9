"""diffusers' FluxPipeline (checked with 0.42.1): one whose models are stand-ins that call a part runner, part by part,
and how any is run on one prompt, all of it, as much of it as is there, or stage by stage.

Between parts arrays stay numpy; torch tensors are only what the pipeline gives and takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fluxkiln.errors import PatchError, ShapeError
from fluxkiln.patches.flux1.inputs import pooled_row
from fluxkiln.patches.flux1.kinds import CLIP_TOKENS, MODULATION_CHUNKS, modulation_name
from fluxkiln.patches.flux1.sidecars import load_sidecars
from fluxkiln.patches.pipeline import OnLatents, PartChain, PipelineFiles, Rendering, Sampling, quiet
from fluxkiln.types import Part, Shapes

SHOWN_CUT = 160  # characters of what was cut from a prompt


def render(pipe: Any, shapes: Shapes, sampling: Sampling, on_latents: OnLatents | None = None) -> Rendering:
    """Run `pipe`, a `diffusers.FluxPipeline` with None for the models it has not got, on the CPU's random numbers.

    Without an encoder its embedding is normal random numbers for the seed, without a transformer so are the latents
    that a VAE is given. What is neither given nor made is empty.
    """
    random = torch.Generator("cpu").manual_seed(sampling.seed)
    embeds, pooled, latents = (torch.empty(0) for _ in range(3))
    image = np.empty((0, 0, 3), np.float32)
    start = time.perf_counter()

    def after_step(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal latents
        latents = tensors["latents"]
        if on_latents:
            on_latents(latents.float().numpy().copy())
        return {}

    # quiet: a prompt cut to the build's few tokens is meant, and diffusers warns of it
    with torch.no_grad(), quiet():
        if pipe.text_encoder is not None:
            pooled = pipe._get_clip_prompt_embeds(sampling.prompt, device="cpu")
        if pipe.text_encoder_2 is not None:
            embeds = pipe._get_t5_prompt_embeds(
                sampling.prompt, max_sequence_length=shapes.tokens, device="cpu", dtype=torch.float32
            )
        elif pipe.transformer is not None:
            embeds = torch.randn(1, shapes.tokens, pipe.transformer.config.joint_attention_dim, generator=random)
        if pipe.text_encoder is None and pipe.transformer is not None:
            pooled = torch.randn(1, pipe.transformer.config.pooled_projection_dim, generator=random)
        if pipe.transformer is not None:
            encoded = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
            denoise(
                pipe, encoded, shapes, after_step, steps=sampling.steps, guidance=sampling.guidance_scale, random=random
            )
            if pipe.vae is not None:
                image = decode(pipe, shapes, latents.numpy())
        elif pipe.vae is not None:
            config = pipe.vae.config
            latents = torch.randn(1, config.latent_channels, *shapes.latent_hw, generator=random)
            decoded = pipe.vae.decode(latents / config.scaling_factor + config.shift_factor, return_dict=False)[0]
            image = pipe.image_processor.postprocess(decoded, output_type="np")[0]
    seconds = time.perf_counter() - start
    return Rendering(latents.numpy(), image, embeds.numpy(), pooled.numpy(), seconds)


def denoise(
    pipe: Any, encoded: Mapping[str, Any], shapes: Shapes, after_step: Callable[..., dict[str, Any]], *,
    steps: int, guidance: float, random: Any, latents: Any = None,
) -> None:  # fmt: skip
    """Run the loop of `pipe` on encoded prompts.

    Args:
        encoded: by diffusers' argument names. after_step: diffusers' `callback_on_step_end`, given the latents.
        random: a torch.Generator.
    """
    pipe.set_progress_bar_config(disable=True)
    pipe(
        **encoded, height=shapes.height, width=shapes.width, num_inference_steps=steps, guidance_scale=guidance,
        generator=random, latents=latents, output_type="latent", callback_on_step_end=after_step,
        callback_on_step_end_tensor_inputs=["latents"],
    )  # fmt: skip


def encode(
    pipe: Any, shapes: Shapes, prompt: str, prompt_2: str | None
) -> tuple[dict[str, NDArray[Any]], tuple[str, ...]]:
    """A prompt as `denoise` takes it, float32, and a sentence for each encoder that does not see all of it."""
    with torch.no_grad(), quiet():
        notes = (
            *_cut_note(pipe.tokenizer, prompt, CLIP_TOKENS, "CLIP"),
            *_cut_note(pipe.tokenizer_2, prompt_2 or prompt, shapes.tokens, "T5"),
        )
        embeds, pooled, _ = pipe.encode_prompt(prompt, prompt_2 or None, max_sequence_length=shapes.tokens)
    return {"prompt_embeds": embeds.numpy(), "pooled_prompt_embeds": pooled.numpy()}, notes


def decode(pipe: Any, shapes: Shapes, latents: NDArray[Any]) -> NDArray[Any]:
    """The image [height, width, 3] in 0..1 of packed latents [1, S, 4C].

    Source: the end of diffusers' `FluxPipeline.__call__`.
    """
    config = pipe.vae.config
    with torch.no_grad(), quiet():
        packed = torch.from_numpy(np.array(latents, np.float32))
        unpacked = pipe._unpack_latents(packed, shapes.height, shapes.width, pipe.vae_scale_factor)
        image = pipe.vae.decode(unpacked / config.scaling_factor + config.shift_factor)[0]
        made: NDArray[Any] = pipe.image_processor.postprocess(image, output_type="np")[0]
    return made


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


def _cut_note(tokenizer: Any, prompt: str, tokens: int, name: str) -> tuple[str, ...]:
    """What of a prompt a text encoder does not see, as a sentence; nothing where all of it fits."""
    ids = tokenizer(prompt).input_ids
    if len(ids) <= tokens:
        return ()
    # the last token is the end mark, which the cut prompt has as well
    lost = ids[tokens - 1 : -1]
    text = tokenizer.decode(lost, skip_special_tokens=True)
    shown = text if len(text) <= SHOWN_CUT else f"{text[:SHOWN_CUT]}…"
    return (f"{name} takes {tokens} tokens and the prompt has {len(ids)}: the last {len(lost)} were cut: {shown!r}",)


_Array = NDArray[Any]


class _StandIn(nn.Module):
    """A component without parameters: float32, on the CPU."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, component: str, chain: PartChain, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.chain = chain
        self.parts = chain.parts_of(component)
        self.config = SimpleNamespace(**config)

    def parts_of_kind(self, kind: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.kind == kind)

    def run_kind(self, kind: str, **inputs: _Array) -> dict[str, _Array]:
        """Run the only part of `kind`."""
        (part,) = self.parts_of_kind(kind)
        return self.chain.run(part, inputs)


class TextEncoder(_StandIn):
    """CLIP: one part; the pooled row is picked here."""

    def __init__(self, chain: PartChain, config: Mapping[str, Any]) -> None:
        super().__init__("text_encoder", chain, config)
        self.pooled_row: Callable[[_Array], int] = lambda input_ids: pooled_row(input_ids, config)

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        ids = input_ids.numpy()
        hidden = _tensor(self.run_kind("clip", input_ids=ids)["last_hidden_state"])
        return SimpleNamespace(last_hidden_state=hidden, pooler_output=hidden[:, self.pooled_row(ids)])


class TextEncoder2(_StandIn):
    """T5: embedding, blocks, final norm."""

    def __init__(self, chain: PartChain, config: Mapping[str, Any], constants: Mapping[str, _Array]) -> None:
        super().__init__("text_encoder_2", chain, config)
        self.constants = constants

    def forward(self, input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        if self.parts_of_kind("t5"):
            buckets = self.constants["position_buckets"]
            made = self.run_kind("t5", input_ids=input_ids.numpy(), position_buckets=buckets)
            return (_tensor(made["last_hidden_state"]),)
        hidden = self.run_kind("t5_embed", input_ids=input_ids.numpy())["hidden_states_out"]
        for part in self.parts_of_kind("t5_block"):
            inputs = {"hidden_states": hidden, "position_bias": self.constants["position_bias"]}
            hidden = self.chain.run(part, inputs)["hidden_states_out"]
        return (_tensor(self.run_kind("t5_final", hidden_states=hidden)["last_hidden_state"]),)


class Transformer(_StandIn):
    """The inline form: head, double blocks, single blocks on the joint sequence, tail on the image tokens."""

    def __init__(self, chain: PartChain, config: Mapping[str, Any], rotary: Mapping[str, _Array]) -> None:
        defaults = {"guidance_embeds": False}
        super().__init__("transformer", chain, {**defaults, **config})
        self.rotary = dict(rotary)

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """Diffusers marks its calls for caches of block outputs, of which there are none here."""
        yield

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        guidance: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor]:
        # img_ids and txt_ids are among the rest: their embedding is in `rotary`
        tokens = {"hidden_states": hidden_states.numpy(), "encoder_hidden_states": encoder_hidden_states.numpy()}
        times = {
            "pooled_projections": pooled_projections.numpy(),
            "timestep": timestep.numpy(),
            **({} if guidance is None else {"guidance": guidance.numpy()}),
        }
        return (_tensor(self.denoise(tokens, times)),)

    def denoise(self, tokens: Mapping[str, _Array], times: Mapping[str, _Array]) -> _Array:
        """One step: the velocity [1, S, 4C] of what `head` takes."""
        head = self.run_kind("head", **tokens, **times)
        temb = head["temb"]
        return self.run_blocks(head["hidden_states_out"], head["encoder_hidden_states_out"], lambda _: {"temb": temb})

    def run_blocks(self, image: _Array, text: _Array, condition: Callable[[Part], Mapping[str, _Array]]) -> _Array:
        """Blocks in the order of the parts and the tail, each with what `condition` has for it."""
        (tail,) = (part for part in self.parts if part.traits.family == "tail")
        joint: _Array | None = None  # text and image as single blocks pass them on
        for part in (part for part in self.parts if part.traits.is_block):
            given = {**condition(part), **self.rotary}
            if part.traits.family == "single":
                joint = np.concatenate([text, image], axis=1) if joint is None else joint
                joint = self.chain.run(part, {"hidden_states": joint, **given})["hidden_states_out"]
                continue
            if joint is not None:
                text, image, joint = *_apart(joint, text), None
            out = self.chain.run(part, {"hidden_states": image, "encoder_hidden_states": text, **given})
            image, text = out["hidden_states_out"], out["encoder_hidden_states_out"]
        if joint is not None:
            _, image = _apart(joint, text)
        return self.chain.run(tail, {"hidden_states": image, **condition(tail)})["sample"]


class HoistedTransformer(Transformer):
    """The hoisted form: all steps' modulation before the first step, then at each step blocks and tail with their row.

    The steps are the scheduler's, which has them before the pipeline's loop begins.
    """

    def __init__(
        self, chain: PartChain, config: Mapping[str, Any], rotary: Mapping[str, _Array], scheduler: Any
    ) -> None:
        super().__init__(chain, config, rotary)
        self.scheduler = scheduler
        self.timesteps: _Array = np.empty(0, np.float32)
        self.modulation: dict[str, _Array] = {}

    def denoise(self, tokens: Mapping[str, _Array], times: Mapping[str, _Array]) -> _Array:
        step = self.scheduler.step_index or 0  # None until its first step is done
        if step == 0:
            self._modulate(times)
        asked, known = times["timestep"].tolist(), self.timesteps[step : step + 1].tolist()
        if asked != known:
            raise PatchError(
                f"step {step} of the pipeline is at {asked}, the scheduler has it at {known}; install the versions "
                "pinned in constraints.txt"
            )
        made = self.run_kind("token_embed", **tokens)

        def condition(part: Part) -> dict[str, _Array]:
            return {"modulation": self.modulation[modulation_name(part.name)][step : step + 1]}

        return self.run_blocks(made["hidden_states_out"], made["encoder_hidden_states_out"], condition)

    def _modulate(self, times: Mapping[str, _Array]) -> None:
        """Run what depends on the time alone, one row a step."""
        # as the pipeline hands them to the model
        self.timesteps = (self.scheduler.timesteps / 1000).numpy()
        rows = {"timestep": self.timesteps}
        if "guidance" in times:
            rows["guidance"] = np.repeat(times["guidance"], len(self.timesteps))
        temb = self.run_kind("time_embed", pooled_projections=times["pooled_projections"], **rows)["temb"]
        self.modulation = {
            part.name: self.chain.run(part, {"temb": temb})["modulation"]
            for part in self.parts
            if part.traits.family == "modulation"
        }


class SplitTransformer(Transformer):
    """The form of a split model: a head with all modulation of the step, parts of one or several blocks, tail."""

    def denoise(self, tokens: Mapping[str, _Array], times: Mapping[str, _Array]) -> _Array:
        if self.parts_of_kind("transformer"):
            return self.run_kind("transformer", **tokens, **times, **self.rotary)["sample"]
        head = self.run_kind("modulated_head", **tokens, **times)
        rows, position = {}, 0
        for part in self.parts:
            if part.traits.cut in MODULATION_CHUNKS:
                taken = _blocks_of(part) * MODULATION_CHUNKS[part.traits.cut]
                rows[part.name] = head["modulation"][:, position : position + taken]
                position += taken
        return self.run_blocks(
            head["hidden_states_out"],
            head["encoder_hidden_states_out"],
            lambda part: {"modulation": np.ascontiguousarray(rows[part.name])},
        )


def _apart(joint: _Array, text: _Array) -> tuple[_Array, _Array]:
    """The joint sequence as text of the length of `text`, and image."""
    first, second = np.split(joint, [text.shape[1]], axis=1)
    return np.ascontiguousarray(first), np.ascontiguousarray(second)


def _blocks_of(part: Part) -> int:
    """`double.04-07` holds four blocks, `double.04` and `tail` one."""
    first, dash, last = part.name.partition(".")[2].partition("-")
    return int(last) - int(first) + 1 if dash else 1


class Vae(_StandIn):
    """Either decoder; the pipeline has undone scaling and shift."""

    def __init__(self, chain: PartChain, config: Mapping[str, Any]) -> None:
        (part,) = chain.parts_of("vae")
        if part.kind == "tiny_vae_decoder":
            # AutoencoderTiny registers the first itself; the others are its defaults
            tiny = {"block_out_channels": config["decoder_block_out_channels"], "scaling_factor": 1.0}
            config = {**tiny, "shift_factor": 0.0, **config}
        super().__init__("vae", chain, config)
        self.part = part

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (_tensor(self.chain.run(self.part, {"latents": latents.numpy()})["image"]),)


def build_pipeline(files: PipelineFiles, chain: PartChain, pipeline_class: Any = None) -> Any:
    """A pipeline with the folder's tokenizers and scheduler, and stand-ins for its models; `FluxPipeline` by default.

    Its constants: `rotary_cos`, `rotary_sin` [J, K] float32, and T5's `position_bias` [1, H, T, T] float32, or
    `position_buckets` [T, T] int32 where it is split.
    """
    from diffusers import FluxPipeline

    configs = files.configs
    rotary = {name: files.constants[name] for name in ("rotary_cos", "rotary_sin")}
    sidecars = load_sidecars(files.root, ("text_encoder", "text_encoder_2"))
    kinds = {part.kind for part in chain.parts}
    if kinds & {"modulated_head", "transformer"}:
        transformer: Transformer = SplitTransformer(chain, configs["transformer"], rotary)
    elif "head" in kinds:
        transformer = Transformer(chain, configs["transformer"], rotary)
    else:
        transformer = HoistedTransformer(chain, configs["transformer"], rotary, sidecars["scheduler"])
    return (pipeline_class or FluxPipeline)(
        **sidecars,
        text_encoder=TextEncoder(chain, configs["text_encoder"]),
        text_encoder_2=TextEncoder2(chain, configs["text_encoder_2"], files.constants),
        transformer=transformer,
        vae=Vae(chain, configs[chain.parts_of("vae")[0].folder]),
    )


def _tensor(array: _Array) -> Tensor:
    # a copy: a runner's array may be read-only or not aligned
    return torch.from_numpy(np.array(array, dtype=np.float32))
