"""What happens to a traced graph before it is a template: constants folded, weight arithmetic moved into bindings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxkiln.errors import ExportError
from fluxkiln.types import TensorSpec, Transform

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_CONSTANT_BYTES = 1 << 20
SEPARATOR = "__"


def fold_constants(model: ir.Model) -> None:
    """Evaluate everything that depends on neither activations nor slots; both are graph inputs, so no weight moves."""
    import onnxscript.optimizer

    onnxscript.optimizer.optimize_ir(model, input_size_limit=4096, output_size_limit=MAX_CONSTANT_BYTES)
    # exporters note stack traces of this machine; a template's digest must not depend on where it was made
    model.metadata_props.clear()
    model.doc_string = None
    model.graph.metadata_props.clear()
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def set_static_shapes(model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
    """Give a graph traced with dynamic axes its static shapes; what was inferred from the traced size is forgotten."""
    import onnx_ir as ir

    for node in model.graph:
        for value in node.outputs:
            value.shape = None
    shapes = {spec.name: ir.Shape(spec.shape) for spec in (*inputs, *outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = shapes.get(str(value.name), value.shape)


def finish_graph(
    model: ir.Model, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """Fold constants and absorb transposes, slices and factors of weights into derived slots.

    A derived slot is called after its slot and the transforms in order, as `slot_transforms` reads them back:
    `proj_out.weight__s1.0.3072__t` is columns 0..3071 of proj_out.weight, transposed.

    Returns:
        The slots that the finished graph has, in graph order.
    """
    activations, values = {spec.name for spec in inputs}, model.graph.inputs
    fold_constants(model)
    _absorb(model, activations)
    fold_constants(model)
    values[:] = [value for value in values if value.name in activations or value.uses()]
    return tuple(TensorSpec(str(value.name), _static_shape(value)) for value in values if value.name not in activations)


def slot_transforms(slot: str) -> tuple[str, tuple[Transform, ...]]:
    """A template slot's name taken apart: the part's own slot and the transforms to apply to it in order."""
    base, *steps = slot.split(SEPARATOR)
    transforms = []
    for step in steps:
        if step == "t":
            transforms.append(Transform("transpose"))
        elif step.startswith("s"):
            dim, start, stop = (int(number) for number in step[1:].split("."))
            transforms.append(Transform("slice", dim=dim, start=start, stop=stop))
        elif step.startswith("f"):
            transforms.append(Transform("scale", factor=float.fromhex(step[1:].replace("_", "."))))
        else:
            raise ExportError(f"slot {slot!r}: {step!r} is no transform; t, sDIM.START.STOP and fFACTOR are")
    return base, tuple(transforms)


def check_template(
    model: ir.Model,
    opset: int,
    inputs: tuple[TensorSpec, ...],
    slots: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> None:
    """Raise ExportError unless the graph has this opset, these inputs and outputs, and no constant of weight size."""
    found = model.graph.opset_imports.get("")
    if found != opset:
        raise ExportError(f"the exporter wrote opset {found}, opset {opset} was asked for; install the pinned torch")
    names = [value.name for value in model.graph.inputs]
    wanted = [spec.name for spec in (*inputs, *slots)]
    if names != wanted:
        odd = sorted(set(map(str, names)) ^ set(wanted)) or ["their order"]
        raise ExportError(f"the traced graph's inputs differ from what the part declares: {', '.join(odd)}")
    if [value.name for value in model.graph.outputs] != [spec.name for spec in outputs]:
        raise ExportError(f"the traced graph's outputs are {[value.name for value in model.graph.outputs]}")
    for value in model.graph.initializers.values():
        size = value.const_value.nbytes if value.const_value is not None else 0
        if size > MAX_CONSTANT_BYTES:
            raise ExportError(f"constant {value.name} has {size} bytes: a template holds no weight data")


def _absorb(model: ir.Model, activations: set[str]) -> None:
    """Replace Transpose, Slice, Unsqueeze-free Mul-by-constant of a slot by a derived slot, until nothing is left."""
    import onnx_ir as ir

    graph = model.graph
    slots = {value.name: value for value in graph.inputs if value.name not in activations}
    changed = True
    while changed:
        changed = False
        for node in tuple(graph):
            step = _weight_step(node, {id(value) for value in slots.values()})
            if step is None:
                continue
            source, suffix = step
            name = f"{source.name}{SEPARATOR}{suffix}"
            result = node.outputs[0]
            derived = slots.get(name)
            if derived is None:
                derived = ir.Value(name=name, shape=result.shape, type=result.type or source.type)
                slots[name] = derived
                graph.inputs.append(derived)
            ir.convenience.replace_all_uses_with(result, derived)
            graph.remove(node, safe=True)
            changed = True


def _weight_step(node: ir.Node, slots: set[int]) -> tuple[ir.Value, str] | None:
    """The slot a node reads and the name of what it does to it, when that is all the node does."""
    value = node.inputs[0] if node.inputs else None
    if node.op_type == "Mul" and len(node.inputs) == 2:
        first, second = node.inputs
        for weight, other in ((first, second), (second, first)):
            if weight is None or other is None or id(weight) not in slots or other.const_value is None:
                continue
            numbers = other.const_value.numpy()
            if numbers.size == 1:
                return weight, "f" + float(numbers.reshape(())).hex().replace(".", "_")
        return None
    if value is None or id(value) not in slots:
        return None
    if node.op_type == "Transpose" and len(value.shape or ()) == 2:
        return value, "t"
    if node.op_type == "Slice":
        return _slice_step(node, value)
    return None


def _slice_step(node: ir.Node, value: ir.Value) -> tuple[ir.Value, str] | None:
    numbers = [
        None if part is None or part.const_value is None else part.const_value.numpy() for part in node.inputs[1:]
    ]
    if len(numbers) < 3 or any(part is None or part.size != 1 for part in numbers[:3]):
        return None
    start, stop, axis = (int(part.reshape(())) for part in numbers[:3] if part is not None)
    if len(numbers) > 3 and (numbers[3] is None or numbers[3].size != 1 or int(numbers[3].reshape(())) != 1):
        return None
    size = _static_shape(value)[axis]
    start, stop = (bound + size if bound < 0 else min(bound, size) for bound in (start, stop))
    return value, f"s{axis % len(_static_shape(value))}.{start}.{stop}"


def _static_shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static():
        raise ExportError(f"{value.name} has no static shape in the traced graph")
    return tuple(int(size) for size in value.shape.numpy())
