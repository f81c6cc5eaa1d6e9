"""A linked graph at another size: what two sizes' templates of a kind differ in, on the same ranges of files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fluxkiln.errors import CompileError

if TYPE_CHECKING:
    from onnx import GraphProto


def resize_graph(linked: Path, own: Path, other: Path, target: Path) -> Path:
    """Write `target`, beside `linked`: the graph that linking the template `other` would give, no weight read for it.

    Args:
        own: the template that `linked` was made of; other: that of the same kind at another size.

    Raises:
        CompileError: the two are not the same operations, so a weight could mean something else.
    """
    import onnx

    model, before, after = (onnx.load(path, load_external_data=False) for path in (linked, own, other))
    graph, old, new = model.graph, before.graph, after.graph
    places = {node.output[0]: node for node in graph.node}
    changed = [(one, its) for one, its in zip(old.node, new.node, strict=False) if one != its]
    if _operations(old) != _operations(new) or any(places.get(one.output[0]) != one for one, _ in changed):
        raise CompileError(
            f"{target.stem}: at this size the exporter gives other operations than at the first, so their weights "
            "cannot be shared; build this size by itself"
        )
    for one, its in changed:
        places[one.output[0]].CopyFrom(its)
    constants = {tensor.name for tensor in old.initializer}
    kept = [tensor for tensor in graph.initializer if tensor.name not in constants]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend([*kept, *new.initializer])
    for side in ("input", "output"):
        values = {value.name: value for value in getattr(new, side)}
        for value in getattr(graph, side):
            value.CopyFrom(values[value.name])
    target.write_bytes(model.SerializeToString(deterministic=True))
    return target


def _operations(graph: GraphProto) -> list[tuple[str, list[str], list[str]]]:
    """What is computed of what, whatever the constants are called: equal ones are one, at some sizes."""
    constants = {tensor.name for tensor in graph.initializer}
    return [
        (node.op_type, ["" if name in constants else name for name in node.input], list(node.output))
        for node in graph.node
    ]
