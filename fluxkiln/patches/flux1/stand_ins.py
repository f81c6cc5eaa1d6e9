"""What stands in FluxPipeline where the torch models were: modules that call a part runner, part by part.

They have what `diffusers.FluxPipeline` (checked with 0.42.1) reads of its components, and no weights. Between parts
arrays stay numpy; torch tensors are only what the pipeline gives and takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fluxkiln.errors import PatchError
from fluxkiln.patches.flux1.host import pooled_row
from fluxkiln.patches.flux1.kinds import MODULATION_CHUNKS, modulation_name
from fluxkiln.patches.pipeline import PartChain, PipelineFiles
from fluxkiln.types import Part

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
            return {"modulation": self.modulation[modulation_name(part)][step : step + 1]}

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
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTokenizer, T5TokenizerFast

    root, configs = files.root, files.configs
    rotary = {name: files.constants[name] for name in ("rotary_cos", "rotary_sin")}
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(root / "scheduler")
    kinds = {part.kind for part in chain.parts}
    if kinds & {"modulated_head", "transformer"}:
        transformer: Transformer = SplitTransformer(chain, configs["transformer"], rotary)
    elif "head" in kinds:
        transformer = Transformer(chain, configs["transformer"], rotary)
    else:
        transformer = HoistedTransformer(chain, configs["transformer"], rotary, scheduler)
    return (pipeline_class or FluxPipeline)(
        scheduler=scheduler,
        tokenizer=CLIPTokenizer.from_pretrained(root / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(root / "tokenizer_2"),
        text_encoder=TextEncoder(chain, configs["text_encoder"]),
        text_encoder_2=TextEncoder2(chain, configs["text_encoder_2"], files.constants),
        transformer=transformer,
        vae=Vae(chain, configs[chain.parts_of("vae")[0].folder]),
    )


def _tensor(array: _Array) -> Tensor:
    # a copy: a runner's array may be read-only or not aligned
    return torch.from_numpy(np.array(array, dtype=np.float32))
