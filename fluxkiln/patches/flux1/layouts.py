"""FLUX.1's tensors as other programs call them: Black Forest Labs' own names, those of llama.cpp for T5, and mflux's.

Sources: github.com/black-forest-labs/flux, src/flux/modules/layers.py (query, key and value are one matrix, and so is
what a single block multiplies its input with; the last modulation has its shift first, diffusers' its scale) and
autoencoder.py; llama.cpp, gguf-py/gguf/tensor_mapping.py (architecture t5encoder); mflux 0.24.0,
models/flux/weights/flux_weight_mapping.py. Tests hold them to diffusers', transformers' and mflux's own readers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.tensors import component_layout
from fluxkiln.patches.model import Config, Joined, OtherLayout
from fluxkiln.types import Configs

BFL, LLAMA, MFLUX = "bfl", "llama.cpp", "mflux"
# which diffusers' converter of the transformer takes for granted (0.42.1)
CONVERTED_WIDTH = 3072
_QKV = ("to_q", "to_k", "to_v")
_ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")
# beginnings of names there and here: linear layers, with weight and bias each
_EMBEDDERS: Mapping[str, str] = {
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "txt_in": "context_embedder",
    "img_in": "x_embedder",
}
_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": tuple(f"attn.{name}" for name in _QKV),
    "txt_attn.qkv": tuple(f"attn.{name}" for name in _ADDED),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "modulation.lin": ("norm.linear",),
    "linear1": (*(f"attn.{name}" for name in _QKV), "proj_mlp"),
    "linear2": ("proj_out",),
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_T5: Mapping[str, str] = {
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "attn_norm": "layer.0.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
    "ffn_norm": "layer.1.layer_norm",
}


def other_layout(layout: str, component: str, configs: Configs) -> OtherLayout:
    """See `Model.as_others`."""
    make = _LAYOUTS.get((layout, component))
    if make is None:
        known = ", ".join(f"{name} for {what}" for name, what in _LAYOUTS)
        raise UsageError(f"no layout {layout!r} is known for {component}; there are {known}")
    return make(configs)


def _there(tensors: Iterable[Joined], component: str, configs: Configs) -> tuple[Joined, ...]:
    """Those of tensors that a model has: not all have guidance, and one block of T5 alone has a table."""
    names = component_layout(component, configs[component])
    return tuple(one for one in tensors if one.sources[0] in names)


def _linear(name: str, sources: tuple[str, ...], swapped: bool = False) -> Iterator[Joined]:
    for kind in ("weight", "bias"):
        yield Joined(f"{name}.{kind}", tuple(f"{source}.{kind}" for source in sources), swapped)


def _bfl(configs: Configs) -> OtherLayout:
    config = configs["transformer"]
    width = config["num_attention_heads"] * config["attention_head_dim"]
    stretch = 0 if CONVERTED_WIDTH % width else CONVERTED_WIDTH // width
    file = f"flux1-{'dev' if config['guidance_embeds'] else 'schnell'}.safetensors"
    return OtherLayout(_there(_bfl_tensors(config), "transformer", configs), "flux", stretch=stretch, file=file)


def _bfl_tensors(config: Config) -> Iterator[Joined]:
    for name, source in _EMBEDDERS.items():
        yield from _linear(name, (source,))
    for stack, blocks, count, linears, norms in (
        ("double_blocks", "transformer_blocks", config["num_layers"], _DOUBLE, _DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", config["num_single_layers"], _SINGLE, _SINGLE_NORMS),
    ):
        for i in range(count):
            for name, sources in linears.items():
                yield from _linear(f"{stack}.{i}.{name}", tuple(f"{blocks}.{i}.{source}" for source in sources))
            for name, source in norms.items():
                yield Joined(f"{stack}.{i}.{name}.scale", (f"{blocks}.{i}.{source}.weight",))
    yield from _linear("final_layer.adaLN_modulation.1", ("norm_out.linear",), swapped=True)
    yield from _linear("final_layer.linear", ("proj_out",))


def _llama_t5(configs: Configs) -> OtherLayout:
    config = configs["text_encoder_2"]
    facts = {
        "context_length": 512,
        "embedding_length": config["d_model"],
        "feed_forward_length": config["d_ff"],
        "block_count": config["num_layers"],
        "attention.head_count": config["num_heads"],
        "attention.key_length": config["d_kv"],
        "attention.value_length": config["d_kv"],
        "attention.layer_norm_epsilon": float(config["layer_norm_epsilon"]),
        "attention.relative_buckets_count": config["relative_attention_num_buckets"],
        "decoder_start_token_id": config["decoder_start_token_id"],
        "vocab_size": config["vocab_size"],
    }
    tensors = _there(_t5_tensors(config["num_layers"]), "text_encoder_2", configs)
    return OtherLayout(tensors, "t5encoder", {f"t5encoder.{key}": value for key, value in facts.items()})


def _t5_tensors(blocks: int) -> Iterator[Joined]:
    yield Joined("token_embd.weight", ("shared.weight",))
    for i in range(blocks):
        for name, source in _T5.items():
            yield Joined(f"enc.blk.{i}.{name}.weight", (f"encoder.block.{i}.{source}.weight",))
    yield Joined("enc.output_norm.weight", ("encoder.final_layer_norm.weight",))


# ends of names and what stands there instead, in this order
_BFL_VAE: tuple[tuple[str, str], ...] = (
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.attentions\.0\.to_(\w)", r"mid.attn_1.\1"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets", r"up.\1.block"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    ("conv_shortcut", "nin_shortcut"),
    ("conv_norm_out", "norm_out"),
)
_MFLUX_FEED_FORWARD = ((r"\.net\.0\.proj\.", ".linear1."), (r"\.net\.2\.", ".linear2."))
_MFLUX_T5 = (
    (r"encoder\.block\.(\d+)\.layer\.0\.", r"t5_blocks.\1.attention."),
    (r"encoder\.block\.(\d+)\.layer\.1\.", r"t5_blocks.\1.ff."),
    (r"encoder\.final_layer_norm\.", "final_layer_norm."),
)
_MFLUX_VAE = ((r"(conv_in|conv_out)\.", r"\1.conv2d."), (r"conv_norm_out\.", "conv_norm_out.norm."))


def _renamed(component: str, configs: Configs, ends: Iterable[tuple[str, str]] = ()) -> Iterator[tuple[Joined, int]]:
    """Every tensor of a component by itself under another name, and its axes."""
    for file_name, shape in component_layout(component, configs[component]).items():
        name = file_name
        for there, instead in ends:
            name = re.sub(there, instead, name)
        yield (
            Joined(name, (file_name.removeprefix("text_model."),), kernel="OHWI" if len(shape) == 4 else ""),
            len(shape),
        )


def _bfl_vae(configs: Configs) -> OtherLayout:
    last = len(configs["vae"]["block_out_channels"]) - 1

    def counted_down(name: str) -> str:
        return re.sub(r"\.up\.(\d+)\.", lambda found: f".up.{last - int(found[1])}.", name)

    tensors = tuple(
        Joined(counted_down(one.name), one.sources, kernel="1x1" if axes == 2 else "")
        for one, axes in _renamed("vae", configs, _BFL_VAE)
    )
    return OtherLayout(tensors, stretch=1, file="ae.safetensors")


def _mflux(
    component: str, ends: Iterable[tuple[str, str]], fixed: Mapping[str, Any]
) -> Callable[[Configs], OtherLayout]:
    def make(configs: Configs) -> OtherLayout:
        return OtherLayout(tuple(one for one, _ in _renamed(component, configs, ends)), fixed=fixed)

    return make


def _mflux_t5(configs: Configs) -> OtherLayout:
    """Every block has the table of positions, which is the first one's here."""
    made = _mflux("text_encoder_2", _MFLUX_T5, _SIZES["text_encoder_2"])(configs)
    blocks = range(1, configs["text_encoder_2"]["num_layers"])
    copies = (
        Joined(one.name.replace("t5_blocks.0.", f"t5_blocks.{i}."), one.sources)
        for one in made.tensors if "relative_attention_bias" in one.name for i in blocks
    )  # fmt: skip
    return replace(made, tensors=(*made.tensors, *copies))


# what mflux's classes take for granted
_SIZES: Mapping[str, Mapping[str, Any]] = {
    "text_encoder": {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12,
                     "vocab_size": 49408},
    "text_encoder_2": {"d_model": 4096, "d_ff": 10240, "d_kv": 64, "num_heads": 64, "num_layers": 24,
                       "vocab_size": 32128},
    "transformer": {"num_attention_heads": 24, "attention_head_dim": 128, "joint_attention_dim": 4096,
                    "pooled_projection_dim": 768, "in_channels": 64},
    "vae": {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 16},
}  # fmt: skip
_LAYOUTS: Mapping[tuple[str, str], Callable[[Configs], OtherLayout]] = {
    (BFL, "transformer"): _bfl,
    (BFL, "vae"): _bfl_vae,
    (LLAMA, "text_encoder_2"): _llama_t5,
    (MFLUX, "text_encoder"): _mflux("text_encoder", (), _SIZES["text_encoder"]),
    (MFLUX, "text_encoder_2"): _mflux_t5,
    (MFLUX, "transformer"): _mflux("transformer", _MFLUX_FEED_FORWARD, _SIZES["transformer"]),
    (MFLUX, "vae"): _mflux("vae", _MFLUX_VAE, _SIZES["vae"]),
}
