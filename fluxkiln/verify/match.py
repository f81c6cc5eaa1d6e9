"""Which value of a graph is the output of which of upstream's modules, and how far it is from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.export.graph import SEPARATOR, slot_transforms
from fluxkiln.patches.leaves import Leaf
from fluxkiln.verify.findings import Finding, Operation, Tolerance, Values
from fluxkiln.verify.judgement import epsilons_differ, find_operation
from fluxkiln.verify.metrics import compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

# beyond this it is another value, not the same one with an error
_SAME = 0.5
IsPartial = Callable[[Operation], bool]


def match_leaves(
    leaves: Sequence[Leaf],
    operations: Sequence[Operation],
    seen: Sequence[Values],
    tolerance: Tolerance,
    is_partial: IsPartial = lambda _: False,
) -> list[Finding]:
    """A finding for every module whose output the graph has as one value, in the order the modules ran.

    With weights of its own a module is the last operation that reads them; without any, the nearest value of its size.
    A factor that the graph has in a weight instead of among its operations is put on the module's output.

    Args:
        seen: of each rank the graph's values; one of a graph that is not cut.
        is_partial: whether an operation makes one of partial sums, which the ranks have not added up yet.
    """
    findings = []
    for leaf in leaves:
        own = [one for one in operations if any(_module(slot) == leaf.name for slot in one.slots)]
        if own:
            value, found = own[-1].output, module_output(own[-1], leaf, seen, is_partial)
        else:
            value, found = _nearest(leaf, seen)
        if found is not None:
            operation = find_operation(operations, value)
            output = leaf.output * _factor(leaf.name, operation)
            epsilon = epsilons_differ(operation.epsilon, leaf.epsilon)
            findings.append(judge_output(value, found, output, tolerance, "epsilon" * epsilon))
    return findings


def judge_output(
    value: str, found: NDArray[Any], expected: NDArray[Any], tolerance: Tolerance, missed: str = ""
) -> Finding:
    """The finding of a value that is all of what upstream makes; `missed`: what else is wrong with it."""
    metrics = compare(found.reshape(expected.shape), expected)
    size, last = metrics.relative_l2, int(expected.shape[-1])
    out = "" if size <= tolerance.own else "own" if metrics.finite else "finite"
    return Finding(value, size, metrics.worst_channel, size, out or missed, (), last * bool(out), last)


def module_output(
    operation: Operation, leaf: Leaf, seen: Sequence[Values], is_partial: IsPartial
) -> NDArray[Any] | None:
    """The module's output as the ranks together have it where `operation` is done; None if that is not all of it.

    Columns side by side, partial sums added, what is whole from rank 0.
    """
    value, wanted = operation.output, leaf.output.shape
    if value not in seen[0] or any(step.op == "slice" for slot in operation.slots for step in slot_transforms(slot)[1]):
        return None
    if seen[0][value].size != leaf.output.size:
        return _side_by_side(value, wanted, seen)
    if not is_partial(operation):
        return seen[0][value]
    total: NDArray[Any] = np.sum([rank[value] for rank in seen], axis=0)
    return total


def _module(slot: str) -> str:
    """`attn.to_q.weight__t` -> `attn.to_q`."""
    return slot.split(SEPARATOR)[0].rpartition(".")[0]


def _side_by_side(value: str, wanted: tuple[int, ...], seen: Sequence[Values]) -> NDArray[Any] | None:
    shape = seen[0][value].shape
    axes = [axis for axis, (own, whole) in enumerate(zip(shape, wanted, strict=False)) if own != whole]
    if len(shape) != len(wanted) or len(axes) != 1:
        return None
    (axis,) = axes
    if not shape[axis] < wanted[axis] <= shape[axis] * len(seen):
        return None
    joined: NDArray[Any] = np.concatenate([rank[value] for rank in seen], axis=axis)
    return np.take(joined, range(wanted[axis]), axis=axis)  # heads beyond are padding


def _nearest(leaf: Leaf, seen: Sequence[Values]) -> tuple[str, NDArray[Any] | None]:
    """The value nearest to what a module without weights made, if any comes near at all."""
    best: tuple[float, str, NDArray[Any] | None] = (_SAME, "", None)
    for name, own in seen[0].items():
        found = own if own.size == leaf.output.size else _side_by_side(name, leaf.output.shape, seen)
        if found is not None:
            distance = compare(found.reshape(leaf.output.shape), leaf.output).relative_l2
            if distance < best[0]:
                best = (distance, name, found)
    return best[1:]


def _factor(module: str, operation: Operation) -> float:
    """What the graph multiplied the module's weight with."""
    factor = 1.0
    for slot in operation.slots:
        if _module(slot) == module:
            for step in slot_transforms(slot)[1]:
                factor *= step.factor if step.op == "scale" else 1.0
    return factor
