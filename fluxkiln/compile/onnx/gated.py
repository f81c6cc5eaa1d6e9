"""Products with weights that are multiplied by one row for all tokens: what a gate may take over from them."""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.quantize.schemes import Scheme

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Gated:
    """The sum of some products, which nothing reads but the multiplication by a row.

    Attributes:
        gate: that multiplication; row: its operand with one row.
        products: matmuls with slots, biases: slots of vectors that are added.
        values: all that lies between, products and sums.
    """

    gate: ir.Node
    row: ir.Value
    products: tuple[ir.Node, ...]
    biases: tuple[str, ...]
    values: tuple[ir.Value, ...]

    @property
    def slots(self) -> tuple[str, ...]:
        """The weights of the products."""
        return tuple(str(node.inputs[1].name) for node in self.products if node.inputs[1] is not None)


def find_gated(model: ir.Model, activations: Set[str]) -> Iterator[Gated]:
    """All such sums of a template, in the order of their gates."""
    slots = {value for value in model.graph.inputs if value.name not in activations}
    for gate in model.graph:
        for row, summed in both_orders(gate, "Mul"):
            if has_one_row(row) and (found := _products(summed, slots)):
                products, biases, values = found
                yield Gated(gate, row, tuple(products), tuple(biases), tuple(values))
                break


def gated_slots(template: Path, activations: Set[str], scheme: Scheme) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """The weights and the biases of each sum whose products are all in a scheme's codes."""
    import onnx_ir as ir

    found = [(one.slots, one.biases) for one in find_gated(ir.load(template), activations)]
    return [(slots, biases) for slots, biases in found if all(map(scheme.in_codes, slots))]


def both_orders(node: ir.Node | None, operation: str) -> list[tuple[ir.Value, ir.Value]]:
    """The two operands of such an operation, in both orders."""
    if node is None or node.op_type != operation:
        return []
    first, second = node.inputs
    return [(first, second), (second, first)] if first is not None and second is not None else []


def has_one_row(value: ir.Value) -> bool:
    """Whether a value is the same for all tokens."""
    return value.shape is not None and len(value.shape) > 1 and value.shape[-2] == 1


def _products(value: ir.Value, slots: Set[ir.Value]) -> tuple[list[ir.Node], list[str], list[ir.Value]] | None:
    """The matmuls with slots whose sum a value is, the slots added to them, and all values; None for other values."""
    node = value.producer()
    if node is None or len(value.uses()) != 1:
        return None
    if node.op_type == "MatMul" and node.inputs[1] in slots:
        return [node], [], [value]
    for first, second in both_orders(node, "Add"):
        found = _products(second, slots)
        if found and first in slots:
            return found[0], [*found[1], str(first.name)], [*found[2], value]
        if found and (others := _products(first, slots)):
            return [*others[0], *found[0]], [*others[1], *found[1]], [*others[2], *found[2], value]
    return None
