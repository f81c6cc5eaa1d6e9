"""How the weights of each kind are cut over tensor-parallel ranks: one table, of which everything else follows.

A `column` weight [out, in] is cut along its outputs and so is its bias: each rank computes some of the features. A
`row` weight is cut along its inputs: each rank computes a partial sum of all features, which a reduction completes and
to which the whole bias is then added once. `whole` is the same on every rank. An axis that counts attention heads is
padded with heads of zeros when the ranks cannot share them evenly (24 heads on 16 ranks become 32): a head of zeros
attends to everything, gives zeros, and meets zero columns in the projection behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fluxkiln.errors import PatchError, UsageError

Way = Literal["column", "row", "whole"]


@dataclass(frozen=True, slots=True)
class Cut:
    """One row of the table.

    Attributes:
        slots: a regular expression of the slots it is for, as the checkpoint names them after the part's prefix.
        way: see above.
        heads: the axis counts attention heads.
        source, half: for a slot that is some columns of a tensor: that tensor, and whether they are the columns that
            take the attention's output (as many as the tensor has rows, in front) or the MLP's (the others).
    """

    slots: str
    way: Way
    heads: bool = False
    source: str = ""
    half: Literal["", "attention", "mlp"] = ""


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of an axis: entries [start, stop) and then zeros, `size` in all."""

    axis: int
    start: int
    stop: int
    size: int


_LEAVES = r"\.(weight|bias)"
_WHOLE = (Cut(".*", "whole"),)

# Every slot of a kind matches exactly one pattern. q, k, v and the MLP's first linear are column, what follows them
# row, so that nothing is gathered between.
CUTS: Mapping[str, tuple[Cut, ...]] = {
    "clip": _WHOLE,
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
    "vae_decoder": _WHOLE,
    "tiny_vae_decoder": _WHOLE,
}


def find_cut(kind: str, slot: str) -> Cut:
    """The row of the table for a slot.

    Raises:
        UsageError: no such kind. PatchError: the slot matches no row or more than one.
    """
    if kind not in CUTS:
        raise UsageError(f"no kind of tensor-parallel part is called {kind!r}; there are {', '.join(CUTS)}")
    found = [cut for cut in CUTS[kind] if re.fullmatch(cut.slots, slot)]
    if len(found) != 1:
        raise PatchError(
            f"{len(found)} rules say how weight {slot} of kind {kind} is cut, one must; install the versions pinned in "
            "constraints.txt"
        )
    return found[0]


def head_count(kind: str, configs: Mapping[str, Mapping[str, Any]]) -> int:
    """Attention heads of the unsplit component that `kind` is cut from; 1 for kinds that are not cut by heads."""
    if kind == "t5":
        return int(configs["text_encoder_2"]["num_heads"])
    return int(configs["transformer"]["num_attention_heads"]) if kind in ("head", "double", "single", "tail") else 1


def columns_of(cut: Cut, shape: tuple[int, ...]) -> tuple[int, int]:
    """The columns [start, stop) of a source of `shape` that the slot is made of, before it is cut over ranks."""
    return {"": (0, shape[-1]), "attention": (0, shape[0]), "mlp": (shape[0], shape[-1])}[cut.half]


def share_of(cut: Cut, slot: str, shape: tuple[int, ...], heads: int, ranks: int, rank: int) -> Share | None:
    """What `rank` of `ranks` holds of a slot that has `shape` uncut; None where it holds the whole.

    Raises:
        UsageError: the axis cannot be shared evenly and does not count heads.
    """
    if cut.way == "whole":
        return None
    axis = 0 if cut.way == "column" else 1
    entries = shape[axis]
    if not cut.heads and entries % ranks:
        raise UsageError(
            f"axis {axis} of {slot} has {entries} entries, which {ranks} ranks cannot share evenly; use a tp degree "
            f"that divides {entries}"
        )
    size = -(-heads // ranks) * (entries // heads) if cut.heads else entries // ranks
    start = min(rank * size, entries)
    return Share(axis, start, min(start + size, entries), size)


def local_shape(kind: str, slot: str, shape: tuple[int, ...], heads: int, ranks: int) -> tuple[int, ...]:
    """The shape each rank holds of a slot that has `shape` uncut; errors as `find_cut` and `share_of`."""
    share = share_of(find_cut(kind, slot), slot, shape, heads, ranks, rank=0)
    return shape if share is None else (*shape[: share.axis], share.size, *shape[share.axis + 1 :])
