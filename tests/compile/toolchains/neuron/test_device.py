"""Executor neuron against a double of nrtpy, and the loader of split bundles. No device has run it."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchains.neuron import device as neuron
from fluxkiln.compile.toolchains.neuron import split_bundle as loading
from fluxkiln.compile.toolchains.neuron.device import NeuronExecutor, match_names
from fluxkiln.compile.toolchains.neuron.neff import Neff, compile_flags
from fluxkiln.compile.toolchains.neuron.split_bundle import find_compiled, read_module, read_split_bundle
from fluxkiln.compile.toolchains.neuron.toolchain import TOOLCHAIN
from fluxkiln.errors import CompileError, IntegrityError, ToolchainError, UsageError
from fluxkiln.types import Kind, Part, TensorSpec
from tests.compile.boards import nrtpy

BF16 = ml_dtypes.bfloat16
RANKS = 4
# more slots than ten: `input10` comes before `input2` by text
SLOTS = [[f"w{i}", [2], "bfloat16"] for i in range(11)]


def sha(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path):
    """A bundle of two parts of one module over four ranks, and one on one rank, with made-up files."""
    for name in ("single", "clip"):
        for place in ("hlo", "neff"):
            (tmp_path / place).mkdir(exist_ok=True)
        hlo, neff = f"module {name}".encode(), f"neff {name}".encode()
        (tmp_path / f"hlo/{name}.hlo_module.pb").write_bytes(hlo)
        (tmp_path / f"neff/{name}.neff").write_bytes(neff)
        flags = compile_flags("text" if name == "clip" else "blocks", find_target("trn1"))
        record = Neff(name, sha(hlo), flags, "2.26", sha(neff)).to_json()
        (tmp_path / f"neff/{name}.json").write_text(json.dumps(record))
    parts = []
    for part, module, ranks in (("clip", "clip", 1), ("single.00", "single", RANKS), ("single.01", "single", RANKS)):
        shards = []
        for rank in range(ranks):
            path = tmp_path / f"weights/{part}/tp{rank}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"shard")
            shards.append({"file": str(path.relative_to(tmp_path)), "digest": sha(b"shard"), "size": 5})
        parts.append({"name": part, "module": module, "shards": shards})

    def module(name, ranks, inputs, slots, outputs):
        hlo = f"hlo/{name}.hlo_module.pb"
        return {
            "kind": name, "ranks": ranks, "hlo": hlo, "digest": sha((tmp_path / hlo).read_bytes()),
            "inputs": inputs, "slots": slots, "outputs": outputs,
        }  # fmt: skip

    described = {
        "schema": "fluxkiln.neuron/1", "target": "trn1", "instance": "trn1.32xlarge", "tp_degree": RANKS,
        "flags": "default",
        "modules": {
            "clip": module("clip", 1, [["input_ids", [1, 3], "int32"]], [], [["last_hidden_state", [1, 3], "float32"]]),
            "single": module(
                "single", RANKS, [["hidden_states", [1, 2], "bfloat16"], ["modulation", [2], "bfloat16"]], SLOTS,
                [["hidden_states_out", [1, 2], "bfloat16"]],
            ),
        },
        "parts": parts,
    }  # fmt: skip
    (tmp_path / loading.DESCRIPTION).write_text(json.dumps(described))
    return tmp_path


COMPONENTS = {"clip": "text_encoder", "single.00": "transformer", "single.01": "transformer"}
MODULES = {
    "clip": ([12], [12], ["input_ids"]),
    "single": ([4] * 13, [4], ["hidden_states", "modulation", *(slot[0] for slot in SLOTS)]),
}


def weights_of(part):
    """Weight i of rank r of part p is 100 p + 10 r + i / 8."""
    if part == "clip":
        return [[]]
    return [
        [np.full(2, 100 * int(part[-1]) + 10 * rank + i / 8, np.float32).astype(BF16) for i in range(11)]
        for rank in range(RANKS)
    ]


def compute(module, rank, arrays):
    """hidden + modulation + the first and the last weight; of clip its ids."""
    if module == "clip":
        return [arrays[0].astype(np.float32)]
    wide = [array.view(BF16).astype(np.float32) for array in arrays]
    return [(wide[0] + wide[1] + wide[2] + wide[12]).astype(BF16).view(np.uint16)]


@pytest.fixture
def device(monkeypatch, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/neuron0").touch()
    monkeypatch.setattr(neuron, "DEVICES", tmp_path / "dev")

    def install(run=compute, **arguments):
        module = nrtpy(run, MODULES, **arguments)
        monkeypatch.setitem(sys.modules, "nrtpy", module)
        return module

    return install


@pytest.mark.parametrize("numbered", [True, False])
def test_every_rank_runs_with_its_own_weights_in_the_modules_order(folder, device, numbered):
    library = device(numbered=numbered)
    executor = NeuronExecutor(COMPONENTS, read_split_bundle(folder), weights_of)
    inputs = {"modulation": np.full(2, 0.25), "hidden_states": np.array([[1.0, 2.0]])}
    for part, base in (("single.00", 0.0), ("single.01", 200.0), ("single.00", 0.0)):
        made = executor(part, inputs)["hidden_states_out"]
        assert made.dtype == np.float32
        # rank 0: w0 + w10 = twice the part's hundred + 10 / 8
        np.testing.assert_allclose(made, [[base + 2.5, base + 3.5]], rtol=2**-7)
    assert sorted(library.loads) == [("single", rank, RANKS, True) for rank in range(RANKS)]
    np.testing.assert_array_equal(
        executor("clip", {"input_ids": np.array([[5, 6, 7]])})["last_hidden_state"], [[5, 6, 7]]
    )
    assert ("clip", 0, 1, False) in library.loads
    executor.release("transformer")
    executor("single.01", inputs)
    assert len(library.loads) == 2 * RANKS + 1
    executor.close()
    assert library.calls == [f"configure {list(range(RANKS))}", "reset"]


def test_bundles_run_on_replicas_until_they_are_compiled(folder, device):
    device()
    parts = [Part(name, Kind(name, at, (), ())) for name, at in COMPONENTS.items()]
    bundle = SimpleNamespace(
        folder=folder, parts=parts, nets={part.name: SimpleNamespace(name=part.name) for part in parts}
    )
    assert TOOLCHAIN.executors == ("neuron", "replicas")
    for name, opened in ((None, "neuron"), ("neuron", "neuron"), ("replicas", "replicas")):
        executor = TOOLCHAIN.open_executor(bundle, name, {"threads": 0, "device": 0, "fast": False})
        assert executor.name == opened
        executor.close()
    shutil.rmtree(folder / "neff")
    assert TOOLCHAIN.open_executor(bundle, None, {}).name == "replicas"
    with pytest.raises(ToolchainError, match="no NEFF of clip, single"):
        TOOLCHAIN.open_executor(bundle, "neuron", {})


def test_an_error_of_the_runtime_is_a_sentence(folder, device):
    def fail(module, rank, arrays):
        raise RuntimeError("NRT Error NRT_EXEC_HW_ERR_COLLECTIVES(1200)")

    device(fail)
    executor = NeuronExecutor(COMPONENTS, read_split_bundle(folder), weights_of)
    with pytest.raises(CompileError, match=r"part clip: the Neuron runtime says NRT Error.*neuron-ls"):
        executor("clip", {"input_ids": np.zeros((1, 3), np.int64)})
    with pytest.raises(CompileError, match=r"input_ids has shape \[1, 4\]"):
        executor("clip", {"input_ids": np.zeros((1, 4), np.int64)})
    executor.close()


def test_what_is_missing_is_named(folder, device, tmp_path, monkeypatch):
    bundle = read_split_bundle(folder)
    monkeypatch.setitem(sys.modules, "nrtpy", None)
    with pytest.raises(ToolchainError, match="nrtpy") as caught:
        NeuronExecutor(COMPONENTS, bundle, weights_of)
    assert caught.value.exit_code == 5
    device()
    (tmp_path / "dev/neuron0").unlink()
    with pytest.raises(ToolchainError, match="neuron0 does not exist"):
        NeuronExecutor(COMPONENTS, bundle, weights_of)
    (folder / "neff/single.neff").unlink()
    with pytest.raises(ToolchainError, match=r"no NEFF of single: .*compile_neff.sh.*--executor replicas"):
        NeuronExecutor(COMPONENTS, bundle, weights_of)


def test_neffs_must_be_those_of_the_modules(folder):
    bundle = read_split_bundle(folder)
    assert set(find_compiled(bundle)) == {"clip", "single"}
    record = folder / "neff/single.json"
    good = record.read_text()
    record.write_text(good.replace(bundle.modules["single"].digest, "sha256:" + "0" * 64))
    with pytest.raises(IntegrityError, match="was compiled from the module sha256:0000"):
        find_compiled(bundle)
    record.write_text(good)
    (folder / "neff/single.neff").write_bytes(b"another")
    with pytest.raises(IntegrityError, match="its record says"):
        find_compiled(bundle)
    record.unlink()
    with pytest.raises(IntegrityError, match="has no record of what it was compiled from"):
        find_compiled(bundle)


def test_a_neff_with_other_tensors_is_refused():
    specs = [TensorSpec("a", (2,), "bfloat16"), TensorSpec("b", (3,), "float32")]

    class Info:
        def __init__(self, size):
            self.size = size

    assert match_names({"b": Info(12), "a": Info(4)}, specs, "x") == ["a", "b"]
    assert match_names({"input1": Info(12), "input0": Info(4)}, specs, "x") == ["input0", "input1"]
    for wrong in ({"input0": Info(12), "input1": Info(4)}, {"input0": Info(4)}):
        with pytest.raises(IntegrityError, match="compile it again"):
            match_names(wrong, specs, "NEFF x")


def test_the_loader_reads_a_description(folder):
    bundle = read_split_bundle(folder)
    module = bundle.module_of("single.01")
    assert [spec.name for spec in module.parameters] == MODULES["single"][2]
    assert read_module(module) == b"module single"
    assert [shard.name for shard in bundle.shards["single.01"]] == [f"tp{rank}.safetensors" for rank in range(RANKS)]
    with pytest.raises(UsageError, match=r"no part 'double\.00'"):
        bundle.module_of("double.00")
    module.hlo.write_bytes(b"changed")
    with pytest.raises(IntegrityError, match="expected is"):
        read_module(module)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda d: d.update(schema="other/1"), UsageError, "schema 'other/1'"),
        (lambda d: d.pop("modules"), IntegrityError, "missing required field modules"),
        (lambda d: d["parts"][1].update(module="double"), IntegrityError, "no module 'double' for part single.00"),
        (lambda d: d["parts"][1]["shards"].pop(), IntegrityError, "has 3 shards, its module single runs on 4 ranks"),
        (lambda d: d["parts"][1]["shards"][0].update(file="weights/no"), IntegrityError, "does not exist"),
        (lambda d: d["parts"][1]["shards"][0].update(file="../x"), IntegrityError, "outside of the bundle"),
        (lambda d: d["modules"]["clip"].update(hlo="/etc/passwd"), IntegrityError, "outside of the bundle"),
    ],
)
def test_a_description_that_is_wrong(folder, change, error, words):
    path = folder / loading.DESCRIPTION
    described = json.loads(path.read_text())
    change(described)
    path.write_text(json.dumps(described))
    with pytest.raises(error, match=words):
        read_split_bundle(folder)


def test_no_description(tmp_path):
    with pytest.raises(UsageError, match=r"no neuron.json"):
        read_split_bundle(tmp_path)
    (tmp_path / loading.DESCRIPTION).write_text("{")
    with pytest.raises(IntegrityError, match="is not valid JSON"):
        read_split_bundle(tmp_path)
