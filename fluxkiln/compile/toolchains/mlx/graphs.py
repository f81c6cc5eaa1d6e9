"""What the kinds of a bundle compute, in one document beside files that have weights alone: `generate` has MLX do it.

A graph is its ONNX template's: inputs, weights, constants, operations in their order. Whole numbers of it that go with
the text tokens have what one token more adds to them, so that a prompt can be run without padding.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import make_template
from fluxkiln.documents import DocumentLimits, read_object_file
from fluxkiln.errors import CompileError, IntegrityError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.types import TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto

GRAPHS_FILE = "host/graphs.json"
MOST_PLACES = 1 << 24  # of a constant
GRAPH_LIMITS = DocumentLimits(nbytes=32 << 20, entries=2_000_000)


class Constant(TypedDict):
    """A number, or an array, of one value all over or of as many as it has places; some with `by_token`, as many."""

    dtype: str
    shape: list[int]
    values: list[float | int | bool]
    by_token: NotRequired[list[int]]


class GraphInput(TypedDict):
    """An activation, and what one text token more adds to each of its axes."""

    name: str
    shape: list[int]
    by_token: list[int]


class GraphOperation(TypedDict):
    """An operation of ONNX: its type, the names of what it takes (empty for nothing) and gives, and how."""

    type: str
    inputs: list[str]
    outputs: list[str]
    how: dict[str, int | float | str | list[int]]


class Graph(TypedDict):
    """What a kind computes; `slots` are the names and shapes of its weights."""

    inputs: list[GraphInput]
    outputs: list[str]
    slots: dict[str, list[int]]
    constants: dict[str, Constant]
    operations: list[GraphOperation]


class Graphs(TypedDict):
    """The document; `tokens` are the text tokens that its numbers are for."""

    tokens: int
    kinds: dict[str, Graph]


def write_graphs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, path: Path) -> Path:
    """Write the document of a plan's kinds to `path`; errors as `make_template`."""
    kinds = {kind: _graph(checkpoint, piece, cache, kind) for piece, kind in plan.each_kind()}
    path.write_text(json.dumps({"tokens": plan.shapes.tokens, "kinds": kinds}), encoding="utf-8")
    return path


def read_graphs(path: Path) -> Graphs:
    """The document; IntegrityError for another one, and for a constant that has not the places that it says."""
    found: Any = read_object_file(path, Graphs, limits=GRAPH_LIMITS)
    for kind, graph in found["kinds"].items():
        for name, one in graph["constants"].items():
            places, counts = math.prod(one["shape"]), {len(one["values"]), len(one.get("by_token", one["values"]))}
            fitting = [{places}] if "by_token" in one else [{places}, {min(places, 1)}]
            if min(one["shape"], default=0) < 0 or places > MOST_PLACES or counts not in fitting:
                raise IntegrityError(
                    f"{path}: constant {name!r} of {kind} has shape {one['shape']} and {sorted(counts)} values; it has "
                    f"one, or as many as it has places, {MOST_PLACES} at most; build or fetch the bundle again"
                )
    return found  # type: ignore[no-any-return]


def _graph(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, kind: str) -> Graph:
    import onnx

    shapes, model = plan.shapes, checkpoint.model
    fewer = replace(plan, shapes=replace(shapes, tokens=max(1, shapes.tokens // 2)))
    specs, less = (model.part_inputs(kind, checkpoint.configs, one.shapes) for one in (plan, fewer))
    template = make_template(checkpoint, plan, cache, kind, plan.target.graph_format)
    here = there = onnx.load(template.path)
    if [spec.shape for spec in specs] != [spec.shape for spec in less]:
        there = onnx.load(make_template(checkpoint, fewer, cache, kind, plan.target.graph_format).path)
    (operations, arrays), (other, fewer_arrays) = _read(here), _read(there)
    if operations != other:
        raise CompileError(f"{kind} computes something else with fewer text tokens; it cannot be written for MLX")
    tokens = shapes.tokens - fewer.shapes.tokens
    return {
        "inputs": list(_inputs(specs, less, tokens)),
        "outputs": [spec.name for spec in template.outputs],
        "slots": {spec.name: list(spec.shape) for spec in template.slots},
        "constants": {name: _constant(array, fewer_arrays[name], tokens) for name, array in arrays.items()},
        "operations": operations,
    }


def _inputs(specs: Sequence[TensorSpec], less: Sequence[TensorSpec], tokens: int) -> Iterator[GraphInput]:
    for spec, other in zip(specs, less, strict=True):
        added = [(size - before) // max(1, tokens) for size, before in zip(spec.shape, other.shape, strict=True)]
        yield {"name": spec.name, "shape": list(spec.shape), "by_token": added}


def _constant(array: Any, fewer: Any, tokens: int) -> Constant:
    values = array.reshape(-1)
    if len(values) and (values == values[0]).all():
        values = values[:1]
    made: Constant = {"dtype": str(array.dtype), "shape": list(array.shape), "values": values.tolist()}
    if (array != fewer).any():
        made["values"] = array.reshape(-1).tolist()
        made["by_token"] = ((array - fewer) // tokens).reshape(-1).tolist()
    return made


def _read(model: ModelProto) -> tuple[list[GraphOperation], dict[str, Any]]:
    """The operations of a graph, and its constants, each by a name of its own wherever it is used.

    Exporters number what they make, and keep one of constants that happen to be equal: at one size, not at another.
    """
    from onnx import numpy_helper
    from onnx.helper import get_attribute_value

    stored = {one.name: numpy_helper.to_array(one) for one in model.graph.initializer}
    known = {one.name: one.name for one in (*model.graph.input, *model.graph.output)} | {"": ""}
    operations, constants = list[GraphOperation](), dict[str, Any]()
    for node in model.graph.node:
        taken = []
        for name in node.input:
            if name in stored:
                taken.append(f"constant {len(constants)}")
                constants[taken[-1]] = stored[name]
            else:
                taken.append(known[name])
        given = [known.setdefault(name, f"value {len(known)}") for name in node.output]
        how = {one.name: get_attribute_value(one) for one in node.attribute}
        plain = {name: value.decode() if isinstance(value, bytes) else value for name, value in how.items()}
        operations.append({"type": node.op_type, "inputs": taken, "outputs": given, "how": plain})
    return operations, constants
