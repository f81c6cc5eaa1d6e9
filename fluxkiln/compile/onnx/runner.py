"""Templates run by ONNX Runtime with their weights fed like activations: one part's in memory at a time, none written.

A session is one of a template, so it serves every part of a kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.onnx.norms import precise_group_norms
from fluxkiln.compile.onnx.products import CONTRIB, replace_nodes
from fluxkiln.compile.onnx.session import make_session, run_session
from fluxkiln.errors import CompileError
from fluxkiln.types import TRANSPOSED, Template, WeightReader

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# elements of the scores held at once, and as many after the softmax: one head of FLUX.1 at 1024x1024
MOST_SCORES = 25_000_000
# a template's graph changed before it is run
Rewrite = Callable[["ModelProto"], None]


@dataclass(frozen=True, slots=True)
class Filling:
    """What makes a part of a template: the template, and what reads a slot's weight in torch's layout, any float."""

    template: Template
    read_weight: WeightReader


class TemplateRunner:
    """Runs parts in float32 by feeding templates. The weights of the last `keep` parts stay.

    Args:
        fill: part -> its filling; called when its weights are needed.
        rewrite: what is done to a template's graph first.
        threads: for one operation; 0 leaves it to ONNX Runtime.
    """

    def __init__(
        self, fill: Callable[[str], Filling], *, rewrite: Rewrite | None = None, threads: int = 0, keep: int = 1
    ) -> None:
        self.fill = fill
        self.rewrite = rewrite
        self.threads = threads
        self.keep = keep
        self._sessions: dict[Path, tuple[Any, frozenset[str]]] = {}
        self._loaded: dict[str, tuple[Any, dict[str, NDArray[np.float32]]]] = {}

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32.

        Raises:
            CompileError: an input is missing, unknown or of another shape, a weight has another shape than its slot,
                or the run failed. Whatever `fill` raises.
        """
        if part not in self._loaded:
            while len(self._loaded) >= self.keep:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[part] = self._load(part, self.fill(part))
        session, weights = self._loaded[part]
        return run_session(session, part, inputs, weights)

    def close(self) -> None:
        """Drop the weights; the runner can be used again."""
        self._loaded.clear()

    def _load(self, part: str, filling: Filling) -> tuple[Any, dict[str, NDArray[np.float32]]]:
        """The session of a part's template, and its weights."""
        template = filling.template.path
        if template not in self._sessions:
            model, transposed = weights_as_inputs(template)
            if self.rewrite is not None:
                self.rewrite(model)
            session = make_session(model.SerializeToString(), f"template {template}", threads=self.threads)
            self._sessions[template] = session, transposed
        session, transposed = self._sessions[template]
        shapes = {spec.name: tuple(spec.shape) for spec in session.get_inputs()}
        weights = {}
        for slot in (spec.name for spec in filling.template.slots):
            weight = filling.read_weight(slot)
            weights[slot] = np.ascontiguousarray(weight.T if slot in transposed else weight, np.float32)
            if shapes[slot] != weights[slot].shape:
                raise CompileError(
                    f"slot {slot} of part {part} takes {list(shapes[slot])}, the weight bound to it has "
                    f"{list(weights[slot].shape)}; bind the part again"
                )
        return session, weights


def weights_as_inputs(template: Path) -> tuple[ModelProto, frozenset[str]]:
    """The graph of a template whose slots are inputs, and the slots that it takes transposed.

    Every product with a transposed matrix is one operation on the matrix itself.

    Slots that the template has transposed and multiplies with are taken as torch has them: nobody copies a matrix to
    transpose it.
    """
    import onnx
    from onnx.helper import make_node, make_opsetid

    model = onnx.load(template)
    precise_group_norms(model)
    graph = model.graph
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    transposed = {value.name for value in graph.input if value.name.endswith(TRANSPOSED)}
    turned = {
        name
        for name in transposed
        if all(node.op_type == "MatMul" and node.input[1] == name for node in readers.get(name, ()))
    }
    nodes = []
    for node in graph.node:
        matrix = node.input[1] if node.op_type == "MatMul" else ""
        maker = makers.get(matrix)
        if matrix in turned:
            source = matrix
        elif maker is not None and maker.op_type == "Transpose" and [1, 0] in [[*one.ints] for one in maker.attribute]:
            source = maker.input[0]
        else:
            nodes.append(node)
            continue
        inputs = [node.input[0], source]
        nodes.append(make_node("FusedMatMul", inputs, node.output, node.name, domain=CONTRIB, transB=1))
    replace_nodes(graph, nodes)
    for value in graph.input:
        if value.name in turned:
            rows, columns = value.type.tensor_type.shape.dim
            rows.dim_value, columns.dim_value = columns.dim_value, rows.dim_value
    model.opset_import.append(make_opsetid(CONTRIB, 1))
    return model, frozenset(transposed - turned)


def attention_by_heads(model: ModelProto, most_scores: int = MOST_SCORES) -> None:
    """Have `model` compute softmax(query @ key) @ value for some heads at a time, where there are too many scores.

    At 1024x1024 with 512 tokens the scores of a block are 2 GB, and 2 GB again after the softmax.

    Args:
        model: with the shapes of its values, as templates have them; changed in place.
        most_scores: elements of one group's scores, where the number of heads allows.
    """
    from onnx.helper import make_node

    graph = model.graph
    shapes = {value.name: [axis.dim_value for axis in value.type.tensor_type.shape.dim] for value in graph.value_info}
    makers = {output: node for node in graph.node for output in node.output}
    nodes = list(graph.node)
    for softmax in [node for node in graph.node if node.op_type == "Softmax"]:
        scores = makers.get(softmax.input[0])
        readers = [node for node in nodes if softmax.output[0] in node.input]
        shape = shapes.get(softmax.input[0], [])
        multiplied = scores is not None and scores.op_type == "MatMul" and [n.op_type for n in readers] == ["MatMul"]
        if scores is None or not multiplied or len(shape) != 4:
            continue
        heads, size = shape[1], math.prod(shape)
        groups = next((n for n in range(1, heads) if heads % n == 0 and size <= n * most_scores), heads)
        if groups == 1:
            continue
        (attended,) = readers
        sources = [*scores.input, attended.input[1]]
        names = [[f"{softmax.output[0]}_{place}_{group}" for group in range(groups)] for place in ("q", "k", "v")]
        made = [make_node("Split", [source], into, axis=1) for source, into in zip(sources, names, strict=True)]
        outputs = []
        for query, key, value in zip(*names, strict=True):
            parts = [f"{query}_{step}" for step in ("scores", "weights", "out")]
            made.append(make_node("MatMul", [query, key], parts[:1]))
            made.append(make_node("Softmax", parts[:1], parts[1:2], axis=3))
            made.append(make_node("MatMul", [parts[1], value], parts[2:]))
            outputs += parts[2:]
        made.append(make_node("Concat", outputs, attended.output, axis=1))
        place = nodes.index(attended)
        nodes[place : place + 1] = made
    replace_nodes(graph, nodes)
