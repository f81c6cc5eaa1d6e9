"""Whole components: equal to diffusers and transformers, weights in place and by name, exchanged blocks seen."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file

from fluxkiln.compile.onnx.external_data import external_range
from fluxkiln.compile.onnx.linked import export_graphs
from fluxkiln.compile.onnx.session import open_session
from fluxkiln.errors import ExportError, UsageError
from fluxkiln.export.checkpoint import TensorReader
from fluxkiln.export.whole import LinkedPart, component_graphs, stitch_parts
from fluxkiln.patches.flux1.inputs import T5_BIAS_TABLE, make_constants
from fluxkiln.patches.flux1.kinds import MODULATION_ROWS, list_parts, make_part
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.progress import Silent
from fluxkiln.types import Shapes

SHAPES = Shapes(height=64, width=64, tokens=32)
PARITY = 1e-6
COMPONENTS = ("transformer", "text_encoder_2")


@pytest.fixture(scope="module")
def whole(tiny_checkpoint, tmp_path_factory):
    """preset -> folder with both large components as whole graphs."""

    @functools.cache
    def write(preset, graph_format):
        checkpoint = tiny_checkpoint(preset)
        parts = list_parts(checkpoint.configs)
        files = {
            f"{component}.onnx": component_graphs(parts, component, MODEL.components)[component]
            for component in COMPONENTS
        }
        folder = tmp_path_factory.mktemp("whole") / "graphs"
        made = export_graphs(checkpoint, files, SHAPES, folder, Silent(), graph_format=graph_format)
        assert made.weight_bytes_written == 0
        return folder

    return lambda preset="tiny-dev", graph_format="onnx23": write(preset, graph_format)


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """preset -> component -> (inputs of its graph, what diffusers or transformers compute, float32)."""

    @functools.cache
    def compute(preset):
        checkpoint = tiny_checkpoint(preset)
        constants = make_constants(checkpoint.configs, SHAPES, TensorReader(checkpoint), split=False)
        return {
            "transformer": transformer_reference(checkpoint, constants),
            "text_encoder_2": t5_reference(checkpoint, constants),
        }

    return lambda preset="tiny-dev": compute(preset)


def transformer_reference(checkpoint, constants):
    from diffusers import FluxPipeline, FluxTransformer2DModel

    config, rng = checkpoint.configs["transformer"], np.random.default_rng(5)
    shapes = {
        "hidden_states": (1, SHAPES.image_tokens, config["in_channels"]),
        "encoder_hidden_states": (1, SHAPES.tokens, config["joint_attention_dim"]),
        "pooled_projections": (1, config["pooled_projection_dim"]),
    }
    inputs = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    inputs["timestep"] = np.array([0.731], np.float32)
    if config["guidance_embeds"]:
        inputs["guidance"] = np.array([3.5], np.float32)
    model = FluxTransformer2DModel.from_pretrained(checkpoint.root / "transformer", torch_dtype=torch.float32)
    ids = FluxPipeline._prepare_latent_image_ids(1, 4, 4, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        expected = model(**tensors, img_ids=ids, txt_ids=torch.zeros(SHAPES.tokens, 3)).sample.numpy()
    return {**inputs, **{name: constants[name] for name in ("rotary_cos", "rotary_sin")}}, expected


def t5_reference(checkpoint, constants):
    from transformers import T5EncoderModel

    model = T5EncoderModel.from_pretrained(checkpoint.root / "text_encoder_2", dtype=torch.float32)
    ids = np.random.default_rng(6).integers(0, model.config.vocab_size, (1, SHAPES.tokens))
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).last_hidden_state.numpy()
    return {"input_ids": ids, "position_bias": constants["position_bias"]}, expected


def rel_l2(found, expected):
    expected = expected.astype(np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def run(session, inputs):
    assert {value.name for value in session.get_inputs()} == inputs.keys()
    (output,) = session.run(None, inputs)
    return output


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize(
    ("preset", "graph_format"), [("tiny-dev", "onnx23"), ("tiny-schnell", "onnx23"), ("tiny-dev", "onnx17")]
)
def test_equals_upstream(component, preset, graph_format, whole, reference):
    inputs, expected = reference(preset)[component]
    graph = whole(preset, graph_format) / f"{component}.onnx"
    assert rel_l2(run(open_session(graph, threads=1), inputs), expected) <= PARITY
    assert rel_l2(run(onnxruntime.InferenceSession(graph), inputs), expected) <= PARITY


@pytest.mark.parametrize(
    ("component", "blocks"),
    [
        ("transformer", ("double.00", "double.01")),
        ("transformer", ("single.01", "single.02")),
        ("text_encoder_2", ("t5_block.00", "t5_block.01")),
    ],
)
def test_exchanged_blocks_are_seen(component, blocks, whole, reference):
    inputs, expected = reference()[component]
    graph = whole() / f"{component}.onnx"
    model = onnx.load(graph, load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    first, second = (next(node for node in model.graph.node if node.name == block) for block in blocks)
    for one, other in zip(range(len(first.input)), range(len(second.input)), strict=True):
        if first.input[one] in weights:
            first.input[one], second.input[other] = second.input[other], first.input[one]
    exchanged = graph.with_name(f"{component}.{blocks[0]}.onnx")
    exchanged.write_bytes(model.SerializeToString())
    assert rel_l2(run(open_session(exchanged, threads=1), inputs), expected) > 1000 * PARITY


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_tensor_is_there_by_name_and_byte(component, whole, tiny_checkpoint):
    checkpoint = tiny_checkpoint()
    graph = whole() / f"{component}.onnx"
    stored = {}
    for shard in (checkpoint.root / component).glob("*.safetensors"):
        stored |= load_file(shard)
    model = onnx.load(graph, load_external_data=False)
    external = {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}
    assert external.keys() == stored.keys() - {T5_BIAS_TABLE}
    for name, tensor in external.items():
        location, offset, length = external_range(tensor)
        with (graph.parent / location).open("rb") as file:
            file.seek(offset)
            assert file.read(length) == stored[name].contiguous().view(torch.uint8).numpy().tobytes(), name
        assert list(tensor.dims) == list(stored[name].shape)
    assert graph.stat().st_size < 1 << 17


def test_each_kind_is_in_the_file_once(whole):
    model = onnx.load(whole() / "transformer.onnx", load_external_data=False)
    assert [function.name for function in model.functions] == ["head", "double", "single", "tail"]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds == ["head", "double", "double", "Concat", "single", "single", "single", "Slice", "tail"]
    assert {value.name for value in model.graph.value_info} == {
        *("head/hidden_states", "head/encoder_hidden_states", "head/temb", "single.02/hidden_states"),
        *(f"double.0{i}/{stream}" for i in (0, 1) for stream in ("hidden_states", "encoder_hidden_states")),
        *("single.00/hidden_states", "single.01/hidden_states"),
    }
    unguided = onnx.load(whole("tiny-schnell") / "transformer.onnx", load_external_data=False)
    assert "guidance" not in {value.name for value in unguided.graph.input}


def test_functions_can_be_inlined_for_other_tools(whole, reference):
    inputs, expected = reference()["transformer"]
    graph = whole() / "transformer.onnx"
    model = onnx.inliner.inline_local_functions(onnx.load(graph, load_external_data=False))
    assert not model.functions
    flat = graph.with_name("flat.onnx")
    flat.write_bytes(model.SerializeToString())
    assert rel_l2(run(open_session(flat, threads=1), inputs), expected) <= PARITY


def test_hoisted_form(tiny_checkpoint, reference, tmp_path):
    """Two graphs: all steps' modulation at once, then a step with its row; a row of another step is seen."""
    checkpoint = tiny_checkpoint()
    inputs, expected = reference()["transformer"]
    graphs = component_graphs(list_parts(checkpoint.configs, modulation="hoisted"), "transformer", MODEL.components)
    assert [*graphs] == ["transformer_modulation", "transformer"]
    files = {f"{name}.onnx": parts for name, parts in graphs.items()}
    made = export_graphs(checkpoint, files, SHAPES, tmp_path / "graphs", Silent())
    assert made.weight_bytes_written == 0
    assert sum(graph.tensors for graph in made.graphs) == 126
    once, step = (open_session(tmp_path / "graphs" / name, threads=1) for name in files)
    times = np.linspace(1, 0, MODULATION_ROWS, dtype=np.float32)
    times[3] = inputs["timestep"][0]
    rows = {"timestep": times, "guidance": np.full_like(times, 3.5), "pooled_projections": inputs["pooled_projections"]}
    names = [value.name for value in once.get_outputs()]
    assert names[0] == "double_modulation.00/modulation"
    modulation = dict(zip(names, once.run(None, rows), strict=True))
    tokens = {name: inputs[name] for name in ("hidden_states", "encoder_hidden_states", "rotary_cos", "rotary_sin")}
    found, other = (
        run(step, {**tokens, **{name: all_rows[row : row + 1] for name, all_rows in modulation.items()}})
        for row in (3, 4)
    )
    assert rel_l2(found, expected) <= PARITY
    assert rel_l2(other, expected) > 1000 * PARITY


# Parts made by hand: y = x * w, one weight each.


def link_by_hand(name, kind="t5_block", dtype=TensorProto.FLOAT, place="0", opset=23, joint=False):
    values = [
        helper.make_tensor_value_info(f"hidden_states{suffix}", TensorProto.FLOAT, [1, 2]) for suffix in ("", "_out")
    ]
    weight = TensorProto(name="w", data_type=dtype, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (
        ("location", "shard"),
        ("offset", place),
        ("length", "4" if dtype == TensorProto.FLOAT else "2"),
    ):
        weight.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Mul", ["hidden_states", "w"], ["hidden_states_out"])]
    if dtype != TensorProto.FLOAT:
        nodes = [
            helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["hidden_states", "wide"], ["hidden_states_out"]),
        ]
    graph = helper.make_graph(nodes, kind, values[:1], values[1:], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    return LinkedPart(make_part(name, kind), model, {"w": f"{name}.weight"})


def test_blocks_stored_in_different_types_are_functions_of_their_own(tmp_path):
    parts = [link_by_hand("a"), link_by_hand("b", dtype=TensorProto.BFLOAT16, place="4"), link_by_hand("c", place="8")]
    model = stitch_parts("x", parts)
    assert [function.name for function in model.functions] == ["t5_block", "t5_block_2"]
    assert [node.op_type for node in model.graph.node] == ["t5_block", "t5_block_2", "t5_block"]
    (tmp_path / "shard").write_bytes(np.array([3, 5, 7], np.float32).tobytes())
    (tmp_path / "x.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(tmp_path / "x.onnx")


def test_one_tensor_used_twice_is_one_initializer():
    parts = [replace(link_by_hand(name), weights={"w": "tied"}) for name in "ab"]
    assert [tensor.name for tensor in stitch_parts("x", parts).graph.initializer] == ["tied"]
    parts[1] = replace(link_by_hand("b", place="8"), weights={"w": "tied"})
    with pytest.raises(ExportError, match="two weights are called tied"):
        stitch_parts("x", parts)


def test_refusals():
    with pytest.raises(ExportError, match="no parts"):
        stitch_parts("x", [])
    with pytest.raises(ExportError, match="one format"):
        stitch_parts("x", [link_by_hand("a"), link_by_hand("b", opset=17)])
    with pytest.raises(UsageError, match="no component is called 'unet'; there are text_encoder,"):
        component_graphs((), "unet", MODEL.components)


def test_file_is_the_same_every_time():
    parts = [link_by_hand(name) for name in "ab"]
    first, second = (stitch_parts("x", parts).SerializeToString(deterministic=True) for _ in "12")
    assert first == second
