"""A split model from checkpoint to bundle: every rank executed, the compiler refused or, as a stub, called."""

import json
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fluxkiln.artifacts.intact import read_bundle, read_manifest
from fluxkiln.artifacts.store import open_store
from fluxkiln.build.make import build, outline, plan, prepare
from fluxkiln.build.verification import record, verify
from fluxkiln.cli.main import main
from fluxkiln.compile.plan import Made
from fluxkiln.compile.toolchains.neuron import rungs as replicating
from fluxkiln.compile.toolchains.neuron.make import SplitModel, resume_compile
from fluxkiln.compile.toolchains.neuron.modules import lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.split import shard_weights
from fluxkiln.errors import IntegrityError, ParityError, ResourceError, ToolchainError, UsageError
from fluxkiln.export.shard_files import read_shard
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings
from tests.hostile.forged import forge
from tests.ranks import join_shards

STUB = Path(__file__).with_name("stub-neuronx-cc")


def settings(root, **changes):
    return Settings("trn1", changes.pop("model", "tiny-dev"), build_dir=root, **changes)


def without_compiler(monkeypatch):
    """No neuronx-cc on PATH, whatever the machine has."""
    found = [place for place in os.environ["PATH"].split(":") if not (Path(place) / "neuronx-cc").exists()]
    monkeypatch.setenv("PATH", ":".join(found))


def with_stub(monkeypatch, folder, version="2.26.6360.0+stub"):
    """A stub in the compiler's place; what it writes is no NEFF."""
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    shutil.copy(STUB, folder / "bin" / "neuronx-cc")
    (folder / "bin" / "neuronx-cc").chmod(0o755)
    calls = folder / "calls"
    calls.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("STUB_CALLS", str(calls))
    monkeypatch.setenv("STUB_VERSION", version)
    return calls


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A build folder where tiny-dev was built without a compiler, and what it said."""
    root = tmp_path_factory.mktemp("neuron")
    with pytest.MonkeyPatch.context() as patch:
        without_compiler(patch)
        with pytest.raises(ToolchainError) as caught:
            build(settings(root))
    return root, caught.value


@pytest.fixture
def bundle(built, tmp_path):
    """A copy of its bundle."""
    target = tmp_path / "bundle"
    shutil.copytree(bundle_of(built[0]), target)
    return target


def bundle_of(root):
    return root / "trn1" / "tiny-dev-bf16-32x32-16" / "bundle"


def report_of(root):
    return json.loads((bundle_of(root).parent / "report.json").read_text())


def test_all_but_the_compile_is_finished(built):
    root, error = built
    assert error.exit_code == 5
    assert str(bundle_of(root)) in str(error)
    assert "hlo/ (7 modules), weights/, compile_neff.sh" in str(error)
    manifest = read_bundle(bundle_of(root)).manifest
    assert manifest.parity["passed"]
    assert manifest.settings["tp_degree"] == 2
    names = {file.path for file in manifest.files}
    assert {"neuron.json", "compile_neff.sh", "hlo/double.hlo_module.pb", "weights/double.01/tp1.safetensors"} <= names
    assert not [name for name in names if name.startswith("neff/")]
    described = json.loads((bundle_of(root) / "neuron.json").read_text())
    assert [part["module"] for part in described["parts"]] == [
        "clip", "t5", "head", "double", "double", "single", "single", "single", "tail", "vae_decoder",
    ]  # fmt: skip
    assert described["modulation_rows"] == {
        "double.00": [0, 12], "double.01": [12, 24], "single.00": [24, 27], "single.01": [27, 30],
        "single.02": [30, 33], "tail": [33, 35],
    }  # fmt: skip
    double = described["modules"]["double"]
    assert [name for name, _, _ in double["inputs"]][:3] == ["hidden_states", "encoder_hidden_states", "modulation"]
    shard = read_shard(bundle_of(root) / "weights/double.00/tp0.safetensors")
    assert [name for name, _, _ in double["slots"]] == list(shard)
    assert double["collectives"] == {"all-reduce": 2, "all-gather": 0}


def test_the_report_says_what_was_executed(built):
    report = report_of(built[0])
    values, entries = report["lowering"]["values"], report["lowering"]["entries"]
    assert (values["all_reduces"], values["all_gathers"], values["modules"]) == (2 * 2 + 3, 1, 7)
    assert entries["executed on"] == "XLA CPU replicas"
    assert entries["NEFF"] == "not compiled here"
    assert report["summary"]["failed"] == 0
    rungs = {rung["rung"]: rung for rung in report["summary"]["rungs"]}
    assert set(rungs) == {"split", "unsplit", "replicas"}
    ranks = [row for row in report["rows"] if row["output"] == "ranks"]
    assert {(row["part"], row["rung"]) for row in ranks} == {
        (part["name"], rung) for part in report["parts"] for rung in ("split", "replicas")
    }
    assert any(row["part"] == "pipeline" and row["output"] == "image" for row in report["rows"])


def test_nothing_is_made_again(built, monkeypatch):
    without_compiler(monkeypatch)
    prepared = prepare(settings(built[0]))
    before = (prepared.plan.bundle / "manifest.json").stat().st_mtime_ns
    with pytest.raises(ToolchainError, match=r"hlo/ \(7 modules\)"):
        build(settings(built[0]))
    assert (prepared.plan.bundle / "manifest.json").stat().st_mtime_ns == before


def test_shards_are_the_checkpoint_bit_for_bit(built):
    root = built[0]
    prepared = prepare(settings(root))
    checkpoint = prepared.checkpoint
    seen = {}
    for part in prepared.plan.parts:
        files = sorted((bundle_of(root) / "weights" / part.name).glob("*.safetensors"))
        seen |= {
            (part.component, name): tensor
            for name, tensor in join_shards(part, checkpoint, [read_shard(file) for file in files]).items()
        }
    for (component, name), tensor in seen.items():
        ref = checkpoint.tensors[component][name]
        with ref.file.open("rb") as file:
            file.seek(ref.offset)
            assert tensor.tobytes() == file.read(ref.nbytes), name
    assert {name for component, name in seen if component == "transformer"} == set(checkpoint.tensors["transformer"])


def test_full_size_has_as_many_collectives_as_it_must(tmp_path):
    prepared = outline(settings(tmp_path, model="full-dev", tp_degree=8))
    kinds = [module_name(part) for part in prepared.plan.parts]
    modules = lower_modules(prepared.checkpoint, prepared.plan, prepared.cache, Silent())
    assert len(modules) == len({module.digest for module in modules.values()}) == 7
    reduces = {name: len(module.facts["all_reduce_bytes"]) for name, module in modules.items()}
    gathers = {name: len(module.facts["all_gather_bytes"]) for name, module in modules.items()}
    transformer = [kind for kind in kinds if kind in ("head", "double", "single", "tail")]
    assert sum(reduces[kind] for kind in transformer) == 76
    assert sum(gathers[kind] for kind in transformer) == 1
    assert reduces["t5"] == 48
    assert kinds.count("double") == 19
    assert kinds.count("single") == 38


@pytest.mark.parametrize("granularity", ["group:2", "whole"])
def test_other_granularities_pass_the_same_gates(built, granularity, monkeypatch):
    without_compiler(monkeypatch)
    root = built[0]
    changed = settings(root, granularity=granularity, components=("transformer",), steps=1)
    with pytest.raises(ToolchainError):
        build(changed)
    report = json.loads((prepare(changed).plan.folder / "report.json").read_text())
    assert report["summary"]["failed"] == 0
    assert report["lowering"]["values"]["all_reduces"] == 2 * 2 + 3


def test_more_ranks_than_heads_are_padded_and_pass_the_same_gates(built, tmp_path):
    """2 heads on 4 ranks: half of them zeros, which no instance is given but every rank computes."""
    changed = settings(built[0], steps=1)
    prepared = prepare(changed)
    plan = replace(prepared.plan, layout=replace(prepared.plan.layout, degree=4), folder=tmp_path)
    prepared = replace(prepared, plan=plan)
    build = prepared.checkpoint, plan, prepared.cache
    modules, shards = lower_modules(*build, Silent()), shard_weights(*build, Silent())
    made = Made((), (), own=SplitModel(plan.shapes, modules, shards))
    parity = verify(prepared, made, record(prepared), tmp_path, Silent())
    assert {module.ranks for module in modules.values()} == {1, 4}
    assert parity.pipeline is not None
    assert [row for row in parity.ladder.rows if not row.passed] == []


def swapped(ranks):
    return ranks[::-1]


def doubled_bias(ranks):
    """What adding a bias on every rank comes to."""
    last = [array * array.dtype.type(len(ranks)) if array.ndim == 1 else array for array in ranks[0]]
    return [last, *ranks[1:]] if len(ranks) == 1 else [last] * len(ranks)


@pytest.mark.parametrize("spoil", [swapped, doubled_bias])
def test_wrong_shards_are_seen(built, spoil, monkeypatch, tmp_path):
    without_compiler(monkeypatch)
    sound = replicating.shard_arrays

    def spoilt(cache, shards):
        ranks = sound(cache, shards)
        return spoil(ranks) if len(ranks) > 1 else ranks

    monkeypatch.setattr(replicating, "shard_arrays", spoilt)
    changed = settings(tmp_path, store=built[0] / "store", components=("transformer",), steps=1)
    with pytest.raises(ParityError, match="first bad rung: replicas"):
        build(changed)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tp_degree": 3}, UsageError, "takes groups of 1, 2, 8, 16, 32"),
        ({"tp_degree": 8}, UsageError, "legal for trn1.32xlarge and 2 heads: tp 1, 2"),
        ({"instance": "inf2.48xlarge"}, UsageError, "there are trn1.32xlarge, trn1.2xlarge"),
        ({"granularity": "group:0"}, UsageError, "group:N with N blocks"),
        ({"modulation": "inline"}, UsageError, "leave --modulation out"),
    ],
)
def test_what_the_instance_cannot_do_is_refused_before_a_weight_is_read(tmp_path, changes, error, says):
    with pytest.raises(error, match=says):
        plan(settings(tmp_path, **changes))
    assert not (tmp_path / "models").exists()


def test_what_does_not_fit_the_cores_is_refused_before_a_weight_is_written(tmp_path):
    too_large = settings(tmp_path, model="full-dev", instance="trn1.2xlarge")
    assert "it fits inf2.48xlarge with tp 4, 8" in plan(too_large)["refused"]
    with pytest.raises(ResourceError, match=r"it fits inf2\.48xlarge with tp 4, 8"):
        build(too_large)
    assert not (tmp_path / "models").exists()


def test_a_bundle_is_completed_elsewhere(bundle, tmp_path, monkeypatch):
    calls = with_stub(monkeypatch, tmp_path)
    made = resume_compile(bundle, open_store(tmp_path / "store"), Silent())
    assert len(made.compiled) == 7
    assert len(list(calls.glob("call.*"))) == 7
    assert {file.path for file in read_bundle(bundle).manifest.files} >= {"neff/double.neff", "neff/double.json"}
    again = resume_compile(bundle, open_store(tmp_path / "store"), Silent())
    assert (again.compiled, len(again.taken)) == ((), 7)
    assert len(list(calls.glob("call.*"))) == 7


def test_the_command_finds_the_one_bundle_that_lacks_something(bundle, tmp_path, monkeypatch, capsys):
    with_stub(monkeypatch, tmp_path)
    place = tmp_path / "build" / "trn1" / "tiny" / "bundle"
    other = tmp_path / "build" / "cpu" / "tiny" / "bundle"
    for folder in (place, other):
        shutil.copytree(bundle, folder)
    forge(other, lambda document: document.update(target="cpu"))
    command = ["compile", "--resume", "--build-dir", str(tmp_path / "build"), "--json"]
    assert main(command) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["bundle"], made["compiler"]) == (str(place), "2.26.6360.0+stub")
    assert len(made["compiled"]) == 7
    assert main([*command, str(other)]) == 2
    assert (
        "is complete: what onnxruntime makes is all made by the build"
        in json.loads(capsys.readouterr().out)["error"]["message"]
    )
    shutil.rmtree(place)
    assert main(command) == 2
    assert "0 bundles below" in capsys.readouterr().out


def test_the_script_of_the_bundle_runs_as_it_is(bundle, tmp_path, monkeypatch):
    with pytest.MonkeyPatch.context() as patch:
        calls = with_stub(patch, tmp_path)
        subprocess.run([bundle / "compile_neff.sh"], cwd="/", check=True, capture_output=True)
    assert len(list(calls.glob("call.*"))) == 7
    without_compiler(monkeypatch)
    made = resume_compile(bundle, open_store(tmp_path / "store"), Silent())
    assert (made.compiled, len(made.taken)) == ((), 7)
    read_bundle(bundle)


def test_a_compiled_module_of_another_version_is_never_used(bundle, tmp_path, monkeypatch):
    with_stub(monkeypatch, tmp_path)
    store = open_store(tmp_path / "store")
    resume_compile(bundle, store, Silent())
    (bundle / "neff" / "tail.neff").unlink()
    with_stub(monkeypatch, tmp_path, version="2.27.0.0+stub")
    with pytest.raises(ToolchainError, match=r"2\.26\.6360\.0"):
        resume_compile(bundle, store, Silent())


def test_a_changed_module_is_not_compiled(bundle, tmp_path, monkeypatch):
    calls = with_stub(monkeypatch, tmp_path)
    module = bundle / "hlo" / "single.hlo_module.pb"
    module.chmod(0o644)
    module.write_bytes(module.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError, match=r"single\.hlo_module\.pb has the digest"):
        resume_compile(bundle, open_store(tmp_path / "store"), Silent())
    assert not list(calls.glob("call.*"))


def test_no_compiler_elsewhere_either(bundle, tmp_path, monkeypatch):
    without_compiler(monkeypatch)
    before = read_manifest(bundle)
    with pytest.raises(ToolchainError, match="neuronx-cc"):
        resume_compile(bundle, open_store(tmp_path / "store"), Silent())
    assert read_manifest(bundle) == before


def test_a_build_with_the_compiler_has_its_modules(built, tmp_path, monkeypatch):
    calls = with_stub(monkeypatch, tmp_path)
    changed = replace(settings(tmp_path, store=built[0] / "store"), verify=False)
    made = build(changed)
    assert made.compiler_runs == len(list(calls.glob("call.*"))) == 7
    assert (made.bundle / "neff" / "t5.neff").is_file()
    again = build(changed)
    assert again.nothing_to_do
    assert len(list(calls.glob("call.*"))) == 7
