"""The compiler's adapter: what is checked after every compile, and that the checks find what they are for."""

from __future__ import annotations

import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.activations import NewGELUActivation

from fluxkiln.compile.onnx.filled import fill
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import compiler as adapter
from fluxkiln.compile.toolchains.tpu_mlir.compiler import CompileJob, check_fusions, compile_graph, f32_table
from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator
from fluxkiln.errors import CompileError, SchemeError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import find_part
from fluxkiln.verify.gates import first_bad_rung
from tests.builds import chip_ladder

pytestmark = pytest.mark.tpu_mlir


def relative_l2(actual, expected):
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def test_group_that_does_not_divide_is_refused_before_the_compiler_runs(compile_matmul, monkeypatch):
    monkeypatch.setattr(adapter, "run_tool", lambda *_: pytest.fail("a tool was started"))
    with pytest.raises(
        SchemeError, match=r"group size 64 does not divide the 96 input channels of w__t; use W4BF16-g32"
    ):
        compile_matmul(96, "W4BF16")


@pytest.mark.slow
def test_silent_fallback_to_bf16_is_caught(compile_matmul, monkeypatch):
    """The compiler takes such a matmul, says nothing and leaves it unquantized: seen by counting."""
    monkeypatch.setattr(adapter, "check_groups", lambda *_: None)
    with pytest.raises(CompileError, match=r"matmul: 0 weights are stored in 4 bits, scheme W4BF16 asks for 6144"):
        compile_matmul(96, "W4BF16")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["W4BF16-g32", "W8BF16"])
@pytest.mark.parametrize(
    ("chip", "rows"),
    [("bm1684x", 48), ("bm1684x", 96), ("bm1684x", 192), ("bm1688", 24), ("bm1688", 48), ("bm1688", 96)],
)
def test_output_channels_that_a_target_takes_are_the_compilers(compile_matmul, chip, rows, scheme):
    """What `Target.takes_codes` says, compiled: others are cut, and the rest left in BF16, or the compiler fails."""
    if find_target(chip).takes_codes(rows):
        assert compile_matmul(128, scheme, rows, chip)[1].facts["quantized_weights"] == 128 * rows
        return
    with pytest.raises(CompileError, match=r"matmul deploy: the compiler failed|left some rows or a matmul"):
        compile_matmul(128, scheme, rows, chip)


def test_every_weight_of_a_quantized_matmul_is_counted(compile_matmul):
    _, compiled, _ = compile_matmul(128, "W4BF16")
    assert compiled.facts["quantized_weights"] == 128 * 64
    assert compiled.facts["quantized_matmuls"] == 1
    assert compile_matmul()[1].facts["quantized_weights"] == 0


def test_16_bit_inputs_and_outputs_are_checked(compile_matmul):
    job, compiled, _ = compile_matmul(128, "BF16", narrow_inputs=True)
    assert [dtype for _, dtype, _ in compiled.facts["inputs"]] == ["bfloat16"]
    assert [dtype for _, dtype, _ in compiled.facts["outputs"]] == ["float32"]
    with pytest.raises(CompileError, match="matmul: no output is bfloat16"):
        adapter._check(replace(job, narrow_outputs=True), [], compiled.bmodel.parent)


def test_parts_hand_over_16_bits(small_build, cast_and_direct):
    build = small_build()
    _, cast, _ = cast_and_direct(build, "double.01")
    inputs = {name: dtype for name, dtype, _ in cast.facts["inputs"]}
    assert inputs["hidden_states"] == inputs["encoder_hidden_states"] == inputs["rotary_cos"] == "bfloat16"
    assert [dtype for _, dtype, _ in cast.facts["outputs"]] == ["bfloat16", "bfloat16"]
    _, tail, _ = cast_and_direct(build, "tail")
    assert [dtype for _, dtype, _ in tail.facts["outputs"]] == ["float32"]


def test_rope_is_fused_and_unfused_rope_is_caught(small_build, cast_and_direct):
    build = small_build()
    for name, wanted in (("double.01", 4), ("single.02", 2)):
        _, cast, _ = cast_and_direct(build, name)
        assert cast.facts["fused_rope"] >= wanted
        text = build.cache.path(cast.blobs["lowered"]).read_text()
        check_fusions(cast.part.traits.rotated, text, cast.net)
        unfused = text.replace('"tpu.Rope"', '"tpu.Mul"', 1)
        with pytest.raises(CompileError, match=rf"{cast.net}: {wanted - 1} of {wanted} rotary embeddings were fused"):
            check_fusions(cast.part.traits.rotated, unfused, cast.net)
    check_fusions(KINDS["tail"].rotated, "", "tail_00")


def test_sinusoids_and_all_that_feeds_them_stay_in_f32(small_build):
    build = small_build()
    tables = {kind: f32_table(make_template(*build, kind, "onnx17").path) for kind in build.plan.kinds()}
    assert {kind for kind, table in tables.items() if table} == {"head"}
    operations = {name.rpartition("_")[2] for name in tables["head"]}
    assert {"Sin", "Cos"} <= operations
    assert not operations & {"Gemm", "MatMul"}
    # timestep and guidance each have their own
    assert sum(name.endswith("_Sin") for name in tables["head"]) == 2


def test_norms_of_a_decoder_stay_in_f32_where_they_are_told_to(small_build):
    graph = make_template(*small_build(), "vae_decoder", "onnx17").path
    table = f32_table(graph, groups=True)
    assert table
    assert all(name.endswith("_InstanceNormalization_r_GroupNorm") for name in table)
    assert f32_table(graph) == ()


@pytest.fixture(scope="module")
def head(small_build, tpu_mlir, tmp_path_factory):
    """keep_f32 -> temb of the compiled BF16 head at timestep 0.731 and guidance 3.5; None -> the reference's."""
    from fluxkiln.export.eager import PatchedRunner

    build = small_build()
    part = find_part(build.parts, "head")
    template = make_template(*build, "head", "onnx17")
    folder = tmp_path_factory.mktemp("head")
    activations = frozenset(spec.name for spec in template.inputs)
    reader = weight_reader(bind_part(part, template.slots, build.checkpoint), build.checkpoint)
    fill(template.path, set(activations), reader, folder / "head.onnx")

    def make(keep):
        work = folder / str(keep)
        work.mkdir()
        job = CompileJob(
            "head", folder / "head.onnx", template.path, activations, parse_scheme("BF16"), "bm1684x",
            narrow_outputs=True, keep_f32=keep,
        )  # fmt: skip
        return compile_graph(tpu_mlir, job, work, work / "log")

    with ThreadPoolExecutor(2) as pool:
        compiled = dict(zip((True, False), pool.map(make, (True, False)), strict=True))
    random = np.random.default_rng(0)
    inputs = {spec.name: random.standard_normal(spec.shape).astype(np.float32) for spec in template.inputs}
    inputs |= {"timestep": np.float32([0.731]), "guidance": np.float32([3.5])}
    outputs = {None: PatchedRunner(build.checkpoint, build.parts)("head", inputs)}
    with Simulator(tpu_mlir, "bm1684x", folder / "simulator.log") as simulator:
        for keep, made in compiled.items():
            outputs[keep] = simulator.run(made.bmodel, inputs, KINDS["head"].outputs)
    return outputs


def test_time_embedding_is_lost_in_bf16_and_kept_in_f32(head):
    lost, kept = (relative_l2(head[keep]["temb"], head[None]["temb"]) for keep in (False, True))
    assert lost > 0.2
    assert kept <= 1e-2
    # everything else of the head is as good either way
    for output in ("hidden_states_out", "encoder_hidden_states_out"):
        assert relative_l2(head[False][output], head[None][output]) <= 6e-3


@pytest.mark.parametrize("keep", [True, False])
def test_time_embedding_in_bf16_fails_its_gate(head, keep):
    ladder = chip_ladder()
    for output, reference in head[None].items():
        rungs = [("patched", reference), ("simulator", head[keep][output])]
        ladder.compare("head", KINDS["head"], output, 0, reference, None, rungs, "BF16")
    assert first_bad_rung(ladder.rows) == ({} if keep else {"head": "simulator"})
    assert {row.output for row in ladder.rows if not row.passed} == (set() if keep else {"temb"})


class TanhGelu(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.gelu(x, approximate="tanh")


def test_gelu_spelt_with_pow_becomes_another_function(tpu_mlir, tmp_path):
    """Why T5's blocks are traced with torch's own tanh GELU: the compiler takes transformers' spelling for erf GELU."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 8, 64)).astype(np.float32))
    modules = {"pow": NewGELUActivation(), "tanh": TanhGelu()}
    for name, module in modules.items():
        (tmp_path / name).mkdir()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module, (x,), str(tmp_path / f"{name}.onnx"), dynamo=False, opset_version=17, input_names=["x"],
                output_names=["y"],
            )  # fmt: skip

    def make(name):
        graph = tmp_path / f"{name}.onnx"
        job = CompileJob(name, graph, graph, frozenset({"x"}), parse_scheme("F32"), "bm1684x")
        return compile_graph(tpu_mlir, job, tmp_path / name, tmp_path / name / "log")

    with ThreadPoolExecutor(2) as pool:
        compiled = dict(zip(modules, pool.map(make, modules), strict=True))
    errors = {}
    with Simulator(tpu_mlir, "bm1684x", tmp_path / "simulator.log") as simulator:
        for name, module in modules.items():
            made = simulator.run(compiled[name].bmodel, {"x": x.numpy()}, ("y",))["y"]
            errors[name] = relative_l2(made, module(x.double()).numpy())
    assert errors["pow"] > 1e-5
    assert errors["tanh"] <= 1e-6


def test_equal_inputs_give_equal_files(compile_matmul, tpu_mlir, tmp_path):
    job, compiled, _ = compile_matmul()
    again = compile_graph(tpu_mlir, job, tmp_path, tmp_path / "log")
    assert again.bmodel.read_bytes() == compiled.bmodel.read_bytes()


def test_failing_compiler_is_shown_with_its_log(compile_matmul, tpu_mlir, tmp_path):
    job, *_ = compile_matmul()
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"this is no graph")
    (tmp_path / "work").mkdir()
    with pytest.raises(CompileError, match=r"matmul transform: the compiler failed with exit code \d+") as raised:
        compile_graph(tpu_mlir, replace(job, graph=broken), tmp_path / "work", tmp_path / "log")
    assert str(tmp_path / "log") in str(raised.value)
    assert re.search(r"(?i)error", str(raised.value))
