"""Which value of a template is the output of which of diffusers' modules, and how far it is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.export.graph import SEPARATOR, slot_transforms
from fluxkiln.verify.debug.bisect import Finding, Tolerance
from fluxkiln.verify.metrics import compare

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.values import Operation
    from fluxkiln.patches.leaves import Leaf


def match_leaves(
    leaves: Sequence[Leaf],
    operations: Sequence[Operation],
    seen: Mapping[str, NDArray[Any]],
    tolerance: Tolerance,
) -> list[Finding]:
    """A finding for every module whose output the template has as one value, in the order the modules ran.

    With weights of its own a module is the last operation that reads them; without any, the nearest value of its size.
    A factor that the template has in a weight instead of in the graph is put on the module's output.

    Args:
        seen: the template's values.
    """
    findings = []
    for leaf in leaves:
        output, value = leaf.output, _own_value(leaf, operations, seen)
        if value is None and not any(_module(slot) == leaf.name for op in operations for slot in op.slots):
            value = _nearest_value(leaf, seen)
        if value is None:
            continue
        operation = next(one for one in operations if one.output == value)
        output = output * _factor(leaf.name, operation)
        metrics = compare(seen[value].reshape(output.shape), output)
        size = metrics.relative_l2
        differs = (
            leaf.epsilon is not None
            and operation.epsilon is not None
            and abs(leaf.epsilon - operation.epsilon) > 1e-3 * leaf.epsilon
        )
        missed = "" if size <= tolerance.own else "own"
        bad = int(output.shape[-1]) if missed else 0
        findings.append(
            Finding(value, size, metrics.worst_channel, size, missed or "epsilon" * differs, (), bad, output.shape[-1])
        )
    return findings


def _module(slot: str) -> str:
    """`attn.to_q.weight__t` -> `attn.to_q`."""
    return slot.split(SEPARATOR)[0].rpartition(".")[0]


def _own_value(leaf: Leaf, operations: Sequence[Operation], seen: Mapping[str, NDArray[Any]]) -> str | None:
    """What the last operation that reads the module's weights makes, if that is all of its output."""
    own = [op for op in operations if any(_module(slot) == leaf.name for slot in op.slots)]
    if not own or own[-1].output not in seen or seen[own[-1].output].size != leaf.output.size:
        return None
    pieces = {step.op for slot in own[-1].slots for step in slot_transforms(slot)[1]}
    return None if "slice" in pieces else own[-1].output


def _nearest_value(leaf: Leaf, seen: Mapping[str, NDArray[Any]]) -> str | None:
    """The value nearest to what the module made, if any comes near at all."""
    distances = {
        name: compare(value.reshape(leaf.output.shape), leaf.output).relative_l2
        for name, value in seen.items()
        if value.size == leaf.output.size
    }
    best = min(distances, key=distances.__getitem__, default=None)
    return best if best is not None and distances[best] < 0.5 else None


def _factor(module: str, operation: Operation) -> float:
    """What the template multiplied the module's weight with."""
    factor = 1.0
    for slot in operation.slots:
        if _module(slot) == module:
            for step in slot_transforms(slot)[1]:
                factor *= step.factor if step.op == "scale" else 1.0
    return factor
