"""Executor sail against a double of the documented interface: order, bits, memory, refusals. No board has run it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fluxkiln.compile.executor import Net
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.executors import DTYPES, SailExecutor
from fluxkiln.compile.toolchains.tpu_mlir.moulds import cast_part, make_mould
from fluxkiln.errors import CompileError, ResourceError, ToolchainError, UsageError
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.types import TensorSpec
from tests.compile.boards import sail

IN = (TensorSpec("hidden_states", (1, 4), "bfloat16"), TensorSpec("position_bias", (2,), "float32"))
OUT = (TensorSpec("hidden_states_out", (1, 4), "bfloat16"),)


def widened(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def add(hidden, bias):
    assert hidden.dtype == np.uint16
    total = widened(hidden) + bias.sum()
    return ((total.view(np.uint32) >> 16).astype(np.uint16),)


GRAPHS = {
    "text_encoder_2.bmodel": {"t5_block_00": (["a", "b"], ["c"], add)},
    "vae.bmodel": {"vae": (["latents"], ["image"], lambda latents: (latents * 2,))},
}


@pytest.fixture
def nets(tmp_path):
    for name in GRAPHS:
        (tmp_path / name).write_bytes(b"bmodel")
    vae = (TensorSpec("latents", (1, 2), "float32"),), (TensorSpec("image", (1, 2), "float32"),)
    return {
        "t5_block.00": Net(
            "t5_block.00", KINDS["t5_block"], tmp_path / "text_encoder_2.bmodel", "t5_block_00", IN, OUT
        ),
        "vae_decoder": Net("vae_decoder", KINDS["vae_decoder"], tmp_path / "vae.bmodel", "vae", *vae),
    }


@pytest.fixture
def library(monkeypatch):
    def install(**arguments):
        module = sail(GRAPHS, **arguments)
        monkeypatch.setitem(sys.modules, "sophon", module)
        monkeypatch.setitem(sys.modules, "sophon.sail", module)
        return module

    return install


def test_values_pass_as_their_bits(nets, library):
    module = library()
    executor = SailExecutor(nets)
    hidden = np.array([[1.0, -2.5, 3.1415926, 1e-3]], np.float32)
    made = executor("t5_block.00", {"hidden_states": hidden, "position_bias": np.array([0.5, 0.5], np.float64)})
    assert made["hidden_states_out"].dtype == np.float32
    np.testing.assert_allclose(made["hidden_states_out"], hidden + 1, rtol=2**-7)
    assert np.abs(made["hidden_states_out"] - hidden).min() > 0.5
    assert module.loaded == ["text_encoder_2.bmodel"]
    assert executor.facts["device"] == "BM1684X 0"


def test_a_board_has_a_number(nets, library):
    library()
    with pytest.raises(UsageError, match="--device GPU: boards have numbers"):
        SailExecutor(nets, "GPU")


@pytest.mark.tpu_mlir
def test_the_words_of_compiled_nets_are_known(small_build):
    made = small_build()
    part = next(part for part in made.parts if part.traits.is_block and part.component == "transformer")
    binary = cast_part(made.plan, part, make_mould(*made, make_template(*made, part.kind, "onnx17")))
    words = {dtype for side in ("inputs", "outputs") for _, dtype, _ in binary.facts[side]}
    assert {"bfloat16"} <= words <= DTYPES.keys()


def test_files_are_loaded_once_and_released(nets, library):
    module = library()
    executor = SailExecutor(nets)
    executor.load("text_encoder_2")
    inputs = {"hidden_states": np.ones((1, 4), np.float32), "position_bias": np.zeros(2)}
    executor("t5_block.00", inputs)
    assert module.loaded == ["text_encoder_2.bmodel"]
    executor.release("text_encoder_2")
    executor("vae_decoder", {"latents": np.ones((1, 2))})
    executor("t5_block.00", inputs)
    assert module.loaded == ["text_encoder_2.bmodel", "vae.bmodel", "text_encoder_2.bmodel"]


CUT = {f"transformer.{n}.bmodel": {"single": (["a", "b"], ["c"], add)} for n in range(3)}
CUT |= {"modulation.bmodel": {"one": (["a"], ["b"], lambda a: (a,)), "two": (["a"], ["b"], lambda a: (a,))}}


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """A transformer in three files, and its modulation; the executor on a host with five chips, from the second on."""
    row = (TensorSpec("temb", (1, 2), "float32"),), (TensorSpec("shift", (1, 2), "float32"),)
    nets = {}
    for name in CUT:
        (tmp_path / name).write_bytes(b"bmodel")
        for net in CUT[name]:
            part, kind = (f"{net}.{name[12]}", "single_modulated") if net == "single" else (net, "single_modulation")
            sides = (IN, OUT) if net == "single" else row
            nets[part] = Net(part, KINDS[kind], tmp_path / name, net, *sides)
    module = sail(CUT, devices=5)
    monkeypatch.setitem(sys.modules, "sophon", module)
    monkeypatch.setitem(sys.modules, "sophon.sail", module)
    return nets, module


def test_files_of_a_cut_transformer_are_on_chips_of_their_own(cut):
    nets, module = cut
    executor = SailExecutor(nets, 1)
    hidden = np.ones((1, 4), np.float32)
    for number in range(3):
        made = executor(f"single.{number}", {"hidden_states": hidden, "position_bias": np.array([0.5, 0.5])})
        hidden = made["hidden_states_out"]
    np.testing.assert_array_equal(hidden, 4.0)
    assert module.places == {f"transformer.{number}.bmodel": 1 + number for number in range(3)}
    assert executor.facts["device"].startswith("BM1684X 1 to 3, one after the other")
    with pytest.raises(ToolchainError, match="the bundle takes 3 chips, 3 to 5: sophon-sail sees 5 devices"):
        SailExecutor(nets, 3)


def test_what_modulates_is_gone_before_the_transformer_comes(cut):
    """As the plan of the devices has it: the two need not fit together."""
    nets, module = cut
    executor = SailExecutor(nets)
    executor.load("transformer")
    assert module.resident == ["modulation.bmodel"]
    for part in ("one", "two"):
        executor(part, {"temb": np.ones((1, 2), np.float32)})
        assert module.resident == ["modulation.bmodel"]
        executor.drop(part)
    assert module.resident == []
    executor("single.0", {"hidden_states": np.ones((1, 4), np.float32), "position_bias": np.zeros(2)})
    assert module.resident == ["transformer.0.bmodel"]
    executor.drop("one")
    executor("one", {"temb": np.ones((1, 2), np.float32)})
    executor.release("transformer")
    assert module.resident == []


def test_a_file_shared_with_another_component_stays(nets, library, tmp_path):
    from dataclasses import replace

    module = library()
    shared = {name: replace(net, file=tmp_path / "text_encoder_2.bmodel") for name, net in nets.items()}
    executor = SailExecutor(shared)
    executor.load("text_encoder_2")
    executor.release("text_encoder_2")
    executor.load("text_encoder_2")
    assert module.loaded == ["text_encoder_2.bmodel"]


def test_a_wheel_of_another_machine_is_named(nets, tmp_path, monkeypatch):
    package = tmp_path / "sophon"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "sail.cpython-38-aarch64-linux-gnu.so").touch()
    for name in ("sophon", "sophon.sail"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        ToolchainError, match=r"sail\.cpython-38-aarch64-linux-gnu\.so, is for another machine or Python"
    ):
        SailExecutor(nets)
    monkeypatch.delitem(sys.modules, "sophon")
    (package / "sail.cpython-38-aarch64-linux-gnu.so").unlink()
    with pytest.raises(ToolchainError, match="it is not here"):
        SailExecutor(nets)
    monkeypatch.delitem(sys.modules, "sophon")


def test_what_is_refused(nets, library, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sophon", None)
    with pytest.raises(ToolchainError, match="sophon-sail") as caught:
        SailExecutor(nets)
    assert caught.value.exit_code == 5
    library(devices=0)
    with pytest.raises(ToolchainError, match="device 0: sophon-sail sees 0 devices"):
        SailExecutor(nets)
    library()
    executor = SailExecutor(nets)
    with pytest.raises(CompileError, match=r"no part 'double.00'; it has t5_block.00"):
        executor("double.00", {})
    with pytest.raises(CompileError, match=r"hidden_states has shape \[1, 5\].*\[1, 4\]"):
        executor("t5_block.00", {"hidden_states": np.ones((1, 5)), "position_bias": np.zeros(2)})
    with pytest.raises(CompileError, match="position_bias is missing"):
        executor("t5_block.00", {"hidden_states": np.ones((1, 4))})
    (tmp_path / "other.bmodel").write_bytes(b"x")
    from dataclasses import replace

    bad = SailExecutor({"vae_decoder": replace(nets["vae_decoder"], file=tmp_path / "other.bmodel")})
    with pytest.raises(ResourceError, match=r"cannot load other.bmodel"):
        bad.load("vae")
    (tmp_path / "vae.bmodel").unlink()
    with pytest.raises(UsageError, match="without the executor's binaries"):
        SailExecutor(nets)
