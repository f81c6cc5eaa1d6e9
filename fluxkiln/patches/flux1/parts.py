"""From a kind and the checkpoint's configs to the wrapper module of that kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.types import Configs

if TYPE_CHECKING:
    from torch.nn import Module


def build_part(kind: str, configs: Configs, transformer: Any = None) -> Module:
    """The wrapper module of `kind` on the meta device, in eval mode: shapes and structure, no weight memory.

    Args:
        kind: a name of `kinds.KINDS`.
        configs: each component's `config.json`, keyed by its folder name; `vae_tiny` for the tiny decoder.
        transformer: its class, FLUX.1's by default.

    Raises:
        UsageError: no such kind. CheckpointError: a structure the parts do not cover.
    """
    import torch

    if kind not in KINDS:
        raise UsageError(f"no kind of part is called {kind!r}; there are {', '.join(KINDS)}")
    with torch.device("meta"):
        match KINDS[kind].component:
            case "text_encoder":
                module = _clip(configs)
            case "text_encoder_2":
                module = _t5(kind, configs)
            case "transformer":
                module = _transformer(kind, _one_of_each(configs, transformer))
            case _:
                module = _vae(configs) if kind == "vae_decoder" else _tiny_vae(configs)
    return module.eval().requires_grad_(False)


def _clip(configs: Configs) -> Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    from fluxkiln.patches.flux1.text import ClipPart

    return ClipPart(CLIPTextModel(CLIPTextConfig(**configs["text_encoder"])))


def _t5(kind: str, configs: Configs) -> Module:
    from transformers import T5Config, T5EncoderModel

    from fluxkiln.patches.flux1.text import T5BlockPart, T5EmbedPart, T5FinalPart

    activation = configs["text_encoder_2"].get("feed_forward_proj")
    if activation != "gated-gelu":
        raise CheckpointError(
            f"text_encoder_2 has feed_forward_proj {activation!r}, FLUX.1's T5 v1.1 has 'gated-gelu'; use FLUX.1's own"
        )
    # block 0 owns the position bias table; block 1 is what the kind looks like
    model = T5EncoderModel(T5Config(**{**configs["text_encoder_2"], "num_layers": 2}))
    if kind == "t5_embed":
        return T5EmbedPart(model)
    if kind == "t5_final":
        return T5FinalPart(model.encoder.final_layer_norm)
    return T5BlockPart(model.encoder.block[1])


def _one_of_each(configs: Configs, transformer: Any) -> Any:
    """The transformer with one block of each kind."""
    from diffusers import FluxTransformer2DModel

    config = {**configs["transformer"], "num_layers": 1, "num_single_layers": 1}
    return (transformer or FluxTransformer2DModel).from_config(config)


def _transformer(kind: str, model: Any) -> Module:
    from fluxkiln.patches.flux1 import modulation, transformer

    double, single = model.transformer_blocks[0], model.single_transformer_blocks[0]
    wrappers: dict[str, Callable[[], Module]] = {
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


def _vae(configs: Configs) -> Module:
    from diffusers import AutoencoderKL

    from fluxkiln.patches.flux1.vae import VaeDecoderPart

    model: Any = AutoencoderKL.from_config(dict(configs["vae"]))
    if model.post_quant_conv is not None:
        raise CheckpointError(
            "the VAE has a post_quant_conv, which FLUX.1's has not: set use_post_quant_conv to false in "
            "vae/config.json or use FLUX.1's own VAE"
        )
    return VaeDecoderPart(model.decoder)


def _tiny_vae(configs: Configs) -> Module:
    from diffusers import AutoencoderTiny

    from fluxkiln.patches.flux1.vae import VaeDecoderPart

    if "vae_tiny" not in configs:
        raise CheckpointError("the checkpoint has no folder vae_tiny: put taef1 (AutoencoderTiny) there, or use VAE=kl")
    model: Any = AutoencoderTiny.from_config(dict(configs["vae_tiny"]))
    return VaeDecoderPart(model.decoder)
