"""Executor cmodel: what it refuses before a simulator starts. `tests/generate/test_executing.py` paints with it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from fluxkiln.compile.executor import Net
from fluxkiln.compile.toolchains.tpu_mlir import environment as tpu_mlir_env
from fluxkiln.compile.toolchains.tpu_mlir import executors as cmodel
from fluxkiln.compile.toolchains.tpu_mlir.executors import NET_SECONDS, count_costliest
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import TOOLCHAIN
from fluxkiln.errors import CompileError, ToolchainError, UsageError
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Shapes, TensorSpec

SHAPES = Shapes(64, 64, 32)


@pytest.fixture
def nets(tmp_path):
    """A block of a million weights at 4 bits, and modulation that runs once."""
    file = tmp_path / "transformer.bmodel"
    file.write_bytes(b"bmodel")
    inputs, outputs = (TensorSpec("hidden_states", (1, 4), "bf16"),), (TensorSpec("hidden_states_out", (1, 4), "bf16"),)
    kinds = {"single.00": ("single_modulated", 546_875), "single_modulation.00": ("single_modulation", 10**9)}
    return {part: Net(part, KINDS[kind], file, part, inputs, outputs, size) for part, (kind, size) in kinds.items()}


SCHEMES = {"single_modulated": "W4BF16", "single_modulation": "BF16"}


def work_of(nets, **others):
    return count_costliest(
        nets, MODEL.weight_uses(SHAPES), {kind: parse_scheme(name) for kind, name in {**SCHEMES, **others}.items()}
    )


def opened(nets):
    """What the executor is opened on."""
    entries = [SimpleNamespace(kind=kind, scheme=scheme) for kind, scheme in SCHEMES.items()]
    manifest = SimpleNamespace(parts=entries, shapes=SHAPES)
    bundle = SimpleNamespace(nets=nets, manifest=manifest, model=MODEL, target=SimpleNamespace(chip="bm1684x"))
    bundle.sizes, bundle.at = (SHAPES,), lambda shapes: bundle
    return bundle


def test_work_is_weights_times_tokens(nets):
    assert work_of(nets) == pytest.approx(1e6 * 48)
    assert work_of(nets, single_modulated="F32") == pytest.approx(546_875 / 4 * 48)


def test_a_large_model_is_refused_before_anything_starts(nets, monkeypatch):
    monkeypatch.setattr(cmodel, "MOST_MULTIPLICATIONS", 1e6)
    with pytest.raises(UsageError) as caught:
        TOOLCHAIN.open_executor(opened(nets), None, {})
    assert all(word in str(caught.value) for word in ("64x64", "4.8e+07", "minutes", "--executor sail"))


def test_missing_toolchain(nets, tmp_path, monkeypatch):
    monkeypatch.setenv(tpu_mlir_env.TPU_MLIR_ROOT_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(ToolchainError, match="executor cmodel needs TPU-MLIR") as caught:
        TOOLCHAIN.open_executor(opened(nets), "cmodel", {})
    assert caught.value.exit_code == 5


@pytest.mark.tpu_mlir
def test_inputs_are_checked_before_the_simulator_sees_them(nets):
    executor = TOOLCHAIN.open_executor(opened(nets), "cmodel", {})
    assert executor.step_seconds == pytest.approx(0.96 + NET_SECONDS)
    with pytest.raises(CompileError, match=r"hidden_states has shape \[1, 5\]"):
        executor("single.00", {"hidden_states": np.zeros((1, 5))})
    assert executor._simulator is None
    executor.close()
