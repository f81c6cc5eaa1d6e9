"""How the weights of FLUX.1's parts are cut over ranks: one table, of which everything else follows."""

from __future__ import annotations

from collections.abc import Mapping

from fluxkiln.patches.cut import WHOLE, Cut
from fluxkiln.types import Configs, Shapes

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
