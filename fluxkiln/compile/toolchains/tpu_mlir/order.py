"""The order in which the nodes of a filled graph stand, which for blocks is the order in which the chip runs them.

TPU-MLIR keeps neighbours in local memory when it can treat them as one group: LayerNorm, scale and shift then take one
pass over the tokens instead of two. It sorts the operations before it forms groups, and its order separates what
belongs together: what a block does with its modulation alone ends up between the norm and the scale. For blocks the
sorting is therefore switched off (`compiler.py`), and the statements of a model's blocks stand as the chip is to
execute them.
"""

from __future__ import annotations

from collections.abc import Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

# inputs with a row per token: what depends on none of them is small
TOKEN_INPUTS = frozenset({"hidden_states", "encoder_hidden_states"})


def small_work_first(model: ir.Model, tokens: Set[str] = TOKEN_INPUTS) -> None:
    """Move all nodes that no input of `tokens` reaches in front of the others; both keep their order."""
    reached = {id(value) for value in model.graph.inputs if str(value.name) in tokens}
    first: list[ir.Node] = []
    last: list[ir.Node] = []
    for node in model.graph:
        depends = any(id(value) in reached for value in node.inputs if value is not None)
        (last if depends else first).append(node)
        if depends:
            reached.update(id(value) for value in node.outputs)
    model.graph.remove(last)
    model.graph.extend(last)
