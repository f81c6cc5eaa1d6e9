"""Faults planted inside a part, and the operation that is named for each."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.rungs import check_lowered, lowered_run, lowered_values
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import find_part

LOWERED = """
    %3 = "tpu.Cast"(%1) {with_scale = true} : (tensor<2xf32>) -> tensor<2xbf16> loc(#loc1)
    %4 = "tpu.LayerNorm"(%3, %0) {eps = 9.9999999747524271E-7 : f64} : (a, b) -> tensor<2xbf16> loc(#loc2)
    %5 = "top.Weight"() : () -> tensor<2xbf16> loc(#loc4)
    %6 = "tpu.A16MatMul"(%4, %5) {bits = 4} : (a, b) -> tensor<2x3xbf16> loc(#loc3)
#loc1 = loc("x/Norm_output_0_LayerNormalization_bf16")
#loc2 = loc("/Norm_output_0_LayerNormalization")
#loc3 = loc("/Add_1_output_0_Add")
#loc4 = loc("/Add_1_output_0_Add_scale_bf16")
"""
LINEAR = "time_text_embed.timestep_embedder.linear_2"


@pytest.fixture(scope="module")
def compiled(small_build, tpu_mlir, tmp_path_factory):
    """(part, scheme, keep_f32) -> the folder in which TPU-MLIR compiled it with its own weights."""
    from fluxkiln.compile.onnx.filled import fill
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, compile_graph

    known = {}

    def make(name, scheme, keep_f32=True):
        if (name, scheme, keep_f32) not in known:
            made = small_build(scheme="W4BF16,tail=W4BF16")
            part, folder = find_part(made.parts, name), tmp_path_factory.mktemp(name)
            template = make_template(*made, part.kind, "onnx17")
            activations = frozenset(spec.name for spec in template.inputs)
            reader = weight_reader(bind_part(part, template.slots, made.checkpoint), made.checkpoint)
            fill(template.path, set(activations), reader, folder / "filled.onnx")
            (folder / "work").mkdir()
            job = CompileJob(
                name, folder / "filled.onnx", template.path, activations, parse_scheme(scheme), "bm1684x",
                keep_f32=keep_f32,
            )  # fmt: skip
            known[name, scheme, keep_f32] = compile_graph(tpu_mlir, job, folder / "work", folder / "log")
        return known[name, scheme, keep_f32]

    return make


@pytest.fixture
def look(compiled, opened, tpu_mlir, tmp_path):
    """(part, scheme, spoil) -> findings of its lowered graph, after `spoil` changed its text and weights."""
    from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator

    def run(name, scheme, spoil=None, keep_f32=True):
        found = compiled(name, scheme, keep_f32)
        text, weights = found.lowered.read_text(), dict(np.load(found.weights))
        if spoil is not None:
            text = spoil(text, weights) or text
        lowered = tmp_path / "lowered.mlir"
        lowered.write_text(text)
        np.savez(tmp_path / found.weights.name, **weights)
        part, _ = opened(name)
        if scheme != "BF16":  # TPU-MLIR's own rounding
            part, _ = opened(name, f"{scheme}-rtn,tail={scheme}-rtn")
        with Simulator(tpu_mlir, "bm1684x", tmp_path / "log") as simulator:
            return check_lowered(replace(part, scheme=scheme), lowered, simulator)

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


def test_names_of_a_lowered_graph():
    found = lowered_values(LOWERED, ("/Norm_output_0", "/Add_1_output_0", "/Gone_output_0"))
    assert {value: form.output for value, form in found.items()} == {
        "/Norm_output_0": "/Norm_output_0_LayerNormalization",
        "/Add_1_output_0": "/Add_1_output_0_Add",
    }
    assert found["/Norm_output_0"].epsilon == pytest.approx(1e-6)
    assert (found["/Add_1_output_0"].op_type, found["/Add_1_output_0"].epsilon) == ("tpu.A16MatMul", None)


def test_lowered_values_get_the_template_s_shapes():
    found = lowered_values(LOWERED, ("/Norm_output_0", "/Add_1_output_0"))
    made = {"/Norm_output_0_LayerNormalization": np.arange(6.0), "/Add_1_output_0_Add": np.arange(4.0)}
    below = dict.fromkeys(found, np.zeros((2, 3)))
    seen = lowered_run(lambda names: {name: made[name] for name in names}, found, below)
    assert list(seen) == ["/Norm_output_0"], "another size cannot be compared"
    assert seen["/Norm_output_0"].shape == (2, 3)
