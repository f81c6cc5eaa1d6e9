"""Products with packed weights as ONNX Runtime's MatMulNBits, with what a method needs beside the codes.

Source: ONNX Runtime's ContribOperators.md, `com.microsoft.MatMulNBits`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.compile.onnx.external_data import Sidecar
from fluxkiln.quantize.schemes import Scheme

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from onnx import NodeProto

    from fluxkiln.quantize.pack import PackedWeight
    from fluxkiln.quantize.side_tensors import SidedWeight

CONTRIB = "com.microsoft"


def nibble_zeros(packed: PackedWeight) -> NDArray[np.uint8]:
    """Zero points as MatMulNBits takes them: 4-bit ones two a byte, low nibble = even group, each row padded."""
    zeros = packed.zeros_OG
    if packed.bits == 8:
        return zeros
    even = np.pad(zeros, ((0, 0), (0, zeros.shape[1] % 2)))
    return even[:, 0::2] | np.left_shift(even[:, 1::2], 4, dtype=np.uint8)


def packed_matmul(
    node: NodeProto, packed: PackedWeight, scheme: Scheme, sidecar: Sidecar, name: str, source: str = ""
) -> list[NodeProto]:
    """Nodes in place of `node`, a MatMul or Gemm with a weight that is packed now; its arrays go to the sidecar.

    Args:
        name: what the arrays' names begin with.
        source: what is multiplied, if not the node's own input.
    """
    from onnx.helper import make_node

    from fluxkiln.quantize.pack import bf16_to_float32

    rows, groups = packed.scales_OG.shape
    sidecar.append(f"{name}__codes", packed.codes_OI.reshape(rows, groups, -1))
    sidecar.append(f"{name}__scales", bf16_to_float32(packed.scales_OG))
    sidecar.append(f"{name}__zeros", nibble_zeros(packed))
    x, output = source or node.input[0], node.output[0]
    bias = node.input[2] if len(node.input) > 2 else ""
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


def sided_matmul(node: NodeProto, sided: SidedWeight, scheme: Scheme, sidecar: Sidecar, name: str) -> list[NodeProto]:
    """As `packed_matmul`, with the input divided by channel, and a low-rank branch added to the product."""
    from onnx.helper import make_node

    from fluxkiln.quantize.pack import bf16_to_float32

    x, output, beside = node.input[0], node.output[0], sided.beside
    nodes: list[Any] = []
    source = x
    if beside.divisors is not None and (beside.divisors != 1).any():
        source = f"{output}__divided"
        sidecar.append(f"{name}__divisors", beside.divisors)
        nodes.append(make_node("Div", [x, f"{name}__divisors"], [source]))
    nodes += packed_matmul(node, sided.packed, scheme, sidecar, name, source)
    if beside.up is not None and beside.down is not None:
        nodes[-1].output[0] = f"{output}__packed"
        sidecar.append(f"{name}__down", np.ascontiguousarray(bf16_to_float32(beside.down).T))
        sidecar.append(f"{name}__up", np.ascontiguousarray(bf16_to_float32(beside.up).T))
        nodes.append(make_node("MatMul", [x, f"{name}__down"], [f"{output}__down"]))
        nodes.append(make_node("MatMul", [f"{output}__down", f"{name}__up"], [f"{output}__branch"]))
        nodes.append(make_node("Add", [f"{output}__packed", f"{output}__branch"], [output]))
    return nodes
