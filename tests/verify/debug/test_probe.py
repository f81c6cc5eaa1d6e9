"""Faults planted inside a part, and the operation that is named for each."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from fluxkiln.verify.debug.probe import check_linked, check_lowered, check_stored, check_template, look_inside

from fluxkiln.compile.templates import make_template
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Shapes, find_part
from tests.builds import altered

SHAPES = Shapes(height=32, width=32, tokens=16)
LINEAR = "time_text_embed.timestep_embedder.linear_2"


@pytest.fixture(scope="module")
def inside(kiln, tiny_recording):
    """(part, graph format) -> the part looked into, on its second step."""
    recording = tiny_recording("tiny-dev", "kl", SHAPES)

    def make(name, graph_format="onnx17", scheme="W4BF16,tail=W4BF16", target="bm1684x"):
        made = kiln(scheme=scheme, target=target)
        return look_inside(*made, find_part(made.parts, name), recording.inputs(name, 1), graph_format), made

    return make


@pytest.fixture(scope="module")
def compiled(kiln, tpu_mlir, tmp_path_factory):
    """(part, scheme, keep_f32) -> the folder in which TPU-MLIR compiled it with its own weights."""
    from fluxkiln.compile.onnx.filled import pour
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph

    known = {}

    def make(name, scheme, keep_f32=True):
        if (name, scheme, keep_f32) not in known:
            made = kiln(scheme="W4BF16,tail=W4BF16")
            part, folder = find_part(made.parts, name), tmp_path_factory.mktemp(name)
            template = make_template(*made, part.kind, "onnx17")
            activations = frozenset(spec.name for spec in template.inputs)
            reader = weight_reader(bind_part(part, template.slots, made.checkpoint), made.checkpoint)
            pour(template.path, set(activations), reader, folder / "poured.onnx")
            (folder / "work").mkdir()
            job = CompileJob(
                name, part.kind, folder / "poured.onnx", template.path, activations, parse_scheme(scheme), "bm1684x",
                keep_f32=keep_f32,
            )  # fmt: skip
            known[name, scheme, keep_f32] = compile_graph(tpu_mlir, job, folder / "work", folder / "log")
        return known[name, scheme, keep_f32]

    return make


@pytest.fixture
def look(compiled, inside, tpu_mlir, tmp_path):
    """(part, scheme, spoil) -> findings of its lowered graph, after `spoil` changed its text and weights."""
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

    def run(name, scheme, spoil=None, keep_f32=True):
        found = compiled(name, scheme, keep_f32)
        text, weights = found.lowered.read_text(), dict(np.load(found.weights))
        if spoil is not None:
            text = spoil(text, weights) or text
        lowered = tmp_path / "lowered.mlir"
        lowered.write_text(text)
        np.savez(tmp_path / found.weights.name, **weights)
        part, _ = inside(name)
        if scheme != "BF16":  # TPU-MLIR's own rounding
            part, _ = inside(name, scheme=f"{scheme}-rtn,tail={scheme}-rtn")
        with Simulator(tpu_mlir, "bm1684x", tmp_path / "log") as simulator:
            return check_lowered(part, lowered, simulator, scheme)

    return run


def only(weights, pattern):
    (name,) = [name for name in weights if re.fullmatch(pattern, name)]
    return name


@pytest.mark.tpu_mlir
def test_a_sound_part_has_no_culprit(look):
    found = look("head", "BF16")
    assert found.culprit is None
    assert len(found.findings) > 30
    assert 1e-3 < found.noisiest.own < 5e-3, "bfloat16 rounds, and not by more"
    assert look("tail", "W4BF16").culprit is None


@pytest.mark.tpu_mlir
def test_the_sinusoid_is_named_when_it_is_in_bf16(look):
    culprit = look("head", "BF16", keep_f32=False).culprit
    assert (culprit.operation, culprit.lowered) == ("Sub", "tpu.Sub")
    assert culprit.remedy.through == ("/Cos_output_0", "/Sin_output_0")
    assert culprit.finding.missed == "drift"
    assert culprit.finding.own == 0.0, "the subtraction is right in itself"
    assert "quantize table" in culprit.remedy.advice
    assert max(abs(range_.high) for range_ in culprit.inputs.values()) > 100, "the argument it could not hold"


@pytest.mark.tpu_mlir
def test_one_doubled_scale_is_found(look):
    def double(text, weights):
        scales = weights[only(weights, r"sample_Add_scale_bf16|.*MatMul.*_scale_bf16")]
        scales[7, 1] += 0x80  # one more in bfloat16's exponent

    culprit = look("tail", "W4BF16", double).culprit
    assert (culprit.rung, culprit.finding.missed) == ("interpreter", "own")
    assert culprit.finding.value == "sample"
    assert culprit.finding.channels == (7,)
    assert "proj_out.weight__t" in culprit.slots
    assert "1 of 64 channels" in culprit.remedy.cause


@pytest.mark.tpu_mlir
def test_a_swapped_bias_is_found(look):
    def swap(text, weights):
        one, other = (f"time_text_embed.timestep_embedder.linear_{n}.bias_bf16" for n in (1, 2))
        weights[one], weights[other] = weights[other], weights[one]

    culprit = look("head", "BF16", swap).culprit
    assert culprit.finding.value == "/Gemm_output_0"
    assert culprit.finding.missed == "own"
    assert "time_text_embed.timestep_embedder.linear_1.bias" in culprit.slots


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("epsilon", ["1.0E-5", "5.0E-2"])
def test_a_wrong_epsilon_is_found(look, epsilon):
    """Also where it is too small to show in these numbers: the attribute is compared."""

    def change(text, weights):
        changed, count = re.subn(r"(tpu\.LayerNorm.*?eps = )[0-9.E+-]+", rf"\g<1>{epsilon}", text)
        assert count == 1
        return changed

    culprit = look("tail", "W4BF16", change).culprit
    assert (culprit.operation, culprit.lowered) == ("LayerNormalization", "tpu.LayerNorm")
    assert f"epsilon is {float(epsilon):g}" in culprit.remedy.cause


@pytest.mark.tpu_mlir
def test_a_transposed_weight_is_found_in_the_compiled_form(look):
    def transpose(text, weights):
        name = f"{LINEAR}.weight_fix_bf16"
        weights[name] = np.ascontiguousarray(weights[name].T)

    culprit = look("head", "BF16", transpose).culprit
    assert culprit.finding.value == "/Gemm_1_output_0"
    assert f"{LINEAR}.weight" in culprit.slots
    assert culprit.finding.bad_channels > 250


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("graph_format", ["onnx17", "onnx23"])
def test_faults_of_the_export_are_found_against_the_modules(inside, graph_format):
    part, made = inside("single.02", graph_format)
    assert check_template(part, made.checkpoint).culprit is None
    weight, bias = (next(slot for slot in part.weights if slot.startswith(f"attn.to_k.{what}")) for what in WHAT)
    others = {"bias": next(slot for slot in part.weights if slot.startswith("attn.to_q.bias"))}
    spoilt = {
        weight: {**part.weights, weight: np.ascontiguousarray(part.weights[weight].T)},
        bias: {**part.weights, bias: part.weights[others["bias"]], others["bias"]: part.weights[bias]},
    }
    for slot, weights in spoilt.items():
        culprit = check_template(replace(part, weights=weights), made.checkpoint).culprit
        assert culprit.rung == "onnxruntime"
        assert slot in culprit.slots or (slot == bias and others["bias"] in culprit.slots)


WHAT = ("weight", "bias")


@pytest.mark.tpu_mlir
def test_weights_that_a_scheme_cannot_hold_are_named(inside):
    part, _ = inside("single.02")
    assert check_stored(part, "W4BF16").culprit is None
    slot = next(name for name in part.stored if name.startswith("attn.to_v.weight"))
    coarse = {**part.stored, slot: np.sign(part.stored[slot]) * np.abs(part.stored[slot]).mean()}
    culprit = check_stored(replace(part, stored=coarse), "W4BF16").culprit
    assert slot in culprit.slots
    assert "too coarsely" in culprit.remedy.cause


@pytest.mark.parametrize("target", ["cpu", "bm1684x"])
def test_weights_that_are_left_out_are_looked_at_as_they_are(inside, target):
    """Those of a linked graph as the checkpoint has them, those of a bmodel in the scheme's arithmetic: BF16 too."""
    graph_format = "onnx23" if target == "cpu" else "onnx17"
    part, _ = inside("single.02", graph_format, "W4BF16,single.attn.to_q=BF16", target)
    for name, kept in (("attn.to_q.weight", True), ("attn.to_k.weight", False)):
        slots = [slot for slot in part.weights if slot.startswith(name)]
        assert slots
        for slot in slots:
            same = np.array_equal(np.float32(part.stored[slot]), np.float32(part.weights[slot]))
            assert same == kept


@pytest.mark.tpu_mlir
def test_a_fault_in_a_linked_graph_is_found(inside, tmp_path):
    import onnx

    from fluxkiln.compile.onnx.linked import link_parts

    part, made = inside("single.02", "onnx23", "W4BF16", "cpu")
    made = altered(made, parts=(part.part,))
    (graph,) = link_parts(*made, made.schemes, tmp_path / "graphs").values()
    assert check_linked(part, graph, "W4BF16").culprit is None
    model = onnx.load(graph, load_external_data=False)
    products = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    scales = {tensor.name: tensor for tensor in model.graph.initializer}[products[2].input[2]]
    place = {entry.key: entry.value for entry in scales.external_data}
    file = graph.parent / place["location"]
    shutil.copyfile(file, tmp_path / "copy")
    with file.open("r+b") as data:
        data.seek(int(place["offset"]) + 4 * 9)
        data.write((2 * np.frombuffer((tmp_path / "copy").read_bytes(), np.float32, 1, int(place["offset"]) + 36)).data)
    culprit = check_linked(part, graph, "W4BF16").culprit
    assert culprit.finding.value == products[2].output[0]
    assert culprit.finding.bad_channels == 1
