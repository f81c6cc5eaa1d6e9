"""What FLUX.1 is made of: kinds of parts, the parts in the order they run, and how their weights are cut over ranks.

The transformer comes in two forms. `inline`: head, blocks and tail, all run at every step. `hoisted`: what depends on
timestep, guidance and pooled prompt alone is in parts of their own that run once per image for all its steps, one row
a step; blocks and tail take the row of their step as an input.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from fluxkiln.errors import UsageError
from fluxkiln.patches.cut import WHOLE, Cut
from fluxkiln.types import Configs, Kind, Part, Shapes

CLIP_TOKENS = 77
# Denoising steps that the hoisted parts take at once; rows beyond an image's number of steps are padding.
MODULATION_ROWS = 64
# Rows of modulation that upstream's AdaLN linears give: shift, scale, gate of attention, then of the feed-forward, and
# this for the image and for the text; shift, scale, gate; scale, shift.
MODULATION_CHUNKS: Mapping[str, int] = {"double": 12, "single": 3, "tail": 2}
# configs of components that are not there stand for models without blocks
NO_BLOCKS: Configs = {"text_encoder_2": {"num_layers": 0}, "transformer": {"num_layers": 0, "num_single_layers": 0}}

_ROTARY = ("rotary_cos", "rotary_sin")
CONSTANT_INPUTS = (*_ROTARY, "position_bias", "position_buckets")
_IMAGE, _TEXT = "hidden_states", "encoder_hidden_states"
_STREAMS, _STREAMS_OUT = (_IMAGE, _TEXT), ("hidden_states_out", "encoder_hidden_states_out")
_BOTH = (("hidden_states_out", _IMAGE), ("encoder_hidden_states_out", _TEXT))
_ONE = _BOTH[:1]
_TIMES = ("pooled_projections", "timestep", "guidance")
_EMBEDDERS = ("x_embedder.", "context_embedder.")
_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")
_ADALN: Mapping[str, tuple[str, ...]] = {
    "double": ("norm1.linear.", "norm1_context.linear."),
    "single": ("norm.linear.",),
    "tail": ("norm_out.linear.",),
}


def _kind(name: str, component: str, inputs: tuple[str, ...], outputs: tuple[str, ...], **traits: Any) -> Kind:
    return Kind(name, component, inputs, outputs, **{"family": name, "block": traits.get("family", name), **traits})


def _block(name: str, inputs: tuple[str, ...], **traits: Any) -> Kind:
    """A double or single block, or the tail, in one of its forms."""
    family = name.partition("_")[0]
    outputs, residual = {
        "double": (_STREAMS_OUT, _BOTH), "single": (_STREAMS_OUT[:1], _ONE), "tail": (("sample",), ()),
    }[family]  # fmt: skip
    blocks = family != "tail"
    return _kind(
        name, "transformer", inputs, outputs, residual=residual, stored="blocks" if blocks else "BF16", family=family,
        rotated=2 * len(residual), narrow_outputs=blocks, ordered=True, **{"narrow_inputs": "all", **traits},
    )  # fmt: skip


def _modulation(block: str) -> Kind:
    return _kind(
        f"{block}_modulation", "transformer", ("temb",), ("modulation",), rows=("temb",), most_rows=MODULATION_ROWS,
        own=_ADALN[block], stored="BF16" if block == "tail" else "blocks", narrow_outputs=True, family="modulation",
        block=block,
    )  # fmt: skip


def _decoder(name: str, folder: str = "") -> Kind:
    return _kind(name, "vae", ("latents",), ("image",), folder=folder, stored="F16", convolutional=True)


_WHOLE = (
    _kind("clip", "text_encoder", ("input_ids",), ("last_hidden_state",), stored="F16", traced_on="cpu",
          tables=("embedding.weight",)),
    _kind("t5_embed", "text_encoder_2", ("input_ids",), ("hidden_states_out",), stored="F16", own=("shared.",),
          tables=("shared.weight",)),
    _kind("t5_block", "text_encoder_2", (_IMAGE, "position_bias"), ("hidden_states_out",), residual=_ONE,
          stored="blocks", overflows=True, narrow_inputs="all", narrow_outputs=True,
          tables=("relative_attention_bias.weight",)),
    _kind("t5_final", "text_encoder_2", (_IMAGE,), ("last_hidden_state",), overflows=True, narrow_inputs="all"),
    _kind("head", "transformer", (*_STREAMS, *_TIMES), (*_STREAMS_OUT, "temb"), traced_on="cpu", narrow_outputs=True,
          timed=("temb",), without=(*_BLOCKS, "norm_out.", "proj_out.")),
    _block("double", (*_STREAMS, "temb", *_ROTARY)),
    _block("single", (_IMAGE, "temb", *_ROTARY)),
    # LayerNorm and SiLU alone read what it is given
    _block("tail", (_IMAGE, "temb"), narrow_inputs="norms", own=("norm_out.", "proj_out.")),
    _kind("time_embed", "transformer", _TIMES, ("temb",), rows=("timestep", "guidance"), most_rows=MODULATION_ROWS,
          own=("time_text_embed.",), family="head", timed=("temb",), traced_on="cpu"),
    # SiLU alone reads temb there, and takes float32: time_embed hands it over in float32
    _modulation("double"),
    _modulation("single"),
    _modulation("tail"),
    _kind("token_embed", "transformer", _STREAMS, _STREAMS_OUT, own=_EMBEDDERS, family="head", narrow_outputs=True),
    _block("double_modulated", (*_STREAMS, "modulation", *_ROTARY), without=_ADALN["double"], cut="double"),
    _block("single_modulated", (_IMAGE, "modulation", *_ROTARY), without=_ADALN["single"], cut="single"),
    _block("tail_modulated", (_IMAGE, "modulation"), own=("proj_out.",), cut="tail"),
    _decoder("vae_decoder"),
    _decoder("tiny_vae_decoder", "vae_tiny"),
)  # fmt: skip
# Kinds that exist only where a model is cut over the cores of one accelerator. Blocks and tail are the hoisted form's,
# a part of several blocks has the kind of one.
_SPLIT = (
    _kind("t5", "text_encoder_2", ("input_ids", "position_buckets"), ("last_hidden_state",), cut="t5"),
    _kind("modulated_head", "transformer", (*_STREAMS, *_TIMES), (*_STREAMS_OUT, "modulation"), cut="head"),
    _kind("transformer", "transformer", (*_STREAMS, *_TIMES, *_ROTARY), ("sample",), cut="transformer"),
)  # fmt: skip
KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _WHOLE}
SPLIT_KINDS: Mapping[str, Kind] = {kind.name: kind for kind in _SPLIT}
ALL_KINDS: Mapping[str, Kind] = {**KINDS, **SPLIT_KINDS}


def make_part(name: str, kind: str, prefix: str = "", members: tuple[tuple[str, str], ...] = ()) -> Part:
    """A part of FLUX.1 by the name of its kind; UsageError with the legal names otherwise."""
    if kind not in ALL_KINDS:
        raise UsageError(f"no kind of part is called {kind!r}; there are {', '.join(ALL_KINDS)}")
    return Part(name, ALL_KINDS[kind], prefix, members)


def list_parts(
    configs: Configs, vae: Literal["kl", "tiny"] = "kl", modulation: Literal["inline", "hoisted"] = "inline"
) -> tuple[Part, ...]:
    """All parts of a pipeline in the order they run.

    Args:
        configs: each component's `config.json`, keyed by its folder name.
        vae: `kl` for the checkpoint's own decoder, `tiny` for taef1.
        modulation: the transformer's form. Blocks and tail are called the same in both, their kinds differ.

    Raises:
        UsageError: no such form.
    """
    if modulation not in ("inline", "hoisted"):
        raise UsageError(f"no form of the transformer is called {modulation!r}; there are inline, hoisted")
    parts = [make_part("clip", "clip"), make_part("t5_embed", "t5_embed")]
    for i in range(int(configs["text_encoder_2"]["num_layers"])):
        parts.append(make_part(f"t5_block.{i:02d}", "t5_block", f"encoder.block.{i}."))
    parts.append(make_part("t5_final", "t5_final", "encoder.final_layer_norm."))
    doubles, singles = (_prefixes(configs, kind) for kind in ("double", "single"))
    blocks = [
        *(make_part(f"double.{i:02d}", "double", prefix) for i, prefix in enumerate(doubles)),
        *(make_part(f"single.{i:02d}", "single", prefix) for i, prefix in enumerate(singles)),
        make_part("tail", "tail"),
    ]
    if modulation == "inline":
        parts += [make_part("head", "head"), *blocks]
    else:
        parts.append(make_part("time_embed", "time_embed"))
        parts += [make_part(modulation_name(part.name), f"{part.kind}_modulation", part.prefix) for part in blocks]
        parts.append(make_part("token_embed", "token_embed"))
        parts += [replace(part, traits=KINDS[f"{part.kind}_modulated"]) for part in blocks]
    return (*parts, _vae_part(vae))


def list_split_parts(
    configs: Configs, granularity: str = "block", vae: Literal["kl", "tiny"] = "kl"
) -> tuple[Part, ...]:
    """All parts of a pipeline that is cut over ranks, in the order they run.

    Args:
        granularity: `block`, each block a part; `group:N`, N successive blocks of a kind; `whole`, one part for head,
            all blocks and tail.

    Raises:
        UsageError: no such granularity.
    """
    match = re.fullmatch(r"block|whole|group:([1-9]\d{0,5})", granularity)
    if match is None:
        raise UsageError(
            f"granularity {granularity!r:.80}: block, group:N with N blocks in a part, and whole are known"
        )
    configs = {**NO_BLOCKS, **configs}
    doubles, singles = ([(kind, prefix) for prefix in _prefixes(configs, kind)] for kind in ("double", "single"))
    if granularity == "whole":
        members = (("head", ""), *doubles, *singles, ("tail", ""))
        transformer = [make_part("transformer", "transformer", "", members)]
    else:
        size, most = int(match.group(1) or 1), max(len(doubles), len(singles))
        if size > max(most, 1):
            raise UsageError(
                f"granularity {granularity}: there are {len(doubles)} double and {len(singles)} single blocks; give at "
                f"most group:{most}"
            )
        transformer = [
            make_part("head", "modulated_head", "", (("head", ""),)),
            *_groups("double", doubles, size),
            *_groups("single", singles, size),
            make_part("tail", "tail_modulated", "", (("tail", ""),)),
        ]
    vae_part = _vae_part(vae)
    return (
        make_part("clip", "clip", "", (("clip", ""),)),
        make_part("t5", "t5", "", (("t5", ""),)),
        *transformer,
        replace(vae_part, members=((vae_part.kind, vae_part.prefix),)),
    )


def modulation_name(part: str) -> str:
    """The part that computes the modulation of a block or the tail: `double.07` -> `double_modulation.07`."""
    base, dot, number = part.partition(".")
    return f"{base}_modulation{dot}{number}"


def _prefixes(configs: Configs, kind: str) -> list[str]:
    """Where the tensors of each block of a kind start."""
    folder, depth = {
        "double": ("transformer_blocks", "num_layers"),
        "single": ("single_transformer_blocks", "num_single_layers"),
    }[kind]
    return [f"{folder}.{i}." for i in range(int(configs["transformer"][depth]))]


def _groups(kind: str, blocks: Sequence[tuple[str, str]], size: int) -> list[Part]:
    parts = []
    for first in range(0, len(blocks), size):
        members = tuple(blocks[first : first + size])
        last = first + len(members) - 1
        name = f"{kind}.{first:02d}" if first == last else f"{kind}.{first:02d}-{last:02d}"
        parts.append(make_part(name, f"{kind}_modulated", members[0][1], members))
    return parts


def _vae_part(vae: Literal["kl", "tiny"]) -> Part:
    kind = "vae_decoder" if vae == "kl" else "tiny_vae_decoder"
    return make_part(kind, kind, "decoder.")


_BF16 = 2
_LEAVES = r"\.(weight|bias)"

# Every slot of a kind matches exactly one pattern. q, k, v and the MLP's first linear are column, what follows them
# row, so that nothing is gathered between.
CUTS: Mapping[str, tuple[Cut, ...]] = {
    "clip": WHOLE,
    "t5": (
        Cut(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.[qkv]\.weight", "column", heads=True),
        Cut(r"encoder\.block\.\d+\.layer\.0\.SelfAttention\.o\.weight", "row", heads=True),
        # [buckets, heads]: each rank has the columns of its heads
        Cut(r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", "row", heads=True),
        Cut(r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wi_[01]\.weight", "column"),
        Cut(r"encoder\.block\.\d+\.layer\.1\.DenseReluDense\.wo\.weight", "row"),
        Cut(r"shared\.weight|encoder\.(block\.\d+\.layer\.[01]\.layer_norm|final_layer_norm)\.weight", "whole"),
    ),
    "head": (
        Cut(rf"(transformer_blocks\.\d+\.norm1(_context)?|norm_out)\.linear{_LEAVES}", "column"),
        Cut(rf"single_transformer_blocks\.\d+\.norm\.linear{_LEAVES}", "column"),
        Cut(rf"(x_embedder|context_embedder|time_text_embed\.\w+_embedder\.linear_[12]){_LEAVES}", "whole"),
    ),
    "double": (
        Cut(rf"attn\.(to_[qkv]|add_[qkv]_proj){_LEAVES}", "column", heads=True),
        Cut(r"attn\.(to_out\.0|to_add_out)\.weight", "row", heads=True),
        Cut(rf"ff(_context)?\.net\.0\.proj{_LEAVES}", "column"),
        Cut(r"ff(_context)?\.net\.2\.weight", "row"),
        Cut(r"(attn\.(to_out\.0|to_add_out)|ff(_context)?\.net\.2)\.bias|attn\.norm_(added_)?[qk]\.weight", "whole"),
    ),
    "single": (
        Cut(rf"attn\.to_[qkv]{_LEAVES}", "column", heads=True),
        Cut(rf"proj_mlp{_LEAVES}", "column"),
        Cut(r"proj_out\.weight_attention", "row", heads=True, source="proj_out.weight", half="attention"),
        Cut(r"proj_out\.weight_mlp", "row", source="proj_out.weight", half="mlp"),
        Cut(r"proj_out\.bias|attn\.norm_[qk]\.weight", "whole"),
    ),
    "tail": (Cut(rf"proj_out{_LEAVES}", "whole"),),
    "vae_decoder": WHOLE,
    "tiny_vae_decoder": WHOLE,
}


def head_count(kind: str, configs: Configs) -> int:
    """Attention heads of the unsplit component that `kind` is cut from; 1 for kinds that are not cut by heads."""
    if kind == "t5":
        return int(configs["text_encoder_2"]["num_heads"])
    return int(configs["transformer"]["num_attention_heads"]) if kind in ("head", "double", "single", "tail") else 1


def split_axes(configs: Configs) -> tuple[int, dict[str, int]]:
    """Attention heads of the transformer, which may be padded, and the axes that have to split evenly, by name."""
    widths: dict[str, int] = {}
    if "text_encoder_2" in configs:
        t5 = configs["text_encoder_2"]
        widths |= {"T5's heads": int(t5["num_heads"]), "T5's feed-forward": int(t5["d_ff"])}
    return int(configs["transformer"]["num_attention_heads"]) if "transformer" in configs else 1, widths


def activation_bytes(configs: Configs, shapes: Shapes, degree: int) -> int:
    """Bytes of activations that are alive at once on a core, by the widest moments of a block and of the decoder.

    A block: scores of this core's heads in float32 and bfloat16, the joint tokens in float32, and their MLP. The
    decoder: four maps of its narrowest stage at the size of the image. The compiler tiles both and needs less.
    """
    widest = [0]
    if "transformer" in configs:
        flux = configs["transformer"]
        heads, joint = -(-int(flux["num_attention_heads"]) // degree), shapes.joint_tokens
        width = int(flux["num_attention_heads"]) * int(flux["attention_head_dim"])
        widest.append(6 * heads * joint**2 + joint * width * (4 * 4 + 2 * _BF16 * 4 // degree))
    if "vae" in configs:
        channels = int(configs["vae"].get("block_out_channels", [128])[0])
        widest.append(4 * _BF16 * channels * shapes.height * shapes.width)
    return max(widest)
