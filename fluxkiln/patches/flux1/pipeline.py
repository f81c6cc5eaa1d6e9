"""FLUX.1's loop on parts, as FluxPipeline of diffusers (checked with 0.42.1) runs it on models: prompts to ids, parts
in their order, the schedule, pixels. numpy throughout: neither torch nor diffusers nor transformers is needed.

Source: diffusers' pipeline_flux.py and transformer_flux.py. What lies between the parts equals theirs to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.documents import read_object_file
from fluxkiln.errors import ShapeError, UsageError
from fluxkiln.patches.flux1.inputs import input_shapes, pooled_row, rotary_angles
from fluxkiln.patches.flux1.kinds import ALL_KINDS, CONSTANT_INPUTS, MODULATION_CHUNKS, modulation_name
from fluxkiln.patches.flux1.prompts import PromptTokenizer, read_clip_tokenizer, read_t5_tokenizer
from fluxkiln.patches.flux1.scheduler import noise_levels, take_step, timesteps_of
from fluxkiln.patches.flux1.schemas import check_configs
from fluxkiln.patches.noise import normal_noise
from fluxkiln.patches.pipeline import PartChain, PipelineFiles
from fluxkiln.types import Part, Shapes

# of tables that diffusers computed: float32 of the same sines, far below what the next position has
TABLE_ERROR = 1e-5
_Array = NDArray[Any]
_Arrays = Mapping[str, _Array]


def check_constants(files: PipelineFiles, parts: Iterable[Part], shapes: Shapes) -> None:
    """Raise ShapeError when the host's constants are not what the parts take at these shapes: positions by value, too,
    as two sizes may have tables of one shape."""
    wanted: dict[str, tuple[int, ...]] = {}
    for kind in {part.kind for part in parts}:
        wanted |= input_shapes(ALL_KINDS[kind], files.configs, shapes)
    for name in CONSTANT_INPUTS:
        found = files.constants.get(name)
        here = None if found is None else (found.shape, str(found.dtype))
        if name in wanted and here != (wanted[name], "int32" if name == "position_buckets" else "float32"):
            told = f"{here[1]} {list(here[0])}" if here else "not there"
            raise ShapeError(
                f"{name} is {told}, {shapes.width}x{shapes.height} with {shapes.tokens} text tokens needs "
                f"{list(wanted[name])}; compute the host constants for these shapes"
            )
    if "rotary_cos" in wanted:
        angles = rotary_angles(files.configs["transformer"], shapes)
        for name, table in (("rotary_cos", np.cos(angles)), ("rotary_sin", np.sin(angles))):
            if not np.allclose(files.constants[name], table, rtol=0, atol=TABLE_ERROR):
                raise ShapeError(
                    f"{name} does not have the positions of {shapes.width}x{shapes.height} with {shapes.tokens} text "
                    "tokens; compute the host constants for these shapes"
                )


@dataclass(frozen=True, slots=True)
class FluxParts:
    """A pipeline of parts; see `patches.pipeline.Pipeline`.

    Attributes:
        constants: `rotary_cos`, `rotary_sin` [J, K] float32, and T5's `position_bias` [1, H, T, T] float32, or
            `position_buckets` [T, T] int32 where it is split.
        scheduler: its config. clip, t5: None where there are no text encoders.
    """

    chain: PartChain
    shapes: Shapes
    configs: Mapping[str, Mapping[str, Any]]
    constants: _Arrays
    scheduler: Mapping[str, Any]
    clip: PromptTokenizer | None
    t5: PromptTokenizer | None

    def encode(
        self, prompt: str, prompt_2: str | None = None, padded: bool = True
    ) -> tuple[dict[str, _Array], tuple[str, ...]]:
        if self.clip is None or self.t5 is None:
            raise UsageError(
                "there are no text encoders here; give the prompt's embeddings (--embeddings), or a bundle that has "
                "them (--encoders)"
            )
        ids, notes = self.clip.encode(prompt)
        words, more = self.t5.encode(prompt_2 or prompt, padded)
        # CLIP is one part; the pooled row is picked here
        hidden = self._run("clip", input_ids=ids)["last_hidden_state"]
        pooled = hidden[:, pooled_row(ids, self.configs["text_encoder"])]
        return {"prompt_embeds": self._encode_words(words), "pooled_prompt_embeds": pooled}, (*notes, *more)

    def _encode_words(self, ids: _Array) -> _Array:
        if self._parts_of("t5"):
            return self._run("t5", input_ids=ids, position_buckets=self.constants["position_buckets"])[
                "last_hidden_state"
            ]
        hidden = self._run("t5_embed", input_ids=ids)["hidden_states_out"]
        bias = self.constants["position_bias"][..., : ids.shape[1], : ids.shape[1]]
        for part in self._parts_of("t5_block"):
            inputs = {"hidden_states": hidden, "position_bias": bias}
            hidden = self.chain.run(part, inputs)["hidden_states_out"]
        return self._run("t5_final", hidden_states=hidden)["last_hidden_state"]

    def denoise(
        self, encoded: _Arrays, *, steps: int, guidance: float, seed: int, latents: _Array | None = None
    ) -> Generator[_Array, _Array | None, None]:
        config = self.configs["transformer"]
        if latents is None:
            shape = (1, int(config["in_channels"]) // 4, *self.shapes.latent_hw)
            latents = pack_latents(normal_noise(shape, seed))
        latents = np.asarray(latents, np.float32)
        sigmas = noise_levels(self.scheduler, steps, latents.shape[1])
        times = {
            "pooled_projections": encoded["pooled_prompt_embeds"],
            "timestep": timesteps_of(self.scheduler, sigmas),
            **({"guidance": np.full(steps, guidance, np.float32)} if config.get("guidance_embeds") else {}),
        }
        velocity = self._prepare(times)
        for step in range(steps):
            tokens = {"hidden_states": latents, "encoder_hidden_states": encoded["prompt_embeds"]}
            latents = take_step(latents, velocity(step, tokens), sigmas, step)
            changed = yield latents
            latents = latents if changed is None else np.asarray(changed, np.float32)

    def _prepare(self, times: _Arrays) -> Callable[[int, _Arrays], _Array]:
        """What computes the velocity [1, S, 4C] of a step, counted from 0, from the tokens of image and text.

        Args:
            times: the pooled prompt, and a row a step of all else.
        """

        def at(step: int) -> dict[str, _Array]:
            return {name: rows if name == "pooled_projections" else rows[step : step + 1]
                    for name, rows in times.items()}  # fmt: skip

        def inline(step: int, tokens: _Arrays) -> _Array:
            head = self._run("head", **tokens, **at(step))
            return self._run_blocks(head, lambda part: {"temb": head["temb"]})

        def hoisted(step: int, tokens: _Arrays) -> _Array:
            made = self._run("token_embed", **tokens)
            return self._run_blocks(
                made, lambda part: {"modulation": modulation[modulation_name(part.name)][step : step + 1]}
            )

        def split(step: int, tokens: _Arrays) -> _Array:
            head = self._run("modulated_head", **tokens, **at(step))
            rows = self._rows_of(head["modulation"])
            return self._run_blocks(head, lambda part: {"modulation": rows[part.name]})

        def whole(step: int, tokens: _Arrays) -> _Array:
            rotary = self._rotary_of(tokens["encoder_hidden_states"])
            return self._run("transformer", **tokens, **at(step), **rotary)["sample"]

        if self._parts_of("transformer"):
            return whole
        if self._parts_of("modulated_head"):
            return split
        if self._parts_of("head"):
            return inline
        # all that depends on the time alone, before the first step
        temb = self._run("time_embed", **times)["temb"]
        modulation = {
            part.name: self.chain.run(part, {"temb": temb})["modulation"]
            for part in self.chain.parts
            if part.traits.family == "modulation"
        }
        return hoisted

    def _rows_of(self, modulation: _Array) -> dict[str, _Array]:
        """A split model's modulation [1, rows, D] of one step, by the part that takes it."""
        rows, position = {}, 0
        for part in self.chain.parts:
            if part.component == "transformer" and part.traits.cut in MODULATION_CHUNKS:
                taken = _blocks_of(part) * MODULATION_CHUNKS[part.traits.cut]
                rows[part.name] = np.ascontiguousarray(modulation[:, position : position + taken])
                position += taken
        return rows

    def _run_blocks(self, embedded: _Arrays, condition: Callable[[Part], _Arrays]) -> _Array:
        """Blocks in the order of the parts and the tail, each with what `condition` has for it."""
        parts = self.chain.parts_of("transformer")
        rotary = self._rotary_of(embedded["encoder_hidden_states_out"])
        (tail,) = (part for part in parts if part.traits.family == "tail")
        image, text = embedded["hidden_states_out"], embedded["encoder_hidden_states_out"]
        joint: _Array | None = None  # text and image as single blocks pass them on
        for part in (part for part in parts if part.traits.is_block):
            given = {**condition(part), **rotary}
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

    def decode(self, latents: _Array) -> _Array:
        (part,) = self.chain.parts_of("vae")
        config = self.configs[part.folder]
        # AutoencoderTiny's defaults, which taef1's own config does not repeat
        scale, shift = config.get("scaling_factor", 1.0), config.get("shift_factor", 0.0)
        unpacked = unpack_latents(np.asarray(latents, np.float32), self.shapes)
        image = self.chain.run(part, {"latents": unpacked / scale + shift})["image"][0]
        made: _Array = np.ascontiguousarray((image * 0.5 + 0.5).clip(0, 1).transpose(1, 2, 0), np.float32)
        return made

    def _rotary_of(self, text: _Array) -> dict[str, _Array]:
        """Rows of text and image. Text has no position, so all its rows are alike: those of tokens that it lacks go."""
        absent = self.shapes.tokens - text.shape[1]
        return {name: self.constants[name][absent:] for name in ("rotary_cos", "rotary_sin")}

    def _parts_of(self, kind: str) -> tuple[Part, ...]:
        return tuple(part for part in self.chain.parts if part.kind == kind)

    def _run(self, kind: str, **inputs: _Array) -> dict[str, _Array]:
        """Run the only part of `kind`."""
        (part,) = self._parts_of(kind)
        return self.chain.run(part, inputs)


def build_pipeline(files: PipelineFiles, chain: PartChain, shapes: Shapes) -> FluxParts:
    """The pipeline of these parts; errors as `Model.build_pipeline`."""
    check_constants(files, chain.parts, shapes)
    scheduler = read_object_file(files.root / "scheduler" / "scheduler_config.json")
    check_configs({"scheduler": scheduler}, str(files.root))
    if not {"text_encoder", "text_encoder_2"} <= files.configs.keys():
        return FluxParts(chain, shapes, files.configs, files.constants, scheduler, None, None)
    words = {name: int(files.configs[name]["vocab_size"]) for name in ("text_encoder", "text_encoder_2")}
    clip = read_clip_tokenizer(files.root / "tokenizer", words["text_encoder"])
    t5 = read_t5_tokenizer(files.root / "tokenizer_2", words["text_encoder_2"], shapes.tokens)
    return FluxParts(chain, shapes, files.configs, files.constants, scheduler, clip, t5)


def pack_latents(latents: _Array) -> _Array:
    """[1, C, h, w] as tokens [1, S, 4C] of two by two latents each."""
    _, channels, height, width = latents.shape
    squares = latents.reshape(1, channels, height // 2, 2, width // 2, 2).transpose(0, 2, 4, 1, 3, 5)
    return squares.reshape(1, -1, 4 * channels)


def unpack_latents(latents: _Array, shapes: Shapes) -> _Array:
    """[1, C, h, w] of tokens [1, S, 4C]."""
    height, width = shapes.latent_hw
    squares = latents.reshape(1, height // 2, width // 2, -1, 2, 2).transpose(0, 3, 1, 4, 2, 5)
    return squares.reshape(1, -1, height, width)


def _apart(joint: _Array, text: _Array) -> tuple[_Array, _Array]:
    """The joint sequence as text of the length of `text`, and image."""
    first, second = np.split(joint, [text.shape[1]], axis=1)
    return np.ascontiguousarray(first), np.ascontiguousarray(second)


def _blocks_of(part: Part) -> int:
    """`double.04-07` holds four blocks, `double.04` and `tail` one."""
    first, dash, last = part.name.partition(".")[2].partition("-")
    return int(last) - int(first) + 1 if dash else 1
