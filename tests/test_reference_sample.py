"""The restated sample: its blocks are diffusers' blocks, its files what it says they are."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxPosEmbed

from bench.reference_sample import (
    compile_arguments,
    export_block,
    input_shapes,
    make_block,
    rotation_matrices,
    wrap_block,
)

SMALL = {"size": (64, 64), "tokens": 32, "heads": 2}


@pytest.fixture
def inputs():
    """kind -> (the sample's inputs, cos and sin) of a small block."""

    def make(kind):
        generator = torch.Generator().manual_seed(3)
        shapes = input_shapes(kind, **SMALL)
        given = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        places = torch.randint(0, 64, (shapes["image_rotary_emb"][1], 3), generator=generator).float()
        cos, sin = (x.float() for x in FluxPosEmbed(theta=10000, axes_dim=[16, 56, 56])(places))
        given["image_rotary_emb"] = rotation_matrices(cos, sin)
        return given, (cos, sin)

    return make


def upstream(kind, block, given, rotary):
    block.attn.set_processor(FluxAttnProcessor())
    if kind == "double":
        given = {**given, "image_rotary_emb": rotary}
        return block(**given)
    text, image = given["hidden_states"][:, : SMALL["tokens"]], given["hidden_states"][:, SMALL["tokens"] :]
    return (torch.cat(block(image, text, given["temb"], image_rotary_emb=rotary), dim=1),)


@pytest.mark.parametrize("kind", ["double", "single"])
def test_equals_diffusers(kind, inputs, tmp_path):
    torch.manual_seed(4)
    block, (given, rotary) = make_block(kind, SMALL["heads"]), inputs(kind)
    with torch.no_grad():
        expected = upstream(kind, block, given, rotary)
    path = export_block(kind, tmp_path, block=block, **SMALL)
    session = onnxruntime.InferenceSession(path)
    feeds = {value.name: tensor.numpy() for value, tensor in zip(session.get_inputs(), given.values(), strict=True)}
    for found, wanted in zip(session.run(None, feeds), expected, strict=True):
        wanted = wanted.numpy().astype(np.float64)
        assert np.linalg.norm(found - wanted) / np.linalg.norm(wanted) < 1e-6
    ((given, (cos, sin)), wrapped) = inputs(kind), wrap_block(kind, block)
    given["image_rotary_emb"] = rotation_matrices(cos, -sin)
    with torch.no_grad():
        turned_back = wrapped(*given.values())
    first = turned_back[0] if kind == "double" else turned_back
    assert not torch.allclose(first, expected[0], rtol=1e-2, atol=1e-2)


def test_the_graph_is_the_sample_s_form(tmp_path):
    graph = onnx.load(export_block("single", tmp_path, **SMALL)).graph
    assert [value.type.tensor_type.shape.dim[-1].dim_value for value in graph.input] == [256, 256, 2]
    ranks = {len(value.dims) for value in graph.initializer}
    assert {1, 2} <= ranks
    assert sum(np.prod(value.dims) for value in graph.initializer if len(value.dims) == 2) > 256 * 256 * 14
    assert (export_block("double", tmp_path, form="torchscript", **SMALL)).name == "trans_block.pt"


def test_calls(tmp_path):
    shapes = input_shapes("single")
    assert shapes["image_rotary_emb"] == (1, 4608, 1, 64, 2, 2)
    transform, deploy = compile_arguments(tmp_path / "single_trans_block.onnx", shapes)
    assert transform[:5] == ["model_transform", "--model_name", "dev_single_trans_block", "--input_shapes",
                             "[[1,4608,3072],[1,3072],[1,4608,1,64,2,2]]"]  # fmt: skip
    assert deploy == ["model_deploy", "--mlir", "single_trans_block.mlir", "--quantize", "W4BF16", "--chip", "bm1684x",
                      "--model", "single_trans_block_W4BF16.bmodel"]  # fmt: skip
