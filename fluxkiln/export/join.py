"""Products cut in two and summed, made one again: what cuts an MLP for one arithmetic is in the way of another.

A template has a feed-forward in two halves of its inner width (`patches`), since matmuls with codes of 16-bit
arithmetic take less time so. Where both operands are 8-bit integers one product of the whole width takes less. The
halves are found by their slots: two products with neighbouring columns of one matrix, whose inputs come from products
with neighbouring rows of another, by operations that take every channel for itself.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.types import Template, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

_CUT = re.compile(r"(?P<base>.+)__s(?P<dim>[01])\.(?P<start>\d+)\.(?P<stop>\d+)(?P<rest>(__t)?)")
_BY_CHANNEL = frozenset({"Add", "Mul", "Tanh", "Pow", "Div", "Erf"})


@dataclass(frozen=True, slots=True)
class _Half:
    """One half of a feed-forward: its products with slots, and the bias between them."""

    up: ir.Node
    bias: ir.Node
    down: ir.Node

    @property
    def slots(self) -> tuple[ir.Value, ...]:
        found = (self.up.inputs[1], _slot_of(self.bias), self.down.inputs[1])
        assert all(found)
        return tuple(value for value in found if value is not None)


def join_halves(template: Template, target: Path) -> Template:
    """Write `target`: the template with every feed-forward in one piece; its slots are those of both halves joined."""
    import onnx_ir as ir
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    model = ir.load(template.path)
    graph = model.graph
    joined: dict[str, TensorSpec] = {}
    gone: set[str] = set()
    for total in [node for node in graph if node.op_type == "Add"]:
        first, second = (_half(value) for value in total.inputs[:2])
        if first is None or second is None or (names := _joined(first, second)) is None:
            continue
        for value, other in zip(first.slots, second.slots, strict=True):
            name, shape = names[str(value.name)], _widened(value, other)
            joined[str(value.name)] = TensorSpec(name, shape)
            gone.add(str(other.name))
            value.name, value.shape = name, ir.Shape(shape)
        kept = total.inputs[0]
        assert kept is not None
        ir.convenience.replace_all_uses_with(total.outputs[0], kept)
        for node in _between(first):  # shapes of what is as wide as a half: they are found anew
            node.outputs[0].shape = ir.Shape([*_sizes(node.outputs[0])[:-1], 2 * _sizes(node.outputs[0])[-1]])
    RemoveUnusedNodesPass()(model)
    graph.inputs[:] = [value for value in graph.inputs if value.name not in gone]
    ir.save(model, target)
    digest = "sha256:" + hashlib.sha256(target.read_bytes()).hexdigest()
    slots = tuple(joined.get(spec.name, spec) for spec in template.slots if spec.name not in gone)
    return replace(template, path=target, digest=digest, slots=slots)


def _half(value: ir.Value | None) -> _Half | None:
    """The half whose product a value is, with or without a bias of its own behind it."""
    down = None if value is None else value.producer()
    if down is not None and down.op_type == "Add" and (slot := _slot_of(down)) is not None:
        other = next(one for one in down.inputs if one is not slot)
        down = None if other is None else other.producer()
    if down is None or down.op_type != "MatMul" or not _cut_of(down.inputs[1]):
        return None
    place = down.inputs[0]
    while place is not None and (node := place.producer()) is not None:
        slot = _slot_of(node) if node.op_type == "Add" else None
        source = next((one for one in node.inputs if one is not slot and not _is_constant(one)), None)
        up = None if source is None else source.producer()
        if slot is not None and up is not None and up.op_type == "MatMul" and _cut_of(up.inputs[1]):
            return _Half(up, node, down)
        if node.op_type not in _BY_CHANNEL:
            return None
        place = source
    return None


def _joined(first: _Half, second: _Half) -> dict[str, str] | None:
    """Slot of the first half -> what it is called with the second's; None unless they are halves of one."""
    if first.up.inputs[0] is not second.up.inputs[0]:
        return None
    names = {}
    for value, other, dim in zip(first.slots, second.slots, "001", strict=True):
        own, next_ = _cut_of(value), _cut_of(other)
        if own is None or next_ is None or own["stop"] != next_["start"] or own["dim"] != dim or next_["dim"] != dim:
            return None
        if (own["base"], own["rest"]) != (next_["base"], next_["rest"]):
            return None
        names[str(value.name)] = f"{own['base']}__s{dim}.{own['start']}.{next_['stop']}{own['rest']}"
    return names


def _between(half: _Half) -> list[ir.Node]:
    """The nodes from a half's first product to its second, without the second."""
    found, pending = [], [half.up]
    while pending:
        node = pending.pop()
        if node is half.down or node in found:
            continue
        found.append(node)
        pending += node.outputs[0].consumers()
    return found


def _widened(value: ir.Value, other: ir.Value) -> tuple[int, ...]:
    """The shape of two slots behind one another, along the axis in which they were cut."""
    cut = _cut_of(value)
    assert cut is not None
    axis = int(cut["dim"]) ^ bool(cut["rest"]) if len(_sizes(value)) == 2 else 0
    return tuple(a + b * (place == axis) for place, (a, b) in enumerate(zip(_sizes(value), _sizes(other), strict=True)))


def _cut_of(value: ir.Value | None) -> Mapping[str, str] | None:
    found = _CUT.fullmatch(str(value.name)) if value is not None and value.producer() is None else None
    return found.groupdict() if found else None


def _slot_of(node: ir.Node) -> ir.Value | None:
    """The vector of weights that is among a node's inputs."""
    for value in node.inputs:
        if value is not None and value.is_graph_input() and len(_sizes(value)) == 1:
            return value
    return None


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.const_value is not None or value.is_graph_input()


def _sizes(value: ir.Value) -> tuple[int, ...]:
    return () if value.shape is None else tuple(int(size) for size in value.shape.numpy())
