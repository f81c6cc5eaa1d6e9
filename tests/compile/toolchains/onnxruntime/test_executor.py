"""Executor ort: parts of a linked bundle, sessions that open and close, and files that are not there."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fluxkiln.compile.executor import Net
from fluxkiln.compile.toolchains.onnxruntime.toolchain import TOOLCHAIN, OrtExecutor
from fluxkiln.errors import CompileError, UsageError
from fluxkiln.patches.flux1.kinds import KINDS


@pytest.fixture
def graphs(link):
    return {name: link(name) for name in ("t5_final", "t5_embed", "tail")}


def run_on(graphs, **options):
    return OrtExecutor(graphs, {part: KINDS[part.partition(".")[0]].component for part in graphs}, **options)


def test_outputs_are_the_references(graphs, tiny_recording):
    recording = tiny_recording()
    executor = run_on(graphs, threads=1)
    for part in graphs:
        for name, expected in recording.outputs(part).items():
            made = executor(part, recording.inputs(part))[name]
            np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5)
            assert np.abs(made).max() > 1e-2


def test_components_are_loaded_and_released(graphs):
    executor = run_on(graphs, threads=1)
    assert not executor.sessions
    executor.load("text_encoder_2")
    assert set(executor.sessions) == {"t5_final", "t5_embed"}
    executor.load("transformer")
    executor.release("text_encoder_2")
    assert set(executor.sessions) == {"tail"}
    executor.drop("tail")
    executor.drop("tail")
    executor.release("vae")
    assert not executor.sessions
    assert executor.facts["runtime"].startswith("ONNX Runtime ")


def test_many_cores_and_many_sessions_share_a_limit_of_threads(graphs, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert run_on(graphs).threads == 0
    many = {f"{part}.{i}": graph for i in range(50) for part, graph in graphs.items()}
    assert run_on(many).threads == 26
    assert run_on(many, threads=64).threads == 64


def test_what_is_refused(graphs):
    executor = run_on(graphs, threads=1)
    with pytest.raises(CompileError, match=r"no part 'head'; there are t5_final"):
        executor("head", {})
    with pytest.raises(CompileError, match="is missing or one too many"):
        executor("t5_final", {})


def test_a_bundle_without_its_graphs_is_refused(tmp_path):
    net = Net("tail", KINDS["tail"], tmp_path / "tail.onnx", "tail", (), ())
    bundle = SimpleNamespace(nets={"tail": net}, manifest=SimpleNamespace(parts=[SimpleNamespace(scheme="BF16")]))
    with pytest.raises(UsageError, match="without the executor's binaries"):
        TOOLCHAIN.open_executor(bundle, "ort", {})
