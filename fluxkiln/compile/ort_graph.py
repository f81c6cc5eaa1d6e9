"""Template and binding to a graph that ONNX Runtime runs: weights are byte ranges of safetensors files, read in place.

ONNX Runtime's CPU kernels have no bfloat16 arithmetic, so a 16-bit weight is cast to float32 right before its use.
Quantized schemes put codes, scales, zero points and the few other weights of a part into one file beside its graph;
the checkpoint is not needed to run them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.artifacts.types import Binding, Template, TensorRef
from fluxkiln.compile.mould import WeightReader
from fluxkiln.errors import CompileError, IntegrityError
from fluxkiln.quantize.pack import PackedWeight, bf16_to_float32, pack_int4, pack_int8
from fluxkiln.quantize.schemes import Scheme, check_groups

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

CONTRIB = "com.microsoft"
ALIGNMENT = 64
# operations that move a weight without computing: done before the cast, so that only what they keep is cast
_MOVES = ("Gather", "Slice")
# safetensors' dtypes that ONNX Runtime reads in place, by ONNX's names
_READABLE: Mapping[str, str] = {"F32": "FLOAT", "BF16": "BFLOAT16", "F16": "FLOAT16"}
_STORABLE: Mapping[Any, str] = {
    np.dtype(np.float32): "FLOAT",
    np.dtype(ml_dtypes.bfloat16): "BFLOAT16",
    np.dtype(np.float16): "FLOAT16",
    np.dtype(np.uint8): "UINT8",
}


def link_weights(
    template: Template,
    binding: Binding,
    refs: Mapping[str, TensorRef],
    read_weight: WeightReader,
    scheme: Scheme,
    target: Path,
) -> Path:
    """Write `target`: the template with every slot turned into an initializer that lies in another file.

    Without quantization no weight byte is written; with it, everything goes to `sidecar_path(target, scheme)`.

    Args:
        template: of format `onnx23`.
        refs: the tensors that the binding names. ONNX Runtime opens files in or below the graph's own folder only, so
            theirs must lie there, as files or hard links.
        read_weight: slot -> weight in torch's layout, for what cannot be read in place.
        scheme: its weight bits and group size; the arithmetic is float32 in any case.
        target: an `.onnx` path.

    Raises:
        CompileError: the template is no `onnx23`, the binding is for another kind, or a weight cannot be read in place.
        SchemeError: the group size does not divide a weight.
    """
    import onnx

    shapes = {spec.name: spec.shape for spec in template.slots}
    slots = {slot.slot: slot for slot in binding.slots}
    if template.format != "onnx23" or set(slots) != set(shapes):
        raise CompileError(
            f"part {binding.part}: its binding does not fit the {template.format} template of kind {template.kind}; "
            "bind it to the onnx23 template of its own kind"
        )
    model = onnx.load(template.path)
    graph = model.graph
    sidecar = _Sidecar(sidecar_path(target, scheme))
    matmuls = _find_matmuls(graph, shapes)
    if scheme.weight_bits:
        replaced = _quantized(matmuls, scheme, read_weight, sidecar)
    else:
        replaced = {output: [_fused(matmul)] for output, matmul in matmuls.items()}
    nodes = [new for node in graph.node for new in replaced.get(node.output[0], [node])]
    nodes = _without_unused(nodes, {value.name for value in graph.output})
    used = {name for node in nodes for name in node.input}
    for name in (name for name in shapes if name in used):
        slot = slots[name]
        if scheme.weight_bits or len(slot.sources) > 1 or slot.transforms:
            sidecar.append(name, read_weight(name))
        else:
            sidecar.tensors[name] = _in_place(name, refs[slot.sources[0]], target)
        if tuple(sidecar.tensors[name].dims) != shapes[name]:
            raise CompileError(
                f"slot {name} of part {binding.part} has shape {list(shapes[name])}, the weight bound to it has "
                f"{list(sidecar.tensors[name].dims)}; bind the part again"
            )
    nodes = list(_with_casts(nodes, sidecar.tensors))
    graph.ClearField("node")
    graph.node.extend(nodes)
    activations = [value for value in graph.input if value.name not in shapes]
    graph.ClearField("input")
    graph.input.extend(activations)
    constants = [tensor for tensor in graph.initializer if tensor.name in used]
    graph.ClearField("initializer")
    graph.initializer.extend([*constants, *sidecar.tensors.values()])
    model.opset_import.append(onnx.helper.make_opsetid(CONTRIB, 1))
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output):
        item.ClearField("metadata_props")  # the exporter's notes, source paths of this machine among them
    target.write_bytes(model.SerializeToString(deterministic=True))
    return target


def sidecar_path(graph: Path, scheme: Scheme) -> Path:
    """Where `link_weights` puts weights that the checkpoint has not got in the graph's form; it may not exist."""
    return graph.with_suffix(f".q{scheme.weight_bits}.bin" if scheme.weight_bits else ".bin")


def external_files(graph: Path) -> dict[Path, int]:
    """The files that a graph reads its weights from, and how many bytes each must have at least.

    Raises:
        IntegrityError: `graph` is no ONNX file.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    needed: dict[Path, int] = defaultdict(int)
    try:
        tensors = onnx.load(graph, load_external_data=False).graph.initializer
    except DecodeError as error:
        raise IntegrityError(f"{graph} is no ONNX graph ({error}); build it again") from error
    for tensor in tensors:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            file = graph.parent / entries["location"]
            needed[file] = max(needed[file], int(entries.get("offset", 0)) + int(entries.get("length", 0)))
    return dict(needed)


@dataclass(frozen=True, slots=True)
class _MatMul:
    """A node that computes `x @ weight.T` (+ bias), `weight` being a slot [O, I] or a region of one."""

    node: NodeProto
    slot: str
    weight: str
    region: tuple[slice, slice] = (slice(None), slice(None))


def _find_matmuls(graph: Any, slots: Iterable[str]) -> dict[str, _MatMul]:
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
    matmuls: Mapping[str, _MatMul], scheme: Scheme, read_weight: WeightReader, sidecar: _Sidecar
) -> dict[str, list[NodeProto]]:
    """MatMulNBits for every product, by the name of its output; each slot is read once."""
    by_slot: dict[str, dict[str, _MatMul]] = defaultdict(dict)
    for output, matmul in matmuls.items():
        by_slot[matmul.slot][output] = matmul
    nodes = {}
    for slot, group in by_slot.items():
        weight = read_weight(slot)
        for index, (output, matmul) in enumerate(group.items()):
            part = weight[matmul.region]
            check_groups(scheme, slot, part.shape[1])
            packed = (pack_int4 if scheme.weight_bits == 4 else pack_int8)(part, scheme.group_size)
            nodes[output] = _packed_matmul(matmul, packed, scheme, sidecar, f"{slot}__{index}")
    return nodes


def _packed_matmul(
    matmul: _MatMul, packed: PackedWeight, scheme: Scheme, sidecar: _Sidecar, name: str
) -> list[NodeProto]:
    """Source: ONNX Runtime's ContribOperators.md, `com.microsoft.MatMulNBits`."""
    from onnx.helper import make_node

    rows, groups = packed.scales_OG.shape
    zeros = packed.zeros_OG
    if scheme.weight_bits == 4:
        even = np.pad(zeros, ((0, 0), (0, groups % 2)))
        zeros = even[:, 0::2] | np.left_shift(even[:, 1::2], 4, dtype=np.uint8)
    sidecar.append(f"{name}__codes", packed.codes_OI.reshape(rows, groups, -1))
    sidecar.append(f"{name}__scales", bf16_to_float32(packed.scales_OG))
    sidecar.append(f"{name}__zeros", zeros)
    x, output = matmul.node.input[0], matmul.node.output[0]
    bias = matmul.node.input[2] if len(matmul.node.input) > 2 else ""
    product = f"{output}__product" if bias else output
    nodes = [
        make_node(
            "MatMulNBits",
            [x, f"{name}__codes", f"{name}__scales", f"{name}__zeros"],
            [product],
            domain=CONTRIB,
            K=groups * scheme.group_size,
            N=rows,
            bits=scheme.weight_bits,
            block_size=scheme.group_size,
            accuracy_level=0,  # float32 throughout; level 4 would quantize the activations as well
        )
    ]
    if bias:
        nodes.append(make_node("Add", [product, bias], [output]))
    return nodes


def _without_unused(nodes: list[NodeProto], outputs: set[str]) -> list[NodeProto]:
    """Without nodes whose results nobody reads any more: transposes and slices of weights."""
    kept = []
    needed = set(outputs)
    for node in reversed(nodes):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    return kept[::-1]


def _with_casts(nodes: list[NodeProto], tensors: Mapping[str, TensorProto]) -> Iterator[NodeProto]:
    """The nodes with every 16-bit weight cast to float32 just before its first use, or after it was moved."""
    import onnx

    narrow = {
        name
        for name, tensor in tensors.items()
        if tensor.data_type in (onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16)
    }
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


def _in_place(slot: str, ref: TensorRef, target: Path) -> TensorProto:
    """An initializer that is the checkpoint's own bytes."""
    if ref.dtype not in _READABLE:
        raise CompileError(
            f"tensor {ref.name} is stored as {ref.dtype}, {', '.join(_READABLE)} can be read in place; "
            "convert it to BF16"
        )
    try:
        location = ref.file.resolve().relative_to(target.parent.resolve())
    except ValueError:
        raise CompileError(
            f"tensor {ref.name} lies in {ref.file}, ONNX Runtime opens files below {target.parent} only; put the "
            "file or a hard link to it there"
        ) from None
    return _external(slot, _READABLE[ref.dtype], ref.shape, location.as_posix(), ref.offset, ref.nbytes)


def _external(name: str, dtype: str, shape: tuple[int, ...], location: str, offset: int, length: int) -> TensorProto:
    import onnx

    tensor = onnx.TensorProto(name=name, data_type=onnx.TensorProto.DataType.Value(dtype), dims=shape)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    return tensor


class _Sidecar:
    """A file that weights are appended to; not made before the first of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorProto] = {}
        self.size = 0

    def append(self, name: str, array: NDArray[Any]) -> None:
        """Write `array` and remember where it lies as initializer `name`."""
        stored = np.ascontiguousarray(array if array.dtype in _STORABLE else array.astype(np.float32))
        with self.path.open("ab" if self.size else "wb") as file:
            file.write(bytes(-self.size % ALIGNMENT))
            offset = file.tell()
            file.write(stored.view(np.uint8).data)
            self.size = file.tell()
        self.tensors[name] = _external(
            name, _STORABLE[stored.dtype], stored.shape, self.path.name, offset, stored.nbytes
        )
