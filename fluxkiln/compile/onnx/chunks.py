"""Products with a large 16-bit weight as several products with ranges of its rows, each read where it lies.

ONNX Runtime's CPU kernels multiply float32, so `ort_graph` casts a weight right before its use. Cast whole, a weight of
FLUX.1's width is 75 to 230 MB of float32 in fresh pages: written to memory, faulted in, read back, on every run. A
range of rows is a range of bytes of the same file; cast, it stays in the processor's cache and below the size from
which the C library takes fresh pages. Every row's sum is made of the same terms in the same order, so outputs are
bit for bit those of the graph in the file; but a Gemm adds its bias after the sum, not before it.

Measured at 256x256 with 128 tokens, two threads of an AMD EPYC with 32 MB of cache: a double block takes 0.47 s of CPU
time instead of 0.61 s, a single block 0.46 s instead of 0.57 s, a double block's hoisted modulation 0.08 s instead of
0.20 s; an image of wide-dev peaks at 1.48 GB instead of 1.59 GB. Ranges of 3 to 8 MB take as long, of 31 MB 5 %
longer. What is left is the product itself, at 85 % of what these cores can do in float32.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.onnx.external_data import external_range
from fluxkiln.compile.onnx.packed import CONTRIB

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

RANGE_BYTES = 6 << 20  # of float32
_ROWS = 64  # ranges are multiples of it, so that the product's kernels have no remainder in between
# rows of activations, in input channels of the weight: from here on the results to join are larger than what is saved
MOST_TOKENS = 0.5


@dataclass(frozen=True, slots=True)
class _Product:
    """`x @ weight.T`: `weight` [O, I] lies outside the graph, of it the rows and, if any, the columns are used."""

    weight: TensorProto
    rows: tuple[int, int]
    columns: tuple[int, int] | None
    unused: tuple[str, ...]

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0] if self.columns else int(self.weight.dims[1])


def split_products(model: Any, range_bytes: int = RANGE_BYTES) -> int:
    """Rewrite the products of an `onnx.ModelProto` in place; weights stay in their files.

    Args:
        model: of `ort_graph.link_weights`, without the weights' data.
        range_bytes: float32 bytes of weight that one product takes.

    Returns:
        How many products were split; 0 leaves the model as it was.
    """
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    shapes = _shapes(graph)
    nodes: list[NodeProto] = []
    made: dict[str, TensorProto] = {}
    unused: set[str] = set()
    split = 0
    for node in graph.node:
        product = _find_product(node, makers, tensors, uses)
        if product is None or not _worthwhile(product, shapes.get(node.input[0]), range_bytes):
            nodes.append(node)
            continue
        nodes += _ranges(node, product, range_bytes, made)
        unused.update(product.unused)
        split += 1
    if not split:
        return 0
    kept = [node for node in nodes if node.output[0] not in unused]
    used = {name for node in kept for name in node.input}
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    graph.ClearField("node")
    graph.node.extend(kept)
    graph.ClearField("initializer")
    graph.initializer.extend([*initializers, *made.values()])
    return split


def _shapes(graph: Any) -> dict[str, tuple[int, ...]]:
    return {
        value.name: tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
    }


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
    unused: tuple[str, ...] = (cast.output[0],)
    name, bounds = cast.input[0], None
    cut = makers.get(name)
    if cut is not None:
        if cut.op_type != "Slice" or len(cut.input) != 5 or uses[name] != 1:
            return None
        unused = (*unused, name)
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
    return _Product(weight, rows, columns, unused)


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
    import onnx

    name = f"{weight.name}__{first}_{stop}"
    if name not in made:
        location, offset, length = external_range(weight)
        row = length // weight.dims[0]
        tensor = onnx.TensorProto(name=name, data_type=weight.data_type, dims=[stop - first, *weight.dims[1:]])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        values = {"location": location, "offset": str(offset + first * row), "length": str((stop - first) * row)}
        for key, value in values.items():
            tensor.external_data.add(key=key, value=value)
        made[name] = tensor
    return name


def _constant(number: int, made: dict[str, TensorProto]) -> str:
    import numpy as np
    from onnx.numpy_helper import from_array

    name = f"__range_bound_{number}"
    if name not in made:
        made[name] = from_array(np.array([number]), name)
    return name
