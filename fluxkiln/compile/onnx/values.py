"""What graphs compute on the way: the operations of a template and the values they make, there and once linked."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.onnx.products import replace_nodes
from fluxkiln.compile.onnx.session import make_session
from fluxkiln.types import TRANSPOSED, WeightReader
from fluxkiln.verify.findings import Operation, Values

if TYPE_CHECKING:
    from onnx import ModelProto

# results that are sizes, not numbers that flow through a part
_SHAPES = frozenset({"Shape", "Constant", "ConstantOfShape"})


def list_operations(template: Path, slots: Collection[str]) -> tuple[Operation, ...]:
    """The operations of a template that compute with activations, in the order they run."""
    model = _load(template)
    constants = {value.name for value in model.graph.initializer}
    known = {value.name for value in model.graph.input} - set(slots) - constants
    held = {slot: (slot,) for slot in slots}  # and what is made of slots alone
    found = []
    for node in model.graph.node:
        inputs = tuple(name for name in node.input if name in known)
        read = tuple(dict.fromkeys(slot for name in node.input for slot in held.get(name, ())))
        if node.op_type in _SHAPES or not inputs:
            held |= dict.fromkeys(node.output, read)
            continue
        known |= set(node.output)
        epsilon = next((float(attribute.f) for attribute in node.attribute if attribute.name == "epsilon"), None)
        found.append(Operation(node.output[0], node.op_type, inputs, read, epsilon))
    return tuple(found)


class SlotWeights(Mapping[str, NDArray[np.float32]]):
    """The weights of all slots as a template takes them, float32; each is read when it is asked for, and not kept."""

    def __init__(self, slots: Collection[str], read_weight: WeightReader) -> None:
        self._slots, self._read_weight = tuple(slots), read_weight

    def __getitem__(self, slot: str) -> NDArray[np.float32]:
        if slot not in self._slots:
            raise KeyError(slot)
        weight = self._read_weight(slot)
        return np.ascontiguousarray(weight.T if slot.endswith(TRANSPOSED) else weight, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)


def quantized_regions(template: Path, slots: Collection[str]) -> dict[str, list[tuple[slice, slice]]]:
    """Slot -> the regions of its weight that a linked graph stores in codes, each a product of its own."""
    from fluxkiln.compile.onnx.link import find_matmuls

    found: dict[str, list[tuple[slice, slice]]] = {}
    for matmul in find_matmuls(_load(template).graph, slots).values():
        found.setdefault(matmul.slot, []).append(matmul.region)
    return found


def template_values(template: Path, inputs: Values, weights: Values, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """What a template computes on the way: its values `names`; CompileError where ONNX Runtime refuses the graph."""
    model = _load(template)
    kept = [name for name in names if name in _made(model)]
    return _run(model, inputs, weights, kept, f"template {template}")


def local_values(
    template: Path, seen: Values, weights: Values, names: Collection[str] | None = None
) -> dict[str, NDArray[Any]]:
    """What the template's operations make of values seen elsewhere: for each, float32 arithmetic on the nearest ones.

    An error that came along with the operands is on both sides then, and what is left is the operation's own.

    Args:
        seen: the part's inputs, and values of a compiled form in the template's shapes.
        names: the values that are wanted, all by default; only what they are made of is read and computed.

    Returns:
        value -> what it should be, for the wanted values in `seen` but the inputs.
    """
    model = _load(template)
    made = _made(model)
    fed = [name for name in made if name in seen]
    for node in model.graph.node:
        for place, name in enumerate(node.output):
            if name in fed:
                node.output[place] = _own(name)
    types = {value.name: value for value in [*model.graph.value_info, *model.graph.output]}
    model.graph.input.extend(types[name] for name in fed)
    wanted = [name for name in fed if names is None or name in names]
    if not wanted:
        return {}
    outputs = {_own(name): types[name] for name in wanted}
    results = _run(model, seen, weights, list(outputs), f"template {template}", renamed=outputs)
    return {name: results[_own(name)] for name in wanted}


def graph_values(graph: Path, inputs: Values, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """What a linked graph of ONNX Runtime computes on the way: those of the values `names` that it has."""
    import onnx

    model = onnx.load(graph, load_external_data=False)
    made = _made(model)
    known = {value.name for value in model.graph.output}
    shown = [name for name in names if name in made]
    for name in shown:
        if name not in known:
            model.graph.output.append(onnx.ValueInfoProto(name=name))
    beside = graph.with_name(f"{graph.stem}.looked.onnx")
    beside.write_bytes(model.SerializeToString())
    try:
        session = make_session(beside, str(graph))
        given = {spec.name: inputs[spec.name] for spec in session.get_inputs()}
        return dict(zip(shown, session.run(shown, given), strict=True))
    finally:
        beside.unlink()


def _load(template: Path) -> ModelProto:
    import onnx

    return onnx.load(template)


def _made(model: ModelProto) -> list[str]:
    """Values with a known float type and shape, in the order they are made."""
    import onnx

    types = {value.name: value.type.tensor_type for value in [*model.graph.value_info, *model.graph.output]}
    floats = {name for name, type_ in types.items() if type_.elem_type == onnx.TensorProto.FLOAT}
    return [name for node in model.graph.node if node.op_type not in _SHAPES for name in node.output if name in floats]


def _own(name: str) -> str:
    return f"{name}/own"


def _run(
    model: ModelProto,
    inputs: Values,
    weights: Values,
    names: list[str],
    what: str,
    renamed: Mapping[str, Any] | None = None,
) -> dict[str, NDArray[Any]]:
    """The values `names`, made outputs of `model`; `renamed`: their types where they are called otherwise."""
    import onnx

    graph = model.graph
    types: dict[str, Any] = {value.name: value for value in [*graph.value_info, *graph.output]}
    types |= renamed or {}
    outputs = []
    for name in names:
        outputs.append(onnx.ValueInfoProto())
        outputs[-1].CopyFrom(types[name])
        outputs[-1].name = name
    graph.ClearField("output")
    graph.output.extend(outputs)
    graph.ClearField("value_info")
    replace_nodes(graph, graph.node)
    read = {name for node in graph.node for name in node.input}
    taken = [value for value in graph.input if value.name in read]
    graph.ClearField("input")
    graph.input.extend(taken)
    session = make_session(model.SerializeToString(), what)
    wanted = {spec.name: np.int64 if "int64" in spec.type else np.float32 for spec in session.get_inputs()}
    fed = {
        name: np.ascontiguousarray(inputs[name] if name in inputs else weights[name], dtype)
        for name, dtype in wanted.items()
    }
    return dict(zip(names, session.run(names, fed), strict=True))
