"""OpenVINO itself on linked graphs of tiny-dev: what it computes, in what, and what is said where it cannot."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fluxkiln.compile.executor import Net, require_file
from fluxkiln.compile.onnx.external_data import external_range
from fluxkiln.compile.onnx.link import read_interface
from fluxkiln.compile.toolchains.onnxruntime.toolchain import OrtExecutor
from fluxkiln.compile.toolchains.openvino import toolchain as ours
from fluxkiln.compile.toolchains.openvino.toolchain import TOOLCHAIN, OpenVinoExecutor, find_device, precision
from fluxkiln.errors import CompileError, IntegrityError, ToolchainError, UsageError
from fluxkiln.export.eager import load_whole
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.verify.ladder import Ladder

openvino = pytest.importorskip("openvino", reason="OpenVINO is not installed: make env")

KIND_PARTS = ("clip", "t5_embed", "t5_block.01", "t5_final", "head", "double.01", "single.02", "tail", "vae_decoder",
              "tiny_vae_decoder")  # fmt: skip
CODED = ("double.01", "single.02", "t5_block.01")


def has_bf16() -> bool:
    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def net_of(part, graph):
    return Net(part, KINDS[part.partition(".")[0]], graph, part, *read_interface(graph))


def run_on(graphs, scheme="F32", **options):
    nets = {part: net_of(part, graph) for part, graph in graphs.items()}
    return OpenVinoExecutor(nets, dict.fromkeys(nets, parse_scheme(scheme)), {"threads": 1, **options})


def judged(recording, part, made, scheme, below=None, step=0):
    """Rows of a part's outputs at the rung of the bundle's graphs; `below`: outputs of a rung under it."""
    ladder, kind = Ladder(TOOLCHAIN.rungs, TOOLCHAIN.gates), KINDS[part.partition(".")[0]]
    inputs, bases = recording.inputs(part, step), dict(kind.residual)
    for name, expected in recording.outputs(part, step).items():
        rungs = [("dequantized", below[name])] if below else []
        base = inputs[bases[name]] if name in bases else None
        ladder.compare(part, kind, name, step, expected, base, [*rungs, ("executed", made[name])], scheme)
    return ladder.rows


def missed(rows):
    return {verdict.gate.metric for row in rows for verdict in row.verdicts if not verdict.passed}


@pytest.mark.parametrize("part", KIND_PARTS)
def test_float32_is_the_references(link, tiny_recording, part):
    recording = tiny_recording("tiny-dev", "tiny" if part.startswith("tiny") else "kl")
    executor = run_on({part: link(part)})
    rows = judged(recording, part, executor(part, recording.inputs(part)), "F32")
    assert missed(rows) == set()
    assert "bfloat16" not in executor.facts["device"]


@pytest.mark.parametrize("scheme", ["W8BF16", "W4BF16"])
@pytest.mark.parametrize("part", CODED)
def test_codes_are_read_as_onnx_runtime_reads_them(link, tiny_recording, part, scheme):
    """Both in float32; what is multiplied is the weight that the codes stand for."""
    graph, inputs = link(part, scheme), tiny_recording().inputs(part)
    below = OrtExecutor({part: graph}, {part: "any"}, threads=1)(part, inputs)
    executor = OpenVinoExecutor({part: net_of(part, graph)}, {part: parse_scheme("F32")}, {"threads": 1})
    for name, made in executor(part, inputs).items():
        assert np.linalg.norm(made - below[name]) <= 5e-6 * np.linalg.norm(below[name])


def test_a_changed_scale_is_seen(link, tiny_recording, tmp_path):
    import onnx

    part, scheme = "single.02", "W4BF16"
    graph, recording = link(part, scheme), tiny_recording()
    inputs = recording.inputs(part)
    below = OrtExecutor({part: graph}, {part: "any"}, threads=1)(part, inputs)
    whole = run_on({part: graph}, scheme)(part, inputs)
    assert missed(judged(recording, part, whole, scheme, below)) == set()
    model = onnx.load(graph, load_external_data=False)
    scales = next(one for one in model.graph.initializer if one.name.endswith("__scales"))
    location, offset, length = external_range(scales)
    with (graph.parent / location).open("r+b") as file:
        stored = np.frombuffer((graph.parent / location).read_bytes()[offset : offset + length], np.float32)
        file.seek(offset)
        file.write((stored * 1.5).tobytes())
    spoiled = run_on({part: graph}, scheme)(part, inputs)
    assert "relative_l2" in missed(judged(recording, part, spoiled, scheme, below))


def test_what_embeds_the_timestep_is_float32_whatever_the_scheme():
    asked = {name: precision(kind, parse_scheme("BF16")) for name, kind in KINDS.items()}
    assert {name for name, one in asked.items() if one == "f32"} == {"head", "time_embed"}
    assert set(asked.values()) == {"f32", "bf16"}
    assert {precision(kind, parse_scheme("F32")) for kind in KINDS.values()} == {"f32"}
    # another device has 16 bits as float16, which T5 leaves
    elsewhere = {name: precision(kind, parse_scheme("W4BF16"), "GPU") for name, kind in KINDS.items()}
    assert {name for name, one in elsewhere.items() if one == "f32"} == {"head", "time_embed", "t5_block", "t5_final"}
    assert elsewhere["single"] == "f16"


def test_the_arithmetic_is_read_back(link, tiny_recording):
    graphs = {part: link(part) for part in ("head", "single.02")}
    executor = run_on(graphs, "BF16")
    assert executor.facts["device"].startswith("CPU (")
    assert not executor.ran
    for part in graphs:
        executor.load("transformer")
        assert missed(judged(tiny_recording(), part, executor(part, tiny_recording().inputs(part)), "BF16")) == set()
    told = "float32 in head, bfloat16 otherwise" if has_bf16() else "float32"
    assert executor.ran == {"products on CPU": told}
    assert executor.facts["device"].endswith(f", {told}")


def test_a_head_in_bfloat16_is_caught(tiny_checkpoint, tiny_parts, tiny_recording):
    """By PyTorch's arithmetic, which any CPU has."""
    recording, part = tiny_recording(), tiny_parts("head")
    module = load_whole(part, tiny_checkpoint()).to(torch.bfloat16)
    inputs = recording.inputs("head", 1)
    given = [torch.from_numpy(np.array(inputs[name])).to(torch.bfloat16) for name in part.traits.inputs]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.no_grad():
            results = module(*given)
    finally:
        torch.set_default_dtype(torch.float32)
    made = dict(zip(part.traits.outputs, (one.float().numpy() for one in results), strict=True))
    assert "relative_l2" in missed(judged(recording, "head", made, "BF16", step=1))


@pytest.mark.skipif("not has_bf16()", reason="this CPU has no arithmetic in bfloat16")
def test_openvino_too_is_caught_with_a_head_in_bfloat16(link, tiny_recording, monkeypatch):
    monkeypatch.setattr(ours, "precision", lambda *given: "bf16")
    recording, executor = tiny_recording(), run_on({"head": link("head")}, "BF16")
    assert "relative_l2" in missed(
        judged(recording, "head", executor("head", recording.inputs("head", 1)), "BF16", step=1)
    )


def test_devices_that_are_not_there():
    core = SimpleNamespace(available_devices=["CPU", "GPU.0", "GPU.1"])
    assert [find_device(core, asked) for asked in (None, "cpu", "GPU.1")] == ["CPU", "CPU", "GPU.1"]
    with pytest.raises(ToolchainError, match=r"--device NPU: OpenVINO finds CPU, GPU.0, GPU.1 on this machine"):
        find_device(core, "NPU")
    with pytest.raises(UsageError, match="--device 0: OpenVINO's devices have names"):
        find_device(core, 0)


def test_without_openvino_or_with_an_old_one(monkeypatch):
    monkeypatch.setattr(openvino, "__version__", "2025.3.0-1-abc")
    with pytest.raises(ToolchainError, match=r"OpenVINO 2025.3.0-1-abc cannot read these graphs, 2026.4 is needed"):
        run_on({})
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ToolchainError, match=r"OpenVINO is not installed .*; pip install 'fluxkiln\[openvino\]'"):
        run_on({})


def test_what_is_refused(link, tiny_recording):
    graph, inputs = link("single.02", "W4BF16"), tiny_recording().inputs("single.02")
    executor = run_on({"single.02": graph}, "W4BF16")
    with pytest.raises(CompileError, match=r"there is no part 'head'; there are single.02"):
        executor("head", {})
    with pytest.raises(CompileError, match="it was compiled for"):
        executor("single.02", {name: values[:, :-1] for name, values in inputs.items()})
    executor.close()
    sidecar = graph.with_suffix(".q4.bin")
    with sidecar.open("r+b") as file:
        file.truncate(sidecar.stat().st_size // 2)
    with pytest.raises(IntegrityError, match=r"single.02.onnx reads \d+ bytes of it"):
        executor("single.02", inputs)
    graph.write_bytes(b"no graph")
    with pytest.raises(IntegrityError, match="is no ONNX graph"):
        executor("single.02", inputs)
    graph.unlink()
    with pytest.raises(UsageError, match="without the executor's binaries"):
        require_file(executor.nets["single.02"])
