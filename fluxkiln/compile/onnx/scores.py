"""Products of queries and keys in a template, and the norms' weights that their sizes follow from."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True, slots=True)
class Scores:
    """A product that nothing reads but a softmax: its name, and slots of vectors that queries and keys are multiplied
    by behind their projections."""

    output: str
    norms: tuple[str, ...]


def find_scores(template: Path, activations: Set[str]) -> list[Scores]:
    """All of a template's, in the order of the graph."""
    import onnx_ir as ir

    model = ir.load(template)
    slots = {value for value in model.graph.inputs if value.name not in activations}
    products = [node for node in model.graph if node.op_type == "MatMul"]
    return [
        Scores(str(node.outputs[0].name), _vectors_behind(node, slots))
        for node in products
        if [reader.op_type for reader in node.outputs[0].consumers()] == ["Softmax"]
    ]


def _vectors_behind(product: ir.Node, slots: Set[ir.Value]) -> tuple[str, ...]:
    """The slots that what is multiplied was multiplied by itself, as far back as to products with matrices."""
    found: dict[str, None] = {}
    pending, seen = [product], set()
    while pending:
        node = pending.pop()
        operands = [one for one in node.inputs if one is not None and one not in seen]
        seen.update(operands)
        found |= {str(one.name): None for one in operands if node.op_type == "Mul" and one in slots}
        makers = [one.producer() for one in operands]
        pending += [maker for maker in makers if maker is not None and maker.op_type != "MatMul"]
    return tuple(sorted(found))
