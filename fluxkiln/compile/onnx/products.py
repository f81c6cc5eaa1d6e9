"""Products with weights as ONNX Runtime computes them: in ranges of a weight's rows, on packed weights, in integers.

Source: ONNX Runtime's ContribOperators.md, `com.microsoft.MatMulNBits` and `com.microsoft.FusedMatMul`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.compile.onnx.external_data import Sidecar, external_range, external_tensor
from fluxkiln.quantize.schemes import Scheme

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import NodeProto, TensorProto

    from fluxkiln.quantize.pack import PackedWeight
    from fluxkiln.quantize.side_tensors import SidedWeight

CONTRIB = "com.microsoft"
RANGE_BYTES = 6 << 20  # of float32
_ROWS = 64  # ranges are multiples of it, so that the product's kernels have no remainder in between
# rows of activations, in input channels of the weight: from here on the results to join are larger than what is saved
MOST_TOKENS = 0.5
INTEGERS = 4  # MatMulNBits' accuracy level at which activations are rounded to 8 bits; 0 is float32 throughout


def replace_nodes(graph: Any, nodes: Iterable[NodeProto], tensors: Iterable[TensorProto] = ()) -> None:
    """Give a graph other nodes, without those whose results nobody reads, and more initializers; unread ones go."""
    kept, needed = [], {value.name for value in graph.output}
    for node in reversed(list(nodes)):
        if needed & set(node.output):
            kept.append(node)
            needed |= set(node.input)
    initializers = [tensor for tensor in (*graph.initializer, *tensors) if tensor.name in needed]
    graph.ClearField("node")
    graph.node.extend(kept[::-1])
    graph.ClearField("initializer")
    graph.initializer.extend(initializers)


@dataclass(frozen=True, slots=True)
class _Product:
    """`x @ weight.T`: `weight` [O, I] lies outside the graph, of it the rows and, if any, the columns are used."""

    weight: TensorProto
    rows: tuple[int, int]
    columns: tuple[int, int] | None

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0] if self.columns else int(self.weight.dims[1])


def split_products(model: Any, range_bytes: int = RANGE_BYTES) -> int:
    """Rewrite products with a large 16-bit weight as several with ranges of its rows, each read where it lies.

    ONNX Runtime's CPU kernels multiply float32, so a linked graph casts a weight right before its use. Cast whole, a
    weight of FLUX.1's width is 75 to 230 MB of float32 in fresh pages: written to memory, faulted in, read back, on
    every run. A range of rows is a range of bytes of the same file; cast, it stays in the processor's cache and below
    the size from which the C library takes fresh pages. Every row's sum is made of the same terms in the same order, so
    outputs are bit for bit those of the graph in the file; but a Gemm adds its bias after the sum, not before it.

    Measured at 256x256 with 128 tokens, two threads of an AMD EPYC with 32 MB of cache: a double block takes 0.47 s of
    CPU time instead of 0.61 s, a single block 0.46 s instead of 0.57 s, a double block's hoisted modulation 0.08 s
    instead of 0.20 s; an image of wide-dev peaks at 1.48 GB instead of 1.59 GB. Ranges of 3 to 8 MB take as long, of
    31 MB 5 % longer. What is left is the product itself, at 85 % of what these cores can do in float32.

    Args:
        model: an `onnx.ModelProto`, changed in place, without the weights' data; they stay in their files.
        range_bytes: float32 bytes of weight that one product takes.

    Returns:
        How many products were split; 0 leaves the model as it was.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    shapes = {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
    }
    nodes: list[NodeProto] = []
    made: dict[str, TensorProto] = {}
    split = 0
    for node in graph.node:
        product = _find_product(node, makers, tensors, uses)
        if product is None or not _worthwhile(product, shapes.get(node.input[0]), range_bytes):
            nodes.append(node)
            continue
        nodes += _ranges(node, product, range_bytes, made)
        split += 1
    if split:
        replace_nodes(graph, nodes, made.values())
    return split


def _find_product(
    node: NodeProto, makers: Mapping[str, NodeProto], tensors: Mapping[str, TensorProto], uses: Mapping[str, int]
) -> _Product | None:
    """The product that a node is, if its weight is an external one that was cast, whole or sliced, for it alone."""
    import onnx
    from onnx.numpy_helper import to_array

    if node.op_type not in ("FusedMatMul", "Gemm") or not _is_plain(node):
        return None
    cast = makers.get(node.input[1])
    if cast is None or cast.op_type != "Cast" or uses[cast.output[0]] != 1:
        return None
    name, bounds = cast.input[0], None
    cut = makers.get(name)
    if cut is not None:
        if cut.op_type != "Slice" or len(cut.input) != 5 or uses[name] != 1:
            return None
        name = cut.input[0]
        constants = [tensors.get(one) for one in cut.input[1:]]
        if any(one is None or one.data_location == onnx.TensorProto.EXTERNAL for one in constants):
            return None
        bounds = [int(to_array(one).reshape(())) for one in constants if one is not None]
    weight = tensors.get(name)
    if weight is None or weight.data_location != onnx.TensorProto.EXTERNAL or len(weight.dims) != 2:
        return None
    rows, columns = (0, int(weight.dims[0])), None
    if bounds is not None:
        start, stop, axis, step = bounds
        if step != 1 or axis not in (0, 1) or not 0 <= start < stop <= weight.dims[axis]:
            return None
        rows, columns = ((start, stop), None) if axis == 0 else (rows, (start, stop))
    return _Product(weight, rows, columns)


def _is_plain(node: NodeProto) -> bool:
    """Whether it computes `x @ weight.T` (+ bias), without factors."""
    values = {attribute.name: attribute for attribute in node.attribute}
    factors = [values[name].f for name in ("alpha", "beta") if name in values]
    flags = [values[name].i for name in ("transA", "transBatchA", "transBatchB") if name in values]
    return "transB" in values and values["transB"].i == 1 and not any(flags) and all(one == 1 for one in factors)


def _worthwhile(product: _Product, activations: tuple[int, ...] | None, range_bytes: int) -> bool:
    rows = product.rows[1] - product.rows[0]
    if rows <= _ROWS or 4 * rows * product.width <= range_bytes or not activations or 0 in activations:
        return False
    return math.prod(activations[:-1]) <= MOST_TOKENS * product.width


def _ranges(node: NodeProto, product: _Product, range_bytes: int, made: dict[str, TensorProto]) -> list[NodeProto]:
    """Cast and product of one range after the other, then their results side by side, plus the bias of a Gemm."""
    from onnx.helper import make_node

    start, stop = product.rows
    count = -(-4 * (stop - start) * product.width // range_bytes)
    step = -(-(stop - start) // (count * _ROWS)) * _ROWS
    x, output = node.input[0], node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
    nodes, results = [], []
    for first in range(start, stop, step):
        result = f"{output}__{first}"
        weight = _stored_rows(product.weight, first, min(first + step, stop), made)
        if product.columns:
            bounds = [_constant(number, made) for number in (*product.columns, 1)]
            nodes.append(make_node("Slice", [weight, *bounds], [f"{result}__stored"]))
            weight = f"{result}__stored"
        nodes.append(make_node("Cast", [weight], [f"{result}__weight"], to=1))
        inputs = [x, f"{result}__weight"]
        nodes.append(make_node("FusedMatMul", inputs, [result], domain=CONTRIB, transB=1))
        results.append(result)
    joined = f"{output}__joined" if bias else output
    nodes.append(make_node("Concat", results, [joined], axis=-1))
    if bias:
        nodes.append(make_node("Add", [joined, bias], [output]))
    return nodes


def _stored_rows(weight: TensorProto, first: int, stop: int, made: dict[str, TensorProto]) -> str:
    """Name of the initializer that is these rows of `weight`, where they lie."""
    name = f"{weight.name}__{first}_{stop}"
    if name not in made:
        location, offset, length = external_range(weight)
        row = length // weight.dims[0]
        shape = (stop - first, *weight.dims[1:])
        made[name] = external_tensor(
            name, weight.data_type, shape, location, offset + first * row, (stop - first) * row
        )
    return name


def _constant(number: int, made: dict[str, TensorProto]) -> str:
    from onnx.numpy_helper import from_array

    name = f"__range_bound_{number}"
    made[name] = from_array(np.array([number]), name)
    return name


def nibble_zeros(packed: PackedWeight) -> NDArray[np.uint8]:
    """Zero points as MatMulNBits takes them: 4-bit ones two a byte, low nibble = even group, each row padded."""
    zeros = packed.zeros_OG
    if packed.bits == 8:
        return zeros
    even = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return even[:, 0::2] | np.left_shift(even[:, 1::2], 4, dtype=np.uint8)


def packed_matmul(node: NodeProto, weight: SidedWeight, scheme: Scheme, sidecar: Sidecar, name: str) -> list[NodeProto]:
    """Nodes in place of `node`, a MatMul or Gemm with a weight that is packed now; its arrays go to the sidecar.

    With what a method needs beside the codes the input is divided by channel, and a low-rank branch added to the
    product.

    Args:
        name: what the arrays' names begin with.
    """
    from onnx.helper import make_node

    from fluxkiln.quantize.pack import PackedWeight, bf16_to_float32

    packed, beside = weight.packed, weight.beside
    assert isinstance(packed, PackedWeight), "formats of files are no operands of a product"
    x, output, bias = node.input[0], node.output[0], node.input[2] if len(node.input) > 2 else ""
    source, nodes = x, []
    if beside.divisors is not None and (beside.divisors != 1).any():
        source = f"{output}__divided"
        sidecar.append(f"{name}__divisors", beside.divisors)
        nodes.append(make_node("Div", [x, f"{name}__divisors"], [source]))
    rows, groups = packed.scales_OG.shape
    sidecar.append(f"{name}__codes", packed.codes_OI.reshape(rows, groups, -1))
    sidecar.append(f"{name}__scales", bf16_to_float32(packed.scales_OG))
    sidecar.append(f"{name}__zeros", nibble_zeros(packed))
    product = f"{output}__product" if bias else output
    inputs = [source, f"{name}__codes", f"{name}__scales", f"{name}__zeros"]
    nodes.append(
        make_node(
            "MatMulNBits", inputs, [product], domain=CONTRIB, K=groups * scheme.group_size, N=rows,
            bits=scheme.weight_bits, block_size=scheme.group_size, accuracy_level=0,
        )
    )  # fmt: skip
    if bias:
        nodes.append(make_node("Add", [product, bias], [output]))
    if beside.up is not None and beside.down is not None:
        nodes[-1].output[0] = f"{output}__packed"
        sidecar.append(f"{name}__down", np.ascontiguousarray(bf16_to_float32(beside.down).T))
        sidecar.append(f"{name}__up", np.ascontiguousarray(bf16_to_float32(beside.up).T))
        nodes.append(make_node("MatMul", [x, f"{name}__down"], [f"{output}__down"]))
        nodes.append(make_node("MatMul", [f"{output}__down", f"{name}__up"], [f"{output}__branch"]))
        nodes.append(make_node("Add", [f"{output}__packed", f"{output}__branch"], [output]))
    return nodes


def quantize_activations(model: Any) -> int:
    """Let every MatMulNBits of an `onnx.ModelProto` multiply integers, in place; how many there are.

    Quicker, less exact, only where it is asked for: activations are rounded to 8 bits in the weight's groups, instead
    of the weight dequantized on every run. Verification never does: its verdict is on float32 arithmetic.

    Measured on [256, 3072] x [12288, 3072], groups of 64, Gaussian, two threads of an AMD EPYC: 4-bit weights 0.055 s
    of CPU time instead of 0.08 s, 8-bit ones 0.05 s instead of 0.26 s; relative L2 error of a product 0.006, where
    4-bit rounding of the weights alone has 0.09. An image of wide-dev in W4BF16 (6 steps, 256x256): 4.95 s of CPU time
    instead of 6.62 s; latents 0.0029 from those of float32 arithmetic, which are 0.054 from those of unpacked weights.
    """
    packed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    for node in packed:
        (level,) = (attribute for attribute in node.attribute if attribute.name == "accuracy_level")
        level.i = INTEGERS
    return len(packed)
