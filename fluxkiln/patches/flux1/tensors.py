"""Names and shapes of FLUX.1's tensors: of every component, from its config alone, and as LoRA files call them.

The layout is kept by hand so that synthesizing needs neither torch nor diffusers; a test compares it with the real
classes. Names are those of FLUX.1's own files: CLIP's have the prefix `text_model.`, which newer transformers left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

from fluxkiln.patches.model import Config

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = dict[str, Tensor]


Entry = tuple[str, tuple[int, ...]]


def component_layout(component: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of `component`, in the order the model uses them."""
    return dict(_LAYOUTS[component](config))


def _linear(name: str, out_features: int, in_features: int, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (out_features, in_features)
    if bias:
        yield f"{name}.bias", (out_features,)


def _conv(name: str, out_channels: int, in_channels: int, kernel: int = 3, bias: bool = True) -> Iterator[Entry]:
    yield f"{name}.weight", (out_channels, in_channels, kernel, kernel)
    if bias:
        yield f"{name}.bias", (out_channels,)


def _norm(name: str, width: int) -> Iterator[Entry]:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _clip(config: Config) -> Iterator[Entry]:
    width, inner = config["hidden_size"], config["intermediate_size"]
    yield "text_model.embeddings.token_embedding.weight", (config["vocab_size"], width)
    yield "text_model.embeddings.position_embedding.weight", (config["max_position_embeddings"], width)
    for i in range(config["num_hidden_layers"]):
        layer = f"text_model.encoder.layers.{i}"
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{projection}", width, width)
        yield from _norm(f"{layer}.layer_norm1", width)
        yield from _linear(f"{layer}.mlp.fc1", inner, width)
        yield from _linear(f"{layer}.mlp.fc2", width, inner)
        yield from _norm(f"{layer}.layer_norm2", width)
    yield from _norm("text_model.final_layer_norm", width)


def _t5(config: Config) -> Iterator[Entry]:
    width, heads = config["d_model"], config["num_heads"]
    inner = heads * config["d_kv"]
    yield "shared.weight", (config["vocab_size"], width)
    for i in range(config["num_layers"]):
        attention, feed_forward = (f"encoder.block.{i}.layer.{j}" for j in (0, 1))
        for projection in "qkv":
            yield f"{attention}.SelfAttention.{projection}.weight", (inner, width)
        yield f"{attention}.SelfAttention.o.weight", (width, inner)
        if i == 0:
            buckets = config["relative_attention_num_buckets"]
            yield f"{attention}.SelfAttention.relative_attention_bias.weight", (buckets, heads)
        yield f"{attention}.layer_norm.weight", (width,)
        for projection in ("wi_0", "wi_1"):
            yield f"{feed_forward}.DenseReluDense.{projection}.weight", (config["d_ff"], width)
        yield f"{feed_forward}.DenseReluDense.wo.weight", (width, config["d_ff"])
        yield f"{feed_forward}.layer_norm.weight", (width,)
    yield "encoder.final_layer_norm.weight", (width,)


def _transformer(config: Config) -> Iterator[Entry]:
    head_width = config["attention_head_dim"]
    width = config["num_attention_heads"] * head_width
    embedders = {"timestep_embedder": 256, "text_embedder": config["pooled_projection_dim"]}
    if config["guidance_embeds"]:
        embedders["guidance_embedder"] = 256
    for embedder, in_features in embedders.items():
        yield from _linear(f"time_text_embed.{embedder}.linear_1", width, in_features)
        yield from _linear(f"time_text_embed.{embedder}.linear_2", width, width)
    yield from _linear("context_embedder", width, config["joint_attention_dim"])
    yield from _linear("x_embedder", width, config["in_channels"])
    for i in range(config["num_layers"]):
        yield from _double_block(f"transformer_blocks.{i}", width, head_width)
    for i in range(config["num_single_layers"]):
        block = f"single_transformer_blocks.{i}"
        yield from _linear(f"{block}.norm.linear", 3 * width, width)
        yield from _linear(f"{block}.proj_mlp", 4 * width, width)
        yield from _linear(f"{block}.proj_out", width, 5 * width)
        yield from _attention_inputs(f"{block}.attn", ("norm_q", "norm_k"), ("to_q", "to_k", "to_v"), width, head_width)
    yield from _linear("norm_out.linear", 2 * width, width)
    out_channels = config["out_channels"] or config["in_channels"]
    yield from _linear("proj_out", config["patch_size"] ** 2 * out_channels, width)


def _double_block(block: str, width: int, head_width: int) -> Iterator[Entry]:
    attention = f"{block}.attn"
    yield from _linear(f"{block}.norm1.linear", 6 * width, width)
    yield from _linear(f"{block}.norm1_context.linear", 6 * width, width)
    yield from _attention_inputs(attention, ("norm_q", "norm_k"), ("to_q", "to_k", "to_v"), width, head_width)
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    yield from _attention_inputs(attention, ("norm_added_q", "norm_added_k"), added, width, head_width)
    yield from _linear(f"{attention}.to_out.0", width, width)
    yield from _linear(f"{attention}.to_add_out", width, width)
    for feed_forward in ("ff", "ff_context"):
        yield from _linear(f"{block}.{feed_forward}.net.0.proj", 4 * width, width)
        yield from _linear(f"{block}.{feed_forward}.net.2", width, 4 * width)


def _attention_inputs(
    name: str, norms: tuple[str, ...], projections: tuple[str, ...], width: int, head_width: int
) -> Iterator[Entry]:
    for norm in norms:
        yield f"{name}.{norm}.weight", (head_width,)
    for projection in projections:
        yield from _linear(f"{name}.{projection}", width, width)


def _resnet(name: str, in_channels: int, out_channels: int) -> Iterator[Entry]:
    yield from _norm(f"{name}.norm1", in_channels)
    yield from _conv(f"{name}.conv1", out_channels, in_channels)
    yield from _norm(f"{name}.norm2", out_channels)
    yield from _conv(f"{name}.conv2", out_channels, out_channels)
    if in_channels != out_channels:
        yield from _conv(f"{name}.conv_shortcut", out_channels, in_channels, kernel=1)


def _mid_block(name: str, width: int) -> Iterator[Entry]:
    yield from _resnet(f"{name}.resnets.0", width, width)
    yield from _norm(f"{name}.attentions.0.group_norm", width)
    for projection in ("to_q", "to_k", "to_v", "to_out.0"):
        yield from _linear(f"{name}.attentions.0.{projection}", width, width)
    yield from _resnet(f"{name}.resnets.1", width, width)


def _vae(config: Config) -> Iterator[Entry]:
    widths, layers = config["block_out_channels"], config["layers_per_block"]
    yield from _conv("encoder.conv_in", widths[0], config["in_channels"])
    previous = widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            yield from _resnet(f"encoder.down_blocks.{i}.resnets.{j}", width if j else previous, width)
        if i < len(widths) - 1:
            yield from _conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", width, width)
        previous = width
    yield from _mid_block("encoder.mid_block", previous)
    yield from _norm("encoder.conv_norm_out", previous)
    # Mean and log-variance.
    yield from _conv("encoder.conv_out", 2 * config["latent_channels"], previous)
    yield from _conv("decoder.conv_in", previous, config["latent_channels"])
    yield from _mid_block("decoder.mid_block", previous)
    for i, width in enumerate(reversed(widths)):
        for j in range(layers + 1):
            yield from _resnet(f"decoder.up_blocks.{i}.resnets.{j}", width if j else previous, width)
        if i < len(widths) - 1:
            yield from _conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", width, width)
        previous = width
    yield from _norm("decoder.conv_norm_out", previous)
    yield from _conv("decoder.conv_out", config["out_channels"], previous)


def _tiny_vae(config: Config) -> Iterator[Entry]:
    """`AutoencoderTiny`: two sequences, in which activations and upsamplings take up numbers but hold no tensors."""
    widths, blocks = config["encoder_block_out_channels"], config["num_encoder_blocks"]
    layer = 0
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        in_channels = width if i else config["in_channels"]
        yield from _conv(f"encoder.layers.{layer}", width, in_channels, bias=i == 0)
        yield from _tiny_blocks("encoder", range(layer + 1, layer + 1 + count), width)
        layer += 1 + count
    yield from _conv(f"encoder.layers.{layer}", config["latent_channels"], widths[-1])
    widths, blocks = config["decoder_block_out_channels"], config["num_decoder_blocks"]
    yield from _conv("decoder.layers.0", widths[0], config["latent_channels"])
    layer = 2
    for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
        yield from _tiny_blocks("decoder", range(layer, layer + count), width)
        last = i == len(widths) - 1
        layer += count + (0 if last else 1)
        yield from _conv(f"decoder.layers.{layer}", config["out_channels"] if last else width, width, bias=last)
        layer += 1


def _tiny_blocks(half: str, layers: range, width: int) -> Iterator[Entry]:
    for layer in layers:
        for j in (0, 2, 4):
            yield from _conv(f"{half}.layers.{layer}.conv.{j}", width, width)


_LAYOUTS: Mapping[str, Callable[[Config], Iterator[Entry]]] = {
    "text_encoder": _clip,
    "text_encoder_2": _t5,
    "transformer": _transformer,
    "vae": _vae,
    "vae_tiny": _tiny_vae,
}


def convert_lora(tensors: Tensors) -> Tensors:
    """Tensors by diffusers' names; whatever the converters raise."""
    from diffusers.loaders import FluxLoraLoaderMixin

    converted: Tensors = FluxLoraLoaderMixin.lora_state_dict(dict(tensors))  # a copy: converters empty it
    return converted
