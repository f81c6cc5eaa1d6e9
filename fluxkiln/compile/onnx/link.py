"""Template and binding to a graph that ONNX Runtime runs: weights are byte ranges of safetensors files, read in place.

ONNX Runtime's CPU kernels have no bfloat16 arithmetic, so a 16-bit weight is cast to float32 right before its use.
Transposes, slices and factors of a weight (the derived slots of an `onnx17` template) are nodes on the tensor as it is
stored, so no byte is copied for them. Quantized schemes put codes, scales, zero points and the few other weights of a
part into one file beside its graph; the checkpoint is not needed to run them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.compile.onnx.external_data import Sidecar, external_range, in_place_tensor
from fluxkiln.compile.onnx.norms import precise_group_norms
from fluxkiln.compile.onnx.products import CONTRIB, packed_matmul, replace_nodes
from fluxkiln.errors import CompileError, IntegrityError
from fluxkiln.quantize.schemes import Scheme, check_groups
from fluxkiln.types import Binding, SlotBinding, Template, TensorRef, TensorSpec

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

    from fluxkiln.quantize.side_tensors import PackerOf
    from fluxkiln.types import WeightReader

# operations that move a weight without computing: done before the cast, so that only what they keep is cast
_MOVES = ("Gather", "Slice")


@dataclass(frozen=True, slots=True)
class LinkedGraph:
    """A part's graph, an `onnx.ModelProto`, with its weights as initializers that lie in other files.

    `in_place` has the checkpoint's tensor that each is; the others are in the sidecar, `copied` has their bytes.
    """

    model: Any
    in_place: Mapping[str, str]
    copied: Mapping[str, int]


def link_weights(
    template: Template,
    binding: Binding,
    refs: Mapping[str, TensorRef],
    read_weight: WeightReader,
    scheme: Scheme,
    target: Path,
    packer_of: PackerOf | None = None,
) -> Path:
    """Write `target` as `link_graph` makes it.

    Without quantization no weight byte is written; with it, everything goes to `sidecar_path(target, scheme)`.
    """
    sidecar = Sidecar(sidecar_path(target, scheme))
    model = link_graph(template, binding, refs, read_weight, scheme, sidecar, packer_of).model
    target.write_bytes(model.SerializeToString(deterministic=True))
    return target


def link_graph(
    template: Template,
    binding: Binding,
    refs: Mapping[str, TensorRef],
    read_weight: WeightReader,
    scheme: Scheme,
    sidecar: Sidecar,
    packer_of: PackerOf | None = None,
) -> LinkedGraph:
    """The template with every slot turned into an initializer that lies in another file.

    Args:
        template: of format `onnx23`, or `onnx17` where nothing is quantized.
        refs: the tensors that the binding names. ONNX Runtime opens files in or below the graph's own folder only, so
            theirs must lie there, as files or hard links.
        read_weight: slot -> weight in torch's layout, for what cannot be read in place.
        scheme: its weight bits and group size; the arithmetic is float32 in any case.
        sidecar: takes weights that the checkpoint has not got in the graph's form; the graph is for its folder.
        packer_of: slot and input channels -> what packs them; the scheme's own, uncalibrated, by default.

    Raises:
        CompileError: no such template can be linked, the binding is for another kind, or a weight cannot be mapped.
        SchemeError: the group size does not divide a weight.
    """
    import onnx

    slots = {slot.slot: slot for slot in binding.slots}
    formats = ("onnx23",) if scheme.weight_bits else ("onnx23", "onnx17")
    if template.format not in formats:
        raise CompileError(
            f"a template of format {template.format} cannot be linked with {scheme.name} weights, only "
            f"{' and '.join(formats)}; export the kind {template.kind} in that format"
        )
    if slots.keys() != {spec.name for spec in template.slots}:
        raise CompileError(
            f"part {binding.part}: its binding does not fit the {template.format} template of kind {template.kind}; "
            f"bind it to the {template.format} template of its own kind"
        )
    model = onnx.load(template.path)
    precise_group_norms(model)
    graph = model.graph
    shapes = {spec.name: spec.shape for spec in template.slots}
    activations = [value for value in graph.input if value.name not in shapes]
    stored = {} if scheme.weight_bits else _expand_derived(graph, slots, shapes, refs)
    matmuls = find_matmuls(graph, shapes)
    replaced = {output: [_fused(matmul)] for output, matmul in matmuls.items()}
    if scheme.weight_bits:
        coded = {output: matmul for output, matmul in matmuls.items() if not scheme.keeps(matmul.slot)}
        replaced |= _quantized(coded, scheme, read_weight, sidecar, packer_of)
    replace_nodes(graph, [new for node in graph.node for new in replaced.get(node.output[0], [node])])
    used = {name for node in graph.node for name in node.input}
    in_place = {name: source for name, source in stored.items() if name in used}
    tensors = {name: in_place_tensor(name, refs[source], sidecar.path.parent) for name, source in in_place.items()}
    for name in (name for name in shapes if name in used and name not in tensors):
        sidecar.append(name, read_weight(name))
    written = sidecar.take()
    tensors |= written
    for name in (name for name in shapes if name in tensors):
        if tuple(tensors[name].dims) != shapes[name]:
            raise CompileError(
                f"slot {name} of part {binding.part} has shape {list(shapes[name])}, the weight bound to it has "
                f"{list(tensors[name].dims)}; bind the part again"
            )
    replace_nodes(graph, _with_casts(graph.node, tensors), tensors.values())
    graph.ClearField("input")
    graph.input.extend(activations)
    model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output):
        item.ClearField("metadata_props")  # the exporter's notes, source paths of this machine among them
    return LinkedGraph(model, in_place, {name: external_range(tensor)[2] for name, tensor in written.items()})


def sidecar_path(graph: Path, scheme: Scheme) -> Path:
    """Where `link_weights` puts weights that the checkpoint has not got in the graph's form; it may not exist."""
    return graph.with_suffix(f".q{scheme.weight_bits}.bin" if scheme.weight_bits else ".bin")


def external_files(graph: Path) -> dict[Path, int]:
    """The files that a graph reads its weights from, and how many bytes each must have at least.

    Raises:
        IntegrityError: `graph` is no ONNX file, or a tensor in it lies nowhere.
    """
    import onnx

    needed: dict[Path, int] = defaultdict(int)
    for tensor in _tensors(_load(graph)):
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            try:
                location, offset, length = external_range(tensor)
            except (KeyError, ValueError) as error:
                raise IntegrityError(f"{graph}: {tensor.name!r} lies nowhere ({error}); build it again") from error
            needed[graph.parent / location] = max(needed[graph.parent / location], offset + length)
    return dict(needed)


def _load(graph: Path) -> ModelProto:
    import onnx
    from google.protobuf.message import DecodeError

    try:
        return onnx.load(graph, load_external_data=False)
    except DecodeError as error:
        raise IntegrityError(f"{graph} is no ONNX graph ({error}); build it again") from error


def _tensors(message: Any) -> Iterator[TensorProto]:
    """All tensors of a graph: those of its nodes' attributes and of functions may lie in files as well."""
    if message.DESCRIPTOR.name == "TensorProto":
        yield message
        return
    for described, value in message.ListFields():
        if described.type == described.TYPE_MESSAGE:
            for one in value if described.is_repeated else [value]:
                yield from _tensors(one)


def read_interface(graph: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a graph; IntegrityError: no ONNX file, or a shape in it is not static."""
    import onnx

    def spec(value: Any) -> TensorSpec:
        tensor = value.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
        return TensorSpec(value.name, tuple(dim.dim_value for dim in tensor.shape.dim), dtype)

    found = _load(graph).graph
    try:
        return tuple(map(spec, found.input)), tuple(map(spec, found.output))
    except KeyError as error:
        raise IntegrityError(f"{graph} has an input or output of the unknown type {error}; build it again") from error


def _expand_derived(
    graph: Any, slots: Mapping[str, SlotBinding], shapes: dict[str, tuple[int, ...]], refs: Mapping[str, TensorRef]
) -> dict[str, str]:
    """Put what bindings do to weights into the graph, so that all of them are read as the checkpoint stores them.

    `shapes` gets the whole tensors and loses the slots that are computed now. Returned are initializers with their
    tensors; a slot that is joined from several is not among them.
    """
    from onnx.helper import make_node
    from onnx.numpy_helper import from_array

    stored = {name: slot.sources[0] for name, slot in slots.items() if not slot.transforms and len(slot.sources) == 1}
    names = {source: name for name, source in stored.items()}
    made: dict[str, list[NodeProto]] = {}
    for name, slot in slots.items():
        if name in stored or any(step.op == "concat" for step in slot.transforms):
            continue
        (source,) = slot.sources
        if source not in names:
            # named after the slot, not after the tensor: parts of a kind stay equal
            names[source] = f"{name}__source"
            stored[names[source]] = source
            shapes[names[source]] = refs[source].shape
        value, nodes = names[source], []
        for index, step in enumerate(slot.transforms):
            result = name if index == len(slot.transforms) - 1 else f"{name}__{index}"
            if step.op == "transpose":
                nodes.append(make_node("Transpose", [value], [result], perm=[1, 0]))
            elif step.op == "slice":
                numbers = {"start": step.start, "stop": step.stop, "axis": step.dim, "step": 1}
                constants = [from_array(np.array([number]), f"{result}__{key}") for key, number in numbers.items()]
                graph.initializer.extend(constants)
                nodes.append(make_node("Slice", [value, *(tensor.name for tensor in constants)], [result]))
            else:
                graph.initializer.append(from_array(np.array(step.factor, np.float32), f"{result}__factor"))
                nodes.append(make_node("Mul", [value, f"{result}__factor"], [result]))
            value = result
        made[name] = nodes
        del shapes[name]
    # right before their first use, where a cast weight is held for a short time only
    nodes = []
    for node in graph.node:
        for name in node.input:
            nodes += made.pop(name, [])
        nodes.append(node)
    graph.ClearField("node")
    graph.node.extend(nodes)
    return stored


@dataclass(frozen=True, slots=True)
class _MatMul:
    """A node that computes `x @ weight.T` (+ bias), `weight` being a slot [O, I] or a region of one."""

    node: NodeProto
    slot: str
    weight: str
    region: tuple[slice, slice] = (slice(None), slice(None))


def find_matmuls(graph: Any, slots: Iterable[str]) -> dict[str, _MatMul]:
    """All products with a slot, by the name of their output."""
    from onnx.numpy_helper import to_array

    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        if node.op_type not in ("MatMul", "Gemm"):
            continue
        weight = node.input[1]
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        if not transposed and weight in makers and makers[weight].op_type == "Transpose":
            weight, transposed = makers[weight].input[0], True
        if transposed and weight in slots:
            found[node.output[0]] = _MatMul(node, weight, weight)
        elif transposed and weight in makers and makers[weight].op_type == "Slice" and makers[weight].input[0] in slots:
            slot, *bounds = makers[weight].input
            start, stop, axis, step = (int(to_array(constants[name]).reshape(())) for name in bounds)
            cut = slice(start, stop, step)
            found[node.output[0]] = _MatMul(node, slot, weight, (slice(None), cut) if axis else (cut, slice(None)))
    return found


def _fused(matmul: _MatMul) -> NodeProto:
    """MatMul(x, Transpose(W)) -> FusedMatMul(x, W, transB): W is not copied on every call.

    Measured at [1536, 3072] x [12288, 3072], one thread: 0.63 s instead of 0.75 s, and one copy of W less in memory.
    Gemm between two Reshapes takes as long.
    """
    from onnx.helper import make_node

    if matmul.node.op_type == "Gemm":
        return matmul.node
    inputs = [matmul.node.input[0], matmul.weight]
    return make_node("FusedMatMul", inputs, matmul.node.output, matmul.node.name, domain=CONTRIB, transB=1)


def _quantized(
    matmuls: Mapping[str, _MatMul],
    scheme: Scheme,
    read_weight: WeightReader,
    sidecar: Sidecar,
    packer_of: PackerOf | None,
) -> dict[str, list[NodeProto]]:
    """MatMulNBits for every product, by the name of its output; each slot is read once."""
    from fluxkiln.quantize.rounders import plain_packer

    packer_of = packer_of or plain_packer(scheme)
    by_slot: dict[str, dict[str, _MatMul]] = defaultdict(dict)
    for output, matmul in matmuls.items():
        by_slot[matmul.slot][output] = matmul
    nodes = {}
    for slot, group in by_slot.items():
        weight = read_weight(slot)
        for index, (output, matmul) in enumerate(group.items()):
            part = weight[matmul.region]
            check_groups(scheme, slot, part.shape[1])
            start, stop, _ = matmul.region[1].indices(weight.shape[1])
            packed = packer_of(slot, (start, stop))(part)
            nodes[output] = packed_matmul(matmul.node, packed, scheme, sidecar, f"{slot}__{index}")
    return nodes


def _with_casts(nodes: Iterable[NodeProto], tensors: Mapping[str, TensorProto]) -> Iterator[NodeProto]:
    """The nodes with every 16-bit weight cast to float32 just before its first use, or after it was moved."""
    import onnx

    halves = (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)
    narrow = {name for name, tensor in tensors.items() if tensor.data_type in halves}
    cast: set[str] = set()

    def make_cast(source: str, result: str) -> NodeProto:
        return onnx.helper.make_node("Cast", [source], [result], to=onnx.TensorProto.FLOAT)

    for node in nodes:
        if node.op_type in _MOVES and node.input[0] in narrow:
            result = node.output[0]
            node.output[0] = f"{result}__stored"
            yield node
            yield make_cast(node.output[0], result)
            continue
        for index, name in enumerate(node.input):
            if name in narrow:
                if name not in cast:
                    cast.add(name)
                    yield make_cast(name, f"{name}__float32")
                node.input[index] = f"{name}__float32"
        yield node
