"""Which value of a split part is the output of which of diffusers' modules, put together from what the ranks have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.errors import PatchError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.leaves import load_whole, see_leaves
from fluxkiln.patches.cut import Cut, find_cut
from fluxkiln.patches.leaves import Leaf
from fluxkiln.types import Part
from fluxkiln.verify.debug.bisect import Finding, Tolerance
from fluxkiln.verify.metrics import compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.values import Operation

Values = Mapping[str, "NDArray[Any]"]
# beyond this it is another value, not the same one with an error
_SAME = 0.5


def see_split_leaves(part: Part, checkpoint: Checkpoint, inputs: Values, state: Values) -> tuple[Leaf, ...]:
    """What upstream's own leaf modules make in the place of a split part, in call order, float32."""
    seen = checkpoint.model.see_split_leaves(
        part, checkpoint.configs, inputs, state, lambda one: load_whole(one, checkpoint)
    )
    return see_leaves(part, checkpoint, inputs) if seen is None else tuple(seen)


def match_split(
    leaves: Sequence[Leaf],
    operations: Sequence[Operation],
    seen: Sequence[Values],
    cuts: tuple[Cut, ...],
    tolerance: Tolerance,
    results: Values,
) -> list[Finding]:
    """A finding for every module whose output the ranks have, in the order the modules ran, then for the results.

    With weights of its own a module is the last operation that reads them; without any, the nearest value.

    Args:
        seen: of each rank its values, float32 arithmetic.
        cuts: how the weights of the part's kind are cut; none where it is whole.
        results: value -> what the whole part makes of it, of those that are its outputs.
    """
    findings: list[Finding] = []
    for leaf in leaves:
        own = [op for op in operations if any(_module(slot) == leaf.name for slot in op.slots)]
        if own:
            value: str | None = own[-1].output
            found = _assemble(own[-1], leaf, operations, seen, cuts)
        else:
            value, found = _nearest(leaf, seen)
        if value is not None and found is not None:
            findings.append(_judge(value, found, leaf.output, tolerance))
    judged = {finding.value for finding in findings}
    findings += [
        _judge(value, seen[0][value], expected, tolerance) for value, expected in results.items() if value not in judged
    ]
    return findings


def _judge(value: str, found: NDArray[Any], expected: NDArray[Any], tolerance: Tolerance) -> Finding:
    metrics = compare(found.reshape(expected.shape), expected)
    size = metrics.relative_l2
    missed = "" if size <= tolerance.own else "own" if metrics.finite else "finite"
    last = int(expected.shape[-1])
    return Finding(value, size, metrics.worst_channel, size, missed, (), last * bool(missed), last)


def added_on_every_rank(
    finding: Finding, leaf_output: NDArray[Any], found: NDArray[Any], bias: NDArray[Any], ranks: int
) -> bool:
    """Whether what is too much in a module's output is its bias, once for every rank but the first."""
    if finding.missed != "own" or bias.shape != leaf_output.shape[-1:] or not np.any(bias):
        return False
    surplus = np.broadcast_to((ranks - 1) * bias, leaf_output.shape)
    return compare(found.reshape(leaf_output.shape) - leaf_output, surplus).relative_l2 < 1e-2


def assembled(
    value: str, leaf: Leaf, operations: Sequence[Operation], seen: Sequence[Values], cuts: tuple[Cut, ...]
) -> NDArray[Any] | None:
    """The module's output as the ranks together have it in `value`."""
    operation = next(one for one in operations if one.output == value)
    return _assemble(operation, leaf, operations, seen, cuts)


def _module(slot: str) -> str:
    """`proj_out.weight_mlp` -> `proj_out`."""
    return slot.rpartition(".")[0]


def _assemble(
    operation: Operation, leaf: Leaf, operations: Sequence[Operation], seen: Sequence[Values], cuts: tuple[Cut, ...]
) -> NDArray[Any] | None:
    """Columns side by side, partial sums added, what is whole from rank 0; None where it is not the module's output."""
    own, wanted = seen[0][operation.output], leaf.output.shape
    if own.size != leaf.output.size:
        return _side_by_side(operation.output, wanted, seen)
    if not _partial(operation, operations, cuts):
        return own
    total: NDArray[Any] = np.sum([rank[operation.output] for rank in seen], axis=0)
    return total


def _side_by_side(value: str, wanted: tuple[int, ...], seen: Sequence[Values]) -> NDArray[Any] | None:
    shape = seen[0][value].shape
    if len(shape) != len(wanted):
        return None
    axes = [axis for axis in range(len(shape)) if shape[axis] != wanted[axis]]
    if len(axes) != 1 or not shape[axes[0]] < wanted[axes[0]] <= shape[axes[0]] * len(seen):
        return None
    joined: NDArray[Any] = np.concatenate([rank[value] for rank in seen], axis=axes[0])
    return np.take(joined, range(wanted[axes[0]]), axis=axes[0])  # heads beyond are padding


def _partial(operation: Operation, operations: Sequence[Operation], cuts: tuple[Cut, ...]) -> bool:
    """Whether the value is one of partial sums: made of a product with rows of a weight, and not reduced yet."""
    makers = {one.output: one for one in operations}
    pending, reached = [operation], set()
    while pending:
        one = pending.pop()
        if one.op_type == "all-reduce" or one.output in reached:
            continue
        reached.add(one.output)
        if one.op_type == "dot" and any(_is_row(cuts, slot) for slot in one.slots):
            return True
        pending += [makers[name] for name in one.inputs if name in makers and one.op_type != "dot"]
    return False


def _is_row(cuts: tuple[Cut, ...], slot: str) -> bool:
    if not cuts:
        return False
    try:
        return find_cut(cuts, slot).way == "row"
    except PatchError:
        return False


def _nearest(leaf: Leaf, seen: Sequence[Values]) -> tuple[str | None, NDArray[Any] | None]:
    """The value nearest to what a module without weights made, if any comes near at all."""
    best: tuple[float, str | None, NDArray[Any] | None] = (_SAME, None, None)
    for name, own in seen[0].items():
        same = own.size == leaf.output.size
        found = own if same else _side_by_side(name, leaf.output.shape, seen)
        if found is not None:
            distance = compare(found.reshape(leaf.output.shape), leaf.output).relative_l2
            if distance < best[0]:
                best = (distance, name, found)
    return best[1], best[2]
