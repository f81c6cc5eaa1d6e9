"""How a part is cut over tensor-parallel ranks, by the table of its model, and what the ranks say to one another.

A `column` weight [out, in] is cut along its outputs and so is its bias: each rank computes some of the features. A
`row` weight is cut along its inputs: each rank computes a partial sum of all features, which a reduction completes and
to which the whole bias is then added once. `whole` is the same on every rank. An axis that counts attention heads is
padded with heads of zeros when the ranks cannot share them evenly (24 heads on 16 ranks become 32): a head of zeros
attends to everything, gives zeros, and meets zero columns in the projection behind it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

from fluxkiln.errors import PatchError, UsageError
from fluxkiln.types import TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

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

    def takes(self, name: str) -> bool:
        """Whether a slot of this row is made of the tensor that the checkpoint calls so after the part's prefix."""
        return name == self.source if self.source else re.fullmatch(self.slots, name) is not None


@dataclass(frozen=True, slots=True)
class Share:
    """What one rank holds of an axis: entries [start, stop) and then zeros, `size` in all."""

    axis: int
    start: int
    stop: int
    size: int


WHOLE = (Cut(".*", "whole"),)


def find_cut(cuts: tuple[Cut, ...], slot: str) -> Cut:
    """The row of a kind's table for a slot.

    Raises:
        PatchError: the slot matches no row or more than one.
    """
    found = [cut for cut in cuts if re.fullmatch(cut.slots, slot)]
    if len(found) != 1:
        raise PatchError(
            f"{len(found)} rules say how weight {slot} is cut, one must; install the versions pinned in constraints.txt"
        )
    return found[0]


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


def local_shape(cuts: tuple[Cut, ...], slot: str, shape: tuple[int, ...], heads: int, ranks: int) -> tuple[int, ...]:
    """The shape each rank holds of a slot that has `shape` uncut; errors as `find_cut` and `share_of`."""
    share = share_of(find_cut(cuts, slot), slot, shape, heads, ranks, rank=0)
    return shape if share is None else (*shape[: share.axis], share.size, *shape[share.axis + 1 :])


class Collectives(Protocol):
    """Operations in which all ranks of a part take part, in the same order on each.

    A part is written against them and knows neither its rank nor who carries the tensors.
    """

    @property
    def ranks(self) -> int:
        """How many ranks there are."""

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks of `x`, which has one shape on all of them."""

    def all_gather(self, x: Tensor) -> Tensor:
        """`x` of every rank: [...] -> [ranks, ...], stacked in rank order on a new first axis."""


@dataclass(frozen=True, slots=True)
class SilentRanks:
    """Ranks that hear themselves alone: shapes are those of so many ranks, values right for one."""

    ranks: int

    def all_reduce(self, x: Tensor) -> Tensor:
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        return x.expand(self.ranks, *x.shape)


@dataclass(frozen=True)
class ParallelPart:
    """A part of one rank.

    Attributes:
        module: on the meta device, in eval mode. `forward` takes the inputs in their order.
        inputs: activations, the same on all ranks; float32 stands for the weights' dtype but in `float32_inputs`.
        outputs: names of what `forward` returns, the same on all ranks.
        slots: the module's parameters in order, with their local shapes. A part of several blocks has the number of the
            block in front of the names: `0.attn.to_q.weight`.
        all_reduces, all_gathers: how many it issues.
        float32_inputs: what is never rounded to the weights' dtype: the 8 bits of a bfloat16 are too few for an angle.
    """

    module: nn.Module
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    slots: tuple[TensorSpec, ...]
    all_reduces: int
    all_gathers: int
    float32_inputs: tuple[str, ...] = ()

    def inputs_in(self, dtype: str) -> tuple[TensorSpec, ...]:
        """The inputs of the part when its weights have `dtype`."""
        rounded = (spec.dtype == "float32" and spec.name not in self.float32_inputs for spec in self.inputs)
        return tuple(
            replace(spec, dtype=dtype) if change else spec for spec, change in zip(self.inputs, rounded, strict=True)
        )
