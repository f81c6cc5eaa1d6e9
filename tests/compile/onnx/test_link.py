"""Linked graphs: equal to PyTorch for every kind, weights in place, quantized products exact, corruption seen."""

from __future__ import annotations

import os
from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fluxkiln.compile.onnx.filled import weight_matmuls
from fluxkiln.compile.onnx.link import external_files, link_weights, sidecar_path
from fluxkiln.compile.onnx.session import open_session, run_session
from fluxkiln.errors import CompileError, SchemeError
from fluxkiln.export.bindings import part_state
from fluxkiln.export.eager import PatchedRunner, run_module
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.parts import load_part, part_slots
from fluxkiln.patches.patch import patches_for
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Binding, SlotBinding, Template, TensorRef, TensorSpec, Transform
from tests.quantize.weights import stored_as

PARTS = (
    "clip", "t5_embed", "t5_block.01", "t5_final", "head", "double.01", "single.02", "tail", "vae_decoder",
    "tiny_vae_decoder",
)  # fmt: skip
QUANTIZED = ("W4BF16", "W4BF16-g32", "W4BF16-g128", "W8BF16")
EXACT = 2e-6  # a quantized product against the same product of the dequantized weight
PARITY = 5e-6


def rel_l2(found, expected):
    expected = np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def worst(found, expected):
    assert found.keys() == expected.keys()
    return max(rel_l2(found[name], expected[name]) for name in expected)


def run(graph, inputs):
    return run_session(open_session(graph, threads=1), "part", inputs)


def tensors_of(graph):
    return {tensor.name: tensor for tensor in onnx.load(graph, load_external_data=False).graph.initializer}


def place_of(tensor):
    entries = {entry.key: entry.value for entry in tensor.external_data}
    return entries["location"], int(entries["offset"]), int(entries["length"])


@pytest.mark.parametrize("name", PARTS)
def test_equals_patched(name, link, tiny_checkpoint, tiny_parts, tiny_recording):
    recording = tiny_recording(vae="tiny" if name == "tiny_vae_decoder" else "kl")
    inputs = recording.inputs(name)
    expected = PatchedRunner(tiny_checkpoint(), (tiny_parts(name),))(name, inputs)
    assert worst(run(link(name), inputs), expected) <= PARITY


@pytest.mark.parametrize("name", PARTS)
def test_weights_stay_where_they_are(name, link, tiny_checkpoint, tiny_template, tiny_parts):
    graph = link(name)
    part, folder = tiny_parts(name), graph.parent
    assert not sidecar_path(graph, parse_scheme("F32")).exists()
    slots = {spec.name for spec in tiny_template(part.kind, "onnx23").slots}
    tensors = tensors_of(graph)
    assert slots <= tensors.keys()
    checkpoint = tiny_checkpoint()
    key = "vae_tiny" if name == "tiny_vae_decoder" else part.component
    for slot in slots:
        ref = checkpoint.tensors[key][part.prefix + slot]
        location, offset, length = place_of(tensors[slot])
        assert (offset, length) == (ref.offset, ref.nbytes)
        assert os.path.samefile(folder / location, ref.file)
    inline = sum(len(tensor.raw_data) for tensor in tensors.values())
    assert inline < 1 << 16
    assert external_files(graph).keys() == {folder / place_of(tensors[slot])[0] for slot in slots}


@pytest.mark.parametrize("name", PARTS)
def test_nothing_of_this_machine_is_in_the_graph(name, link, repository):
    text = link(name).read_bytes()
    assert str(repository).encode() not in text
    assert b"site-packages" not in text


@pytest.mark.parametrize("name", ["double.00", "single.00", "t5_block.00", "clip"])
def test_weights_are_cast_once_and_never_transposed(name, link):
    graph = onnx.load(link(name), load_external_data=False).graph
    made = {output: node for node in graph.node for output in node.output}
    weights = {tensor.name for tensor in graph.initializer}
    casts = [node.input[0] for node in graph.node if node.op_type == "Cast"]
    assert len(casts) == len(set(casts))
    for node in graph.node:
        if node.op_type == "Transpose":
            source = made.get(node.input[0])
            assert node.input[0] not in weights
            assert source is None or source.op_type != "Cast"


def test_casts_come_right_before_their_use(link):
    nodes = onnx.load(link("double.00"), load_external_data=False).graph.node
    for index, node in enumerate(nodes):
        if node.op_type == "Cast" and nodes[index - 1].op_type != "Slice":
            near = [name for later in nodes[index + 1 : index + 4] for name in later.input]
            assert node.output[0] in near


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("name", ["double.00", "single.01", "t5_block.01"])
def test_quantized_parts_equal_the_dequantized(name, scheme, link, tiny_checkpoint, tiny_parts, tiny_recording):
    """Every product with a weight is quantized, as on the chip, and computes with the dequantized weight."""
    part, checkpoint = tiny_parts(name), tiny_checkpoint()
    graph = link(name, scheme)
    inputs = tiny_recording().inputs(name)
    weights = part_state(part, part_slots(MODEL, part.kind, checkpoint.configs), checkpoint)
    for slot, weight in weights.items():
        weights[slot] = stored_as(parse_scheme(scheme), weight, weight.ndim == 2)
    module = load_part(MODEL, part.kind, checkpoint.configs, {slot: torch.from_numpy(w) for slot, w in weights.items()})
    patches = patches_for(MODEL.patches(), part.kind, "onnx23")
    assert worst(run(graph, inputs), run_module(part.traits, module, inputs, patches)) <= PARITY


@pytest.mark.parametrize("name", ["double.00", "single.00", "t5_block.00", "tail", "clip"])
def test_as_many_products_are_quantized_as_on_the_chip(name, link, tiny_template, tiny_parts):
    template = tiny_template(tiny_parts(name).kind, "onnx17")
    expected = weight_matmuls(template.path, {spec.name for spec in template.inputs})
    nodes = onnx.load(link(name, "W4BF16-g32"), load_external_data=False).graph.node
    found = [node for node in nodes if node.op_type == "MatMulNBits"]
    assert len(found) == len(expected) > 0
    widths = sorted(next(a.i for a in node.attribute if a.name == "K") for node in found)
    assert widths == sorted(one.in_features for one in expected)


def test_quantized_parts_need_no_checkpoint(link, tiny_recording):
    graph = link("single.00", "W4BF16")
    assert list(external_files(graph)) == [graph.with_name("single.00.q4.bin")]
    inputs = tiny_recording().inputs("single.00")
    expected = run(graph, inputs)
    for file in (graph.parent / "transformer").iterdir():
        file.unlink()
    assert worst(run(graph, inputs), expected) == 0


def test_quantizing_makes_a_difference_that_is_seen(link, tiny_recording):
    inputs = tiny_recording().inputs("single.00")
    quantized = run(link("single.00", "W4BF16"), inputs)
    assert worst(quantized, run(link("single.00"), inputs)) > 1e-3


def test_swapped_blocks_are_seen(link, tiny_recording):
    for name, other in (("double.00", "double.01"), ("single.00", "single.01"), ("t5_block.00", "t5_block.01")):
        recorded = tiny_recording()
        swapped = run(link(name, weights_of=other), recorded.inputs(name))
        assert worst(swapped, recorded.outputs(name)) > 100 * PARITY


def test_one_doubled_scale_is_seen(link, tiny_recording):
    graph = link("single.00", "W4BF16")
    inputs = tiny_recording().inputs("single.00")
    expected = run(graph, inputs)
    tensor = tensors_of(graph)["attn.to_v.weight__0__scales"]
    location, offset, _ = place_of(tensor)
    with (graph.parent / location).open("r+b") as file:
        file.seek(offset)
        scale = np.frombuffer(file.read(4), np.float32) * 2
        file.seek(offset)
        file.write(scale.astype(np.float32).tobytes())
    assert worst(run(graph, inputs), expected) > 10 * PARITY


# A template made by hand, for products in every form that the exporter writes them.

ROWS, INNER, OUTER = 12, 256, 96
SLOTS = {"plain": (OUTER, INNER), "gemm": (OUTER, INNER), "columns": (OUTER, 2 * INNER), "rows": (2 * OUTER, INNER)}
BIAS = "bias"
FORMS = {"plain": np.s_[:, :], "gemm": np.s_[:, :], "columns": np.s_[:, INNER:], "rows": np.s_[OUTER:]}


@pytest.fixture(params=[ml_dtypes.bfloat16, np.float16, np.float32], ids=["BF16", "F16", "F32"])
def by_hand(request, tmp_path):
    """(template, binding, refs, reader, weights) of a graph with one product in each form."""
    return make_by_hand(tmp_path, request.param)


def make_by_hand(folder, dtype):
    rng = np.random.default_rng(11)
    shapes = {**SLOTS, BIAS: (OUTER,)}
    weights = {name: (rng.standard_normal(shape) * 0.05).astype(dtype) for name, shape in shapes.items()}
    refs, blob = {}, b"head"  # an odd start: safetensors does not align
    for name, weight in weights.items():
        code = {2: "BF16", 4: "F32"}[weight.itemsize] if dtype != np.float16 else "F16"
        refs[name] = TensorRef(name, folder / "shard.safetensors", code, weight.shape, len(blob), weight.nbytes)
        blob += weight.tobytes() + b"\0"
    (folder / "shard.safetensors").write_bytes(blob)
    nodes = [
        helper.make_node("Transpose", ["plain"], ["plain_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "plain_t"], ["plain_out"]),
        helper.make_node("Gemm", ["v", "gemm", BIAS], ["gemm_out"], transB=1),
        helper.make_node("Slice", ["columns", "inner", "far", "one", "one"], ["columns_s"]),
        helper.make_node("Transpose", ["columns_s"], ["columns_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "columns_t"], ["columns_out"]),
        helper.make_node("Slice", ["rows", "outer", "far", "zero", "one"], ["rows_s"]),
        helper.make_node("Transpose", ["rows_s"], ["rows_t"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "rows_t"], ["rows_out"]),
    ]
    numbers = {"inner": INNER, "outer": OUTER, "far": 1 << 62, "one": 1, "zero": 0}
    inputs = {"x": (1, ROWS, INNER), "v": (1, INNER)}
    outputs = {name: (1, OUTER) if name == "gemm" else (1, ROWS, OUTER) for name in SLOTS}
    graph = helper.make_graph(
        nodes,
        "by_hand",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (inputs | shapes).items()],
        [helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.array([number]), name) for name, number in numbers.items()],
    )
    path = folder / "template.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    template = Template(
        "by_hand",
        "onnx23",
        path,
        "",
        tuple(TensorSpec(name, shape) for name, shape in inputs.items()),
        tuple(TensorSpec(f"{name}_out", shape) for name, shape in outputs.items()),
        tuple(TensorSpec(name, shape) for name, shape in shapes.items()),
    )
    binding = Binding("by_hand", "transformer", tuple(SlotBinding(name, (name,)) for name in shapes))
    return template, binding, refs, weights.__getitem__, weights


def products(weights, scheme, inputs):
    """What the graph made by hand computes, in float64."""
    results = {}
    for name, region in FORMS.items():
        stored = stored_as(scheme, weights[name])[region].astype(np.float64)
        results[f"{name}_out"] = inputs["v" if name == "gemm" else "x"].astype(np.float64) @ stored.T
    results["gemm_out"] += weights[BIAS].astype(np.float64)
    return results


def hand_inputs():
    rng = np.random.default_rng(12)
    shapes = {"x": (1, ROWS, INNER), "v": (1, INNER)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


@pytest.mark.parametrize("scheme", ["F32", *QUANTIZED])
def test_products_in_every_form(by_hand, scheme, tmp_path):
    *given, weights = by_hand
    graph = link_weights(*given, parse_scheme(scheme), tmp_path / "linked.onnx")
    kinds = {node.op_type for node in onnx.load(graph, load_external_data=False).graph.node}
    assert "Transpose" not in kinds
    assert ("MatMulNBits" in kinds) == (scheme in QUANTIZED)
    results = run(graph, hand_inputs())
    for name, expected in products(weights, parse_scheme(scheme), hand_inputs()).items():
        assert rel_l2(results[name], expected) <= EXACT, name


def test_an_odd_number_of_groups_is_padded(tmp_path):
    """Zero points of 4 bits lie two in a byte, row by row: three groups take two bytes."""
    template, binding, refs, _, weights = make_by_hand(tmp_path, np.float32)
    scheme = replace(parse_scheme("W4BF16"), group_size=128)
    graph = link_weights(template, binding, refs, weights.__getitem__, scheme, tmp_path / "even.onnx")
    assert list(tensors_of(graph)["plain__0__zeros"].dims) == [OUTER, 1]
    narrow = link_narrow(tmp_path)
    assert list(tensors_of(narrow[0])["w__0__zeros"].dims) == [8, 2]
    assert rel_l2(run(narrow[0], narrow[1])["y"], narrow[2]) <= EXACT


def link_narrow(folder):
    rng = np.random.default_rng(13)
    weight, x = rng.standard_normal((8, 96)).astype(np.float32), rng.standard_normal((1, 96)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "narrow",
        [helper.make_tensor_value_info("x", 1, [1, 96]), helper.make_tensor_value_info("w", 1, [8, 96])],
        [helper.make_tensor_value_info("y", 1, [1, 8])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, folder / "narrow_template.onnx")
    template = Template("narrow", "onnx23", folder / "narrow_template.onnx", "", (), (), (TensorSpec("w", (8, 96)),))
    binding = Binding("narrow", "transformer", (SlotBinding("w", ("w",)),))
    scheme = parse_scheme("W4BF16-g32")
    path = link_weights(template, binding, {}, lambda slot: weight, scheme, folder / "narrow.onnx")
    return path, {"x": x}, x.astype(np.float64) @ stored_as(scheme, weight).T


def test_what_is_done_to_a_weight_is_done_in_the_graph(tmp_path):
    """Slices, factors and transposes in a row, of tensors that are slots as well and of ones that are not."""
    template, binding, refs, _, weights = make_by_hand(tmp_path, ml_dtypes.bfloat16)
    scale, turn = Transform("scale", factor=-1.5), Transform("transpose")
    lower = Transform("slice", dim=0, start=OUTER, stop=2 * OUTER)
    steps = {"plain": ("rows", (lower, scale)), "gemm": ("gemm", (scale, turn, turn)), BIAS: (BIAS, (scale,))}
    changed = {name: SlotBinding(name, (source,), transforms) for name, (source, transforms) in steps.items()}
    binding = replace(binding, slots=tuple(changed.get(slot.slot, slot) for slot in binding.slots))

    def refuse(slot):
        raise AssertionError(f"{slot} was read")

    graph = link_weights(template, binding, refs, refuse, parse_scheme("F32"), tmp_path / "linked.onnx")
    assert external_files(graph).keys() == {tmp_path / "shard.safetensors"}
    found = {place_of(tensor)[1:] for tensor in tensors_of(graph).values() if tensor.external_data}
    assert found == {(refs[name].offset, refs[name].nbytes) for name in ("gemm", "columns", "rows", BIAS)}
    wide = {name: weight.astype(np.float32) for name, weight in weights.items()}
    computed = {**wide, "plain": wide["rows"][OUTER:] * -1.5, "gemm": wide["gemm"] * -1.5, BIAS: wide[BIAS] * -1.5}
    results = run(graph, hand_inputs())
    for name, expected in products(computed, parse_scheme("F32"), hand_inputs()).items():
        assert rel_l2(results[name], expected) <= EXACT, name


@pytest.mark.parametrize("name", PARTS)
def test_templates_with_derived_slots_read_the_same_bytes(name, link, tiny_checkpoint, tiny_parts, tiny_recording):
    """An opset 17 template, which compilers get, needs no byte but the checkpoint's either."""
    recording = tiny_recording(vae="tiny" if name == "tiny_vae_decoder" else "kl")
    inputs, part, checkpoint = recording.inputs(name), tiny_parts(name), tiny_checkpoint()
    graph = link(name, graph_format="onnx17")
    key = "vae_tiny" if name == "tiny_vae_decoder" else part.component
    whole = {(ref.offset, ref.nbytes) for ref in checkpoint.tensors[key].values()}
    assert {place_of(tensor)[1:] for tensor in tensors_of(graph).values() if tensor.external_data} <= whole
    assert [path.suffix for path in graph.parent.iterdir() if path.is_file()] == [".onnx"]
    expected = PatchedRunner(checkpoint, (part,))(name, inputs)
    assert worst(run(graph, inputs), expected) <= PARITY


def test_joined_weights_go_to_a_file_beside(tmp_path):
    template, binding, refs, _, weights = make_by_hand(tmp_path, ml_dtypes.bfloat16)
    joined = np.concatenate([weights["plain"][: OUTER // 2], weights["gemm"][: OUTER // 2]])
    slot = SlotBinding("plain", ("plain", "gemm"), (Transform("concat"),))
    binding = replace(binding, slots=(slot, *binding.slots[1:]))
    changed = {**weights, "plain": joined}
    graph = link_weights(template, binding, refs, changed.__getitem__, parse_scheme("F32"), tmp_path / "linked.onnx")
    assert external_files(graph).keys() == {tmp_path / "shard.safetensors", tmp_path / "linked.bin"}
    assert (tmp_path / "linked.bin").stat().st_size == joined.nbytes
    expected = products(changed, parse_scheme("F32"), hand_inputs())
    assert rel_l2(run(graph, hand_inputs())["plain_out"], expected["plain_out"]) <= EXACT


def spoil(given, **changes):
    template, binding, refs, reader = given
    ref = replace(refs["plain"], **changes)
    return template, binding, {**refs, "plain": ref}, reader


def test_refusals(tmp_path):
    *given, _ = make_by_hand(tmp_path, ml_dtypes.bfloat16)
    template, binding, refs, reader = given
    target, f32 = tmp_path / "linked.onnx", parse_scheme("F32")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(CompileError, match="hard link"):
        link_weights(*given, f32, tmp_path / "elsewhere" / "linked.onnx")
    (tmp_path / "elsewhere" / "linked.safetensors").symlink_to(tmp_path / "shard.safetensors")
    leaving = spoil(given, file=tmp_path / "elsewhere" / "linked.safetensors")
    with pytest.raises(CompileError, match="hard link"):
        link_weights(*leaving, f32, tmp_path / "elsewhere" / "linked.onnx")
    with pytest.raises(CompileError, match="F8_E4M3"):
        link_weights(*spoil(given, dtype="F8_E4M3"), f32, target)
    with pytest.raises(CompileError, match="plain"):
        link_weights(*spoil(given, shape=(INNER, OUTER)), f32, target)
    with pytest.raises(CompileError, match="onnx17"):
        link_weights(replace(template, format="onnx17"), binding, refs, reader, parse_scheme("W4BF16"), target)
    with pytest.raises(CompileError, match="pt2"):
        link_weights(replace(template, format="pt2"), binding, refs, reader, f32, target)
    with pytest.raises(CompileError, match="binding"):
        link_weights(template, replace(binding, slots=binding.slots[1:]), refs, reader, f32, target)
    assert not target.exists()


def test_group_size_that_does_not_divide_is_refused(link):
    """The tiny VAE's attention is 32 wide."""
    with pytest.raises(SchemeError, match="W4BF16-g32"):
        link("vae_decoder", "W4BF16")
