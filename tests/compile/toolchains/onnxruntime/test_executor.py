"""Executor ort: parts of a linked bundle, sessions that open and close, and files that are not there."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.compile.executor import Net
from fluxkiln.compile.toolchains.onnxruntime.executor import OrtExecutor
from fluxkiln.errors import CompileError, UsageError


@pytest.fixture
def nets(link, tmp_path):
    made = {}
    for name, kind in (("t5_final", "t5_final"), ("t5_embed", "t5_embed"), ("tail", "tail")):
        link(name)
        made[name] = Net(name, kind, tmp_path / f"{name}.onnx", name, (), ())
    return made


def test_outputs_are_the_references(nets, tiny_recording):
    recording = tiny_recording()
    executor = OrtExecutor(nets, threads=1)
    for part in nets:
        for name, expected in recording.outputs(part).items():
            made = executor(part, recording.inputs(part))[name]
            np.testing.assert_allclose(made, expected, rtol=0, atol=2e-5)
            assert np.abs(made).max() > 1e-2


def test_components_are_loaded_and_released(nets):
    executor = OrtExecutor(nets, threads=1)
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


def test_many_cores_and_many_sessions_share_a_limit_of_threads(nets, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    assert OrtExecutor(nets).threads == 0
    many = {f"{part}.{i}": net for i in range(50) for part, net in nets.items()}
    assert OrtExecutor(many).threads == 26
    assert OrtExecutor(many, threads=64).threads == 64


def test_what_is_refused(nets):
    executor = OrtExecutor(nets, threads=1)
    with pytest.raises(CompileError, match=r"no part 'head'; it has t5_final"):
        executor("head", {})
    with pytest.raises(CompileError, match="is missing or one too many"):
        executor("t5_final", {})
    nets["tail"].file.unlink()
    with pytest.raises(UsageError, match="without the executor's binaries"):
        OrtExecutor(nets)
