"""FLUX.1 as the rest of fluxkiln sees it; what takes torch or diffusers is in the files beside this."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.patches.flux1 import kinds
from fluxkiln.patches.flux1.presets import GENERATOR, PRESETS, RULES
from fluxkiln.patches.flux1.statistics import FLUX
from fluxkiln.patches.model import (
    API,
    Call,
    Config,
    OtherLayout,
    Preset,
    Put,
    ReadTensor,
    Recorded,
    WeightRule,
    WeightUse,
)
from fluxkiln.types import BindingLicence, Configs, Kind, Part, Shapes, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from torch.nn import Module

    from fluxkiln.patches.cut import Collectives, Cut, ParallelPart
    from fluxkiln.patches.patch import Patch
    from fluxkiln.patches.pipeline import OnLatents, PartChain, Pipeline, PipelineFiles, Rendering, Sampling

NON_COMMERCIAL = "LicenseRef-FLUX-1-dev-Non-Commercial"
# How often a weight of the VAE's decoder is used, on average, for every position of the latents; counted at 1024x1024.
DECODED = 6.4

_MORE_PICTURES = (
    "which takes a picture as well; text to image is all that is compiled, and no more is planned yet: give FLUX.1-dev "
    "or -schnell"
)
_UNTIL_THEN = "give FLUX.1-dev or -schnell until then"


class Flux1:
    """FLUX.1, dev and schnell; see `patches.model.Model`."""

    api = API
    name = "flux1"
    title = "FLUX.1"
    pipeline_class = "FluxPipeline"
    classes: Mapping[str, str] = {
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "vae_tiny": "AutoencoderTiny",
    }
    libraries: Mapping[str, str] = {
        "text_encoder": "transformers",
        "text_encoder_2": "transformers",
        "transformer": "diffusers",
        "vae": "diffusers",
        "vae_tiny": "diffusers",
    }
    components: tuple[str, ...] = ("text_encoder", "text_encoder_2", "transformer", "vae")
    tokenizers: Mapping[str, str] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    whole_numbers: Mapping[str, tuple[str, ...]] = {
        "text_encoder_2": ("num_layers",),
        "transformer": ("num_layers", "num_single_layers"),
    }
    stacks: Mapping[str, Mapping[str, str]] = {
        "text_encoder_2": {"encoder.block": "t5_block"},
        "transformer": {"transformer_blocks": "double", "single_transformer_blocks": "single"},
        "vae": {},
    }
    first_is_needed: tuple[str, ...] = ("encoder.block",)
    calibrated: tuple[str, ...] = ("text_encoder_2", "transformer")
    adapted = "transformer"
    # kohya's, ComfyUI's, peft's; transformers 5 has a CLIP without `text_model`
    lora_prefixes: Mapping[str, str] = {
        "lora_transformer_": "transformer",
        **dict.fromkeys(("lora_te_text_model_", "lora_te1_text_model_"), "text_encoder"),
        **dict.fromkeys(("text_encoder.text_model.", "text_encoders.clip_l.transformer.text_model."), "text_encoder"),
        **dict.fromkeys(("lora_te2_", "lora_te3_", "text_encoders.t5xxl.transformer."), "text_encoder_2"),
    }
    tied: Mapping[str, tuple[str, ...]] = {"text_encoder_2": ("encoder.embed_tokens.weight",)}
    hub_ids: Mapping[str, str] = {
        "dev": "black-forest-labs/FLUX.1-dev",
        "schnell": "black-forest-labs/FLUX.1-schnell",
    }
    # Section 3 of it; schnell is under Apache-2.0.
    binding_licences: tuple[BindingLicence, ...] = (
        BindingLicence(
            NON_COMMERCIAL, "dev", "flux-1-dev", "flux-1-dev-non-commercial-license", "FLUX.1-dev",
            "FLUX.1 [dev] Non-Commercial License", r"flux[\s.\d]*\[?dev\]?\s+non-commercial\s+license",
        ),
    )  # fmt: skip
    relatives: Mapping[str, str] = {
        **dict.fromkeys(("FluxFillPipeline", "FLUX.1-Fill"), f"FLUX.1 Fill, {_MORE_PICTURES}"),
        **dict.fromkeys(("FluxKontextPipeline", "FLUX.1-Kontext"), f"FLUX.1 Kontext, {_MORE_PICTURES}"),
        **dict.fromkeys(
            ("FluxControlPipeline", "FLUX.1-Canny", "FLUX.1-Depth"),
            f"a FLUX.1 of structure (Canny, Depth), {_MORE_PICTURES}",
        ),
        "FLUX.1-Redux": f"FLUX.1 Redux, {_MORE_PICTURES}",
        **dict.fromkeys(("Flux2KleinPipeline", "FLUX.2-klein"), f"FLUX.2-klein, which is planned next; {_UNTIL_THEN}"),
        **dict.fromkeys(
            ("Flux2Pipeline", "FLUX.2"), f"FLUX.2, another model; FLUX.2-klein is planned next, {_UNTIL_THEN}"
        ),
    }
    most_tokens: Mapping[str, int] = {"dev": 512, "schnell": 256}
    # schnell is distilled to four steps; 28 is what diffusers' example for dev takes
    steps: Mapping[str, int] = {"dev": 28, "schnell": 4}
    constant_inputs: tuple[str, ...] = kinds.CONSTANT_INPUTS
    kinds: Mapping[str, Kind] = kinds.ALL_KINDS
    presets: Mapping[str, Preset] = PRESETS
    weight_rules: Mapping[str, tuple[WeightRule, ...]] = RULES
    statistics: Mapping[str, Mapping[str, tuple[WeightRule, ...]]] = {"flux": FLUX}
    generator = GENERATOR

    def variant(self, configs: Configs) -> str:
        # The schedule tells as well: dev shifts it by the size of the image, schnell does not.
        guided = (
            configs["transformer"].get("guidance_embeds", False)
            if "transformer" in configs
            else configs.get("scheduler", {}).get("use_dynamic_shifting", False)
        )
        return "dev" if guided else "schnell"

    def check_configs(self, configs: Configs, where: str) -> None:
        from fluxkiln.patches.flux1.schemas import check_configs

        check_configs(configs, where)

    def load_sidecars(self, root: Path, components: Collection[str]) -> dict[str, Any]:
        from fluxkiln.patches.flux1.sidecars import load_sidecars

        return load_sidecars(root, components)

    def state_names(self, component: str, names: Iterable[str]) -> dict[str, str]:
        found = {name: name for name in names}
        if component == "text_encoder":
            found = {name.removeprefix("text_model."): name for name in found}
            found.pop("embeddings.position_ids", None)
        elif component == "text_encoder_2":
            # two names of one tied matrix
            other = found.pop("encoder.embed_tokens.weight", None)
            if other is not None:
                found.setdefault("shared.weight", other)
        return found

    def licence(self, text: str, variant: str) -> str:
        return "Apache-2.0" if "Apache" in text or (variant == "schnell" and not text) else NON_COMMERCIAL

    def load_class(self, folder: str) -> Any:
        return getattr(import_module(self.libraries[folder]), self.classes[folder])

    def load_pipeline_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.pipeline_class)

    def convert_lora(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        from fluxkiln.patches.flux1.tensors import convert_lora

        return convert_lora(tensors)

    def layout(self, folder: str, config: Config) -> dict[str, tuple[int, ...]]:
        from fluxkiln.patches.flux1.tensors import component_layout

        return component_layout(folder, config)

    def as_others(self, layout: str, component: str, configs: Configs) -> OtherLayout:
        from fluxkiln.patches.flux1.layouts import other_layout

        return other_layout(layout, component, configs)

    def write_tokenizers(self, root: Path, configs: Configs, sentences: Sequence[str] = ()) -> dict[str, str]:
        from fluxkiln.patches.flux1.tokenizers import write_clip_tokenizer, write_t5_tokenizer

        written = {}
        if "text_encoder" in configs:
            (root / "tokenizer").mkdir()
            write_clip_tokenizer(root / "tokenizer", configs["text_encoder"]["vocab_size"], sentences)
            written["tokenizer"] = "CLIPTokenizer"
        if "text_encoder_2" in configs:
            (root / "tokenizer_2").mkdir()
            write_t5_tokenizer(root / "tokenizer_2", configs["text_encoder_2"]["vocab_size"], 512, sentences)
            written["tokenizer_2"] = "T5TokenizerFast"
        return written

    def list_parts(self, configs: Configs, vae: Any, modulation: Any) -> tuple[Part, ...]:
        return kinds.list_parts({**kinds.NO_BLOCKS, **configs}, vae, modulation)

    def list_split_parts(self, configs: Configs, granularity: str, vae: Any) -> tuple[Part, ...]:
        return kinds.list_split_parts(configs, granularity, vae)

    def recorded_parts(self, configs: Configs, vae: Any) -> tuple[Part, ...]:
        inline = self.list_parts(configs, vae, "inline")
        names = {part.name for part in inline}
        return (*inline, *(part for part in self.list_parts(configs, vae, "hoisted") if part.name not in names))

    def recorded_calls(self, recorded: Recorded, part: Part) -> tuple[Call, ...]:
        from fluxkiln.patches.flux1.reference import recorded_calls

        return recorded_calls(recorded, part)

    def modulation_name(self, part: Part) -> str:
        return kinds.modulation_name(part.name)

    def part_inputs(self, kind: str, configs: Configs, shapes: Shapes) -> tuple[TensorSpec, ...]:
        from fluxkiln.patches.flux1.inputs import part_inputs

        return part_inputs(kind, configs, shapes)

    def build_part(self, kind: str, configs: Configs) -> Module:
        from fluxkiln.patches.flux1.parts import build_part

        return build_part(kind, configs, self.load_class("transformer"))

    def patches(self) -> tuple[Patch, ...]:
        from fluxkiln.patches.flux1.patches import PATCHES

        return PATCHES

    def host_constants(self, configs: Configs, shapes: Shapes, read: ReadTensor, split: bool) -> dict[str, Any]:
        from fluxkiln.patches.flux1.inputs import make_constants

        return make_constants(configs, shapes, read, split)

    def weight_uses(self, shapes: Shapes) -> dict[str, WeightUse]:
        decoded = DECODED * shapes.latent_hw[0] * shapes.latent_hw[1]
        return {
            "text_encoder_2": WeightUse(shapes.tokens, ("shared.",)),
            "transformer": WeightUse(shapes.joint_tokens),
            "vae": WeightUse(decoded, ("encoder.conv", "encoder.down", "encoder.mid")),
        }

    @property
    def cuts(self) -> Mapping[str, tuple[Cut, ...]]:
        from fluxkiln.patches.flux1.kinds import CUTS

        return CUTS

    def head_count(self, cut: str, configs: Configs) -> int:
        from fluxkiln.patches.flux1.kinds import head_count

        return head_count(cut, configs)

    def split_axes(self, configs: Configs) -> tuple[int, dict[str, int]]:
        from fluxkiln.patches.flux1.kinds import split_axes

        return split_axes(configs)

    def activation_bytes(self, configs: Configs, shapes: Shapes, degree: int) -> int:
        from fluxkiln.patches.flux1.kinds import activation_bytes

        return activation_bytes(configs, shapes, degree)

    def build_parallel_part(
        self, part: Part, configs: Configs, shapes: Shapes, collectives: Collectives
    ) -> ParallelPart:
        from fluxkiln.patches.flux1.parallel import build_parallel_part

        blocks = 1 if part.traits.cut == "transformer" else len(part.members)
        return build_parallel_part(part.traits.cut, configs, shapes, collectives, blocks=blocks)

    def modulation_rows(self, configs: Configs) -> dict[str, tuple[int, int]]:
        from fluxkiln.patches.flux1.parallel import modulation_rows

        return modulation_rows(configs) if "transformer" in configs else {}

    def observe(self, pipe: Any, part: Part, put: Put) -> None:
        from fluxkiln.patches.flux1.reference import observe_part

        observe_part(pipe, part, put)

    def build_pipeline(self, files: PipelineFiles, chain: PartChain, shapes: Shapes) -> Pipeline:
        from fluxkiln.patches.flux1.pipeline import build_pipeline

        return build_pipeline(files, chain, shapes)

    def render(self, pipe: Any, shapes: Shapes, sampling: Sampling, on_latents: OnLatents | None = None) -> Rendering:
        from fluxkiln.patches.flux1.published import render

        return render(pipe, shapes, sampling, on_latents)

    def encode(self, pipe: Any, shapes: Shapes, prompt: str) -> dict[str, NDArray[Any]]:
        from fluxkiln.patches.flux1.published import encode

        return encode(pipe, shapes, prompt)

    def denoise(
        self, pipe: Any, encoded: Mapping[str, Any], shapes: Shapes, after_step: Callable[..., Any], **sampling: Any
    ) -> None:
        from fluxkiln.patches.flux1.published import denoise

        denoise(pipe, encoded, shapes, after_step, **sampling)

    def decode(self, pipe: Any, shapes: Shapes, latents: NDArray[Any]) -> NDArray[Any]:
        from fluxkiln.patches.flux1.published import decode

        return decode(pipe, shapes, latents)

    def encode_image(self, pipe: Any, image: NDArray[Any]) -> NDArray[Any]:
        from fluxkiln.patches.flux1.training import encode_image

        return encode_image(pipe, image)

    def predict(
        self, module: Module, latents: Tensor, sigma: Tensor, encoded: Mapping[str, Tensor], shapes: Shapes,
        guidance: float | Tensor,
    ) -> Tensor:  # fmt: skip
        from fluxkiln.patches.flux1.training import predict_velocity

        return predict_velocity(module, latents, sigma, encoded, shapes, guidance)

    def begin_training(self, module: Module) -> None:
        from fluxkiln.patches.flux1.training import begin_training

        begin_training(module)

    def halfway(self, module: Module) -> Module:
        last: Module = module.transformer_blocks[-1]  # type: ignore[index, assignment]
        return last

    def build_in_guidance(self, teacher: Module, student: Module, guidance: float) -> None:
        from fluxkiln.patches.flux1.training import build_in_guidance

        build_in_guidance(teacher, student, guidance)

    def mlx_lora(self, pairs: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        from fluxkiln.patches.flux1.training import mlx_lora

        return mlx_lora(pairs)

    def see_split_leaves(
        self,
        part: Part,
        configs: Configs,
        inputs: Mapping[str, Any],
        state: Mapping[str, Any],
        load: Callable[..., Any],
    ) -> Any:
        from fluxkiln.patches.flux1.reference import see_split_leaves

        return see_split_leaves(part, configs, inputs, state, load)


MODEL = Flux1()
