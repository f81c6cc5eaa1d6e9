"""Which operation is the first to leave its tolerance, and which value of a graph is the output of which module.

*own*: is a value what the operation makes of the very operands it was given, by the arithmetic of the rung below? That
finds a wrong weight or attribute, however noisy the operands. *drift*: how far is it from the rung below's, with all
errors that led to it? That finds what is right in itself and loses what it is given. The first value that fails either
is the answer; a search by halves would need errors that never heal, which they do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.export.graph import SEPARATOR, slot_transforms
from fluxkiln.verify.findings import (
    BUILD_AGAIN,
    Culprit,
    Finding,
    Operation,
    Range,
    Remedy,
    RungFindings,
    Tolerance,
    Values,
    epsilons_differ,
)
from fluxkiln.verify.metrics import compare, explain_mismatch

if TYPE_CHECKING:
    from fluxkiln.patches.parts import Leaf

# channels named in a finding
MOST_NAMED = 8

# healthy parts of all kinds stay below half of them
F32 = Tolerance(1e-5, 1e-4, 1e-4)
F16 = Tolerance(2e-3, 1e-2, 5e-2)
BF16 = Tolerance(1e-2, 5e-2, 0.1)  # one rounding is 3.9e-3 at most; sums of many operations reach 2e-2
REORDERED = Tolerance(2e-5, 2e-4, 2e-5)  # float32 in another order of sums than the modules'
# slot -> rank (-1 where there is but one) -> the share of it that is not what it should be
Shares = Mapping[str, Mapping[int, float]]
# what a scheme stores or computes with -> bounds; `*` is any other
DEQUANTIZED: Mapping[str, Tolerance] = {
    "F32": F32,
    "F16": F16,
    "BF16": BF16,
    "W8BF16": Tolerance(2e-2, 0.1, 0.2),
    # as one in 8 bits does whose inputs have 8 bits as well
    "W8A8": Tolerance(5e-2, 0.2, 0.4),
    # one matmul with 4-bit codes errs by 9 %, its worst channel by 20 %
    "W4BF16": Tolerance(0.15, 0.5, 0.5),
}


def tolerance_of(known: Mapping[str, Tolerance], scheme: str) -> Tolerance:
    """The bounds for a scheme's base name; SchemeError where none are known."""
    if scheme not in known and "*" not in known:
        raise SchemeError(f"no tolerance is known for {scheme}; there are {', '.join(known)}")
    return known.get(scheme) or known["*"]


def judge_values(
    order: Sequence[str], seen: Values, below: Values, local: Values, tolerance: Tolerance
) -> tuple[Finding, ...]:
    """A finding for every value that was seen and has its counterparts.

    Args:
        order: the names of values in the order they are made.
        seen: values at the rung in question; below: the same at the rung below.
        local: what the arithmetic of the rung below makes of the operands as they were seen.
    """
    return tuple(
        _judge(name, seen[name], below[name], local[name], tolerance)
        for name in order
        if name in seen and name in below and name in local and not explain_mismatch(seen[name], below[name])
    )


def judge_ranks(
    order: Sequence[str], seen: Sequence[Values], below: Sequence[Values], local: Sequence[Values], tolerance: Tolerance
) -> tuple[Finding, ...]:
    """As `judge_values`, of each rank; a value's finding is that of the rank where it is worst.

    Each rank is judged by itself: what is wrong on one of many would drown in the norms of all.
    """
    ranks = [judge_values(order, *one, tolerance) for one in zip(seen, below, local, strict=True)]
    return tuple(
        max(
            (replace(finding, rank=rank) for rank, finding in enumerate(findings)),
            key=lambda finding: (bool(finding.missed), finding.own),
        )
        for findings in zip(*ranks, strict=True)
    )


def judge_stored(
    against: str, operations: Sequence[Operation], shares: Shares, tell: Callable[[Shares], str]
) -> RungFindings:
    """Findings on weights that were read back and not computed with, one for every operation that reads some.

    Args:
        tell: the sentence that says of slots what is wrong with them.
    """
    findings = []
    for operation in operations:
        found = [(share, rank) for slot in operation.slots for rank, share in shares.get(slot, {}).items()]
        if found:
            share, rank = max(found)
            findings.append(Finding(operation.output, share, share, share, "own" if share else "", rank=rank))
    made = RungFindings("stored", against, tuple(findings))
    first = first_missed(findings)
    if first is None:
        return made
    operation = find_operation(operations, first.value)
    wrong = wrong_slots(operation, shares)
    nothing = Range(0.0, 0.0, 0.0, 0.0, ())
    remedy = Remedy(tell(wrong), BUILD_AGAIN)
    return replace(made, culprit=Culprit("stored", first, operation.op_type, "", tuple(wrong), {}, nothing, remedy))


def wrong_slots(operation: Operation, shares: Shares) -> dict[str, dict[int, float]]:
    """Of the operation's slots those with a share of wrong elements, and the ranks that have one."""
    found = {slot: {rank: share for rank, share in shares.get(slot, {}).items() if share} for slot in operation.slots}
    return {slot: ranks for slot, ranks in found.items() if ranks}


def with_culprit(
    made: RungFindings,
    operations: Sequence[Operation],
    seen: Values,
    remedy_of: Callable[[Finding, Operation], Remedy],
    forms: Mapping[str, Operation],
) -> RungFindings:
    """The same with the operation that makes the first value out of tolerance, if there is one.

    Args:
        seen: values at this rung, the part's inputs included.
        forms: value -> what its operation became in the compiled form.
    """
    first = first_missed(made.findings)
    if first is None:
        return made
    operation = find_operation(operations, first.value)
    sources, slots = find_sources(operation, operations, seen)
    form = forms.get(first.value)
    culprit = Culprit(
        made.rung, first, operation.op_type, form.op_type if form else "", slots,
        {name: value_range(seen[name]) for name in sources}, value_range(seen[first.value]),
        remedy_of(first, operation),
    )  # fmt: skip
    return replace(made, culprit=culprit)


def find_sources(
    operation: Operation, operations: Sequence[Operation], seen: Collection[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The nearest values among `seen` that lead to the operation; its weights, and those of what is between."""
    makers = {one.output: one for one in operations}
    sources: dict[str, None] = {}
    slots = dict.fromkeys(operation.slots)
    pending = list(reversed(operation.inputs))
    while pending:
        name = pending.pop()
        if name in seen:
            sources[name] = None
        elif name in makers:
            slots |= dict.fromkeys(makers[name].slots)
            pending += reversed(makers[name].inputs)
    return tuple(sources), tuple(slots)


def find_operation(operations: Sequence[Operation], value: str) -> Operation:
    """The operation that makes a value."""
    return next(operation for operation in operations if operation.output == value)


def first_missed(findings: Sequence[Finding]) -> Finding | None:
    """The first value that leaves its tolerance, in the order of the graph."""
    return next((finding for finding in findings if finding.missed), None)


def value_range(array: NDArray[Any]) -> Range:
    """The range of a value; of an empty one everything is 0."""
    flat = np.asarray(array, np.float64).ravel()
    if not flat.size:
        return Range(0.0, 0.0, 0.0, 0.0, array.shape)
    sizes = np.abs(flat[flat != 0.0])
    smallest = float(sizes.min()) if sizes.size else 0.0
    return Range(float(flat.min()), float(flat.max()), float(np.sqrt(np.mean(flat**2))), smallest, array.shape)


def _judge(name: str, seen: NDArray[Any], below: NDArray[Any], local: NDArray[Any], tolerance: Tolerance) -> Finding:
    own, drift = compare(seen, local), compare(seen, below)
    sizes = {"own": own.relative_l2, "channel": own.worst_channel, "drift": drift.relative_l2}
    if not (own.finite and drift.finite):
        # what was infinite in the float32 arithmetic already (a mask) is not this rung's doing
        same = np.array_equal(np.isfinite(seen), np.isfinite(local))
        return Finding(name, math.nan, math.nan, math.nan, "" if same else "finite")
    missed = next((what for what in ("own", "channel", "drift") if not sizes[what] <= getattr(tolerance, what)), "")
    channels, bad = _bad_channels(seen, local, tolerance.channel) if missed in ("own", "channel") else ((), 0)
    return Finding(
        name, own.relative_l2, own.worst_channel, drift.relative_l2, missed, channels, bad,
        seen.shape[-1] if seen.ndim else 1,
    )  # fmt: skip


def _bad_channels(seen: NDArray[Any], local: NDArray[Any], bound: float) -> tuple[tuple[int, ...], int]:
    """Channels (last axis) whose error is beyond `bound`, the worst first, and how many there are."""
    last = seen.shape[-1] if seen.ndim else 1
    wrong = np.square(seen.astype(np.float64) - local).reshape(-1, last).sum(0)
    size = np.square(local.astype(np.float64)).reshape(-1, last).sum(0).mean()
    shares = np.sqrt(wrong / size) if size else np.sqrt(wrong)
    bad = np.flatnonzero(shares > bound)
    named = bad[np.argsort(-shares[bad], kind="stable")][:MOST_NAMED]
    return tuple(int(channel) for channel in named), len(bad)


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
    steps = (step for slot in operation.slots if _module(slot) == module for step in slot_transforms(slot)[1])
    return math.prod(step.factor for step in steps if step.op == "scale")
