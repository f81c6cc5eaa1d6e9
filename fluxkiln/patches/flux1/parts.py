"""From a kind and the checkpoint's configs to the wrapper module of that kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.patches.flux1 import modulation, transformer
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.patches.flux1.text import ClipPart, T5BlockPart
from fluxkiln.types import Configs


class PlainPart(nn.Module):
    """An upstream module of one input and one output as it stands, by the name that its slots get in front.

    The VAE decoders take latents [1, C, h, w], already un-scaled and un-shifted, and give an image [1, 3, 8h, 8w] in
    -1..1. They stand for `AutoencoderKL._decode` and `AutoencoderTiny.decode` (checked with diffusers 0.42.1) without
    slicing and tiling.
    """

    def __init__(self, module: nn.Module, name: str = "block") -> None:
        super().__init__()
        self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        (module,) = self.children()
        result: Tensor = module(x)
        return result


def build_part(kind: str, configs: Configs, transformer_class: Any = None) -> nn.Module:
    """The wrapper module of `kind` on the meta device, in eval mode: shapes and structure, no weight memory.

    Args:
        kind: a name of `kinds.KINDS`.
        configs: each component's `config.json`, keyed by its folder name; `vae_tiny` for the tiny decoder.
        transformer_class: FLUX.1's by default.

    Raises:
        UsageError: no such kind. CheckpointError: a structure the parts do not cover.
    """
    if kind not in KINDS:
        raise UsageError(f"no kind of part is called {kind!r}; there are {', '.join(KINDS)}")
    with torch.device("meta"):
        match KINDS[kind].component:
            case "text_encoder":
                module = _clip(configs)
            case "text_encoder_2":
                module = _t5(kind, configs)
            case "transformer":
                module = _transformer(kind, configs, transformer_class)
            case _:
                module = _vae(configs) if kind == "vae_decoder" else _tiny_vae(configs)
    return module.eval().requires_grad_(False)


def _clip(configs: Configs) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return ClipPart(CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])))


def _t5(kind: str, configs: Configs) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    activation = configs["text_encoder_2"].get("feed_forward_proj")
    if activation != "gated-gelu":
        raise CheckpointError(
            f"text_encoder_2 has feed_forward_proj {activation!r}, FLUX.1's T5 v1.1 has 'gated-gelu'; use FLUX.1's own"
        )
    # block 0 owns the position bias table; block 1 is what the kind looks like
    model = T5EncoderModel(T5Config(**{**configs["text_encoder_2"], "num_layers": 2}))
    if kind == "t5_embed":
        return PlainPart(model.shared, "shared")
    return PlainPart(model.encoder.final_layer_norm) if kind == "t5_final" else T5BlockPart(model.encoder.block[1])


def _transformer(kind: str, configs: Configs, transformer_class: Any) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    one_of_each = {**configs["transformer"], "num_layers": 1, "num_single_layers": 1}
    model = (transformer_class or FluxTransformer2DModel).from_config(one_of_each)
    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    wrappers: dict[str, Callable[[], nn.Module]] = {
        "head": lambda: transformer.HeadPart(model),
        "double": lambda: transformer.DoublePart(double),
        "single": lambda: transformer.SinglePart(single),
        "tail": lambda: transformer.TailPart(model),
        "time_embed": lambda: modulation.TimeEmbedPart(model),
        "token_embed": lambda: modulation.TokenEmbedPart(model),
        "double_modulation": lambda: modulation.ModulationPart(double, "norm1", "norm1_context"),
        "single_modulation": lambda: modulation.ModulationPart(single, "norm"),
        "tail_modulation": lambda: modulation.ModulationPart(model, "norm_out"),
        "double_modulated": lambda: modulation.DoubleModulatedPart(double),
        "single_modulated": lambda: modulation.SingleModulatedPart(single),
        "tail_modulated": lambda: modulation.TailModulatedPart(model),
    }
    return wrappers[kind]()


def _vae(configs: Configs) -> nn.Module:
    from diffusers import AutoencoderKL

    model: Any = AutoencoderKL.from_config(dict(configs["vae"]))
    if model.post_quant_conv is not None:
        raise CheckpointError(
            "the VAE has a post_quant_conv, which FLUX.1's has not: set use_post_quant_conv to false in "
            "vae/config.json or use FLUX.1's own VAE"
        )
    return PlainPart(model.decoder)


def _tiny_vae(configs: Configs) -> nn.Module:
    from diffusers import AutoencoderTiny

    if "vae_tiny" not in configs:
        raise CheckpointError("the checkpoint has no folder vae_tiny: put taef1 (AutoencoderTiny) there, or use VAE=kl")
    model: Any = AutoencoderTiny.from_config(dict(configs["vae_tiny"]))
    return PlainPart(model.decoder)
