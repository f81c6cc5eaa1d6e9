"""A fault planted in a graph of a bundle, and the operation that is named for it."""

from __future__ import annotations

import shutil

import numpy as np

from fluxkiln.compile.onnx.linked import link_parts
from fluxkiln.compile.toolchains.onnxruntime.look import check_linked
from tests.builds import altered


def test_a_fault_in_a_linked_graph_is_found(opened, tmp_path):
    import onnx

    part, made = opened("single.02", "W4BF16", "cpu")
    made = altered(made, parts=(part.part,))
    (graph,) = link_parts(*made, tmp_path / "graphs").values()
    assert check_linked(part, graph).culprit is None
    model = onnx.load(graph, load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    scales = {tensor.name: tensor for tensor in model.graph.initializer}[products[2].input[2]]
    place = {entry.key: entry.value for entry in scales.external_data}
    file = graph.parent / place["location"]
    shutil.copyfile(file, tmp_path / "copy")
    with file.open("r+b") as data:
        data.seek(int(place["offset"]) + 4 * 9)
        data.write((2 * np.frombuffer((tmp_path / "copy").read_bytes(), np.float32, 1, int(place["offset"]) + 36)).data)
    culprit = check_linked(part, graph).culprit
    assert culprit.finding.value == products[2].output[0]
    assert culprit.finding.bad_channels == 1
