"""The simulator's process: right answers, and one sentence when there is none."""

from __future__ import annotations

import numpy as np
import pytest

from fluxkiln.compile.toolchains.tpu_mlir.executors import Simulator
from fluxkiln.errors import CompileError, ResourceError

pytestmark = pytest.mark.tpu_mlir
X = np.random.default_rng(5).standard_normal((1, 8, 128)).astype(np.float32)


@pytest.fixture
def simulator(tpu_mlir, tmp_path):
    with Simulator(tpu_mlir, "bm1684x", tmp_path / "logs" / "simulator.log") as simulator:
        yield simulator


@pytest.mark.parametrize(("scheme", "bound"), [("F32", 1e-6), ("BF16", 6e-3)])
def test_simulator_and_interpreter_compute_the_matmul(simulator, compile_matmul, scheme, bound):
    _, compiled, weight = compile_matmul(128, scheme, **({"narrow_inputs": True} if scheme == "BF16" else {}))
    expected = X @ weight.T
    results = [simulator.run(file, {"x": X}, ("y",))["y"] for file in (compiled.bmodel, compiled.lowered)]
    for result in results:
        assert result.dtype == np.float32
        assert np.linalg.norm(result - expected) / np.linalg.norm(expected) <= bound


def test_bad_requests_are_named_and_do_not_end_the_process(simulator, compile_matmul, tmp_path):
    _, compiled, _ = compile_matmul()
    with pytest.raises(CompileError, match=r"no net 'double_07', there are matmul"):
        simulator.run(compiled.bmodel, {"x": X}, ("y",), "double_07")
    with pytest.raises(CompileError, match=r"input x has shape \(1, 8, 64\), not \(1, 8, 128\)"):
        simulator.run(compiled.bmodel, {"x": X[..., :64]}, ("y",))
    with pytest.raises(CompileError, match="has 1 outputs, 2 are expected"):
        simulator.run(compiled.bmodel, {"x": X}, ("y", "z"))
    with pytest.raises(CompileError, match=r"simulator\.log"):
        simulator.run(compiled.bmodel, {}, ("y",))
    assert np.isfinite(simulator.run(compiled.bmodel, {"x": X}, ("y",))["y"]).all()


def test_killed_process_names_memory(simulator, compile_matmul):
    _, compiled, _ = compile_matmul()
    simulator._process.kill()
    simulator._process.wait()
    with pytest.raises(ResourceError, match=r"the process ended with code -9 \(-9: killed for memory\)"):
        simulator.run(compiled.bmodel, {"x": X}, ("y",))


def test_nothing_is_left_behind(tpu_mlir, tmp_path):
    with Simulator(tpu_mlir, "bm1684x", tmp_path / "log") as simulator:
        scratch, process = simulator._scratch.name, simulator._process
    assert process.poll() is not None
    assert not tmp_path.joinpath(scratch).exists()
