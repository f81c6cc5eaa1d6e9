"""The Neuron compile stage with `stub-neuronx-cc` in the compiler's place: how it is called and what becomes of it.

The stub compiles nothing. Its output stands where compiled modules would, so that files, keys and failures can be seen.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import open_store
from fluxkiln.compile.process import JobPool
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchains.neuron.compilation import compile_kinds, neff_action
from fluxkiln.compile.toolchains.neuron.neff import (
    ModuleJob,
    check_versions,
    neff_path,
    read_neffs,
    record_path,
)
from fluxkiln.compile.toolchains.neuron.neuronx_cc import compile_argv, find_neuronx_cc
from fluxkiln.errors import CompileError, IntegrityError, ResourceError, ToolchainError, UsageError
from tests.stub_compiler import STUB_VERSION, install_stub

TRN1, INF2 = find_target("trn1"), find_target("inf2")


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The stub first on PATH; the folder of its calls."""
    return install_stub(tmp_path, monkeypatch)


@pytest.fixture
def jobs(tmp_path):
    """Modules, by name, of different bytes; a module is opaque here."""

    def make(*names, memory=1):
        folder = tmp_path / "build" / "hlo"
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for name in names:
            path = folder / f"{name}.hlo_module.pb"
            path.write_bytes(f"module {name}\n".encode())
            digest = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
            made.append(ModuleJob(name, "blocks", path, digest, memory))
        return made

    return make


@pytest.fixture
def run(tmp_path, calls):
    """Compile jobs with the stub; the store is the same each time."""

    def compile_all(jobs, target=TRN1, workers=None, memory=None, **options):
        cache = ActionCache(open_store(tmp_path / "store"))
        folder = tmp_path / "build"
        with JobPool(workers, memory) as pool:
            return compile_kinds(pool, jobs, find_neuronx_cc(), target, cache, folder, **options)

    return compile_all


def called(calls, name="*"):
    return sorted(calls.glob(f"call.{name}.*"))


# Compiles


def test_every_module_is_compiled_with_its_flags(run, jobs, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("NEURON_CC_FLAGS", "--auto-cast=all")  # for frameworks; the stub fails when it sees them
    made = run(jobs("double", "vae_decoder", "clip"), workers=2)
    assert [each.name for each in made] == ["double", "vae_decoder", "clip"]
    assert [each.hit for each in made] == [False] * 3
    assert len(called(calls)) == 3
    for each in made:
        (call,) = called(calls, each.name)
        assert call.read_text().split("\n")[:-1] == compile_argv(
            "blocks", TRN1, "default", f"{each.name}.hlo_module.pb", f"{each.name}.neff"
        )[1:]  # fmt: skip
        written = neff_path(tmp_path / "build", each.name).read_text()
        assert written.startswith("This is output of stub-neuronx-cc")
        assert written.endswith(f"module {each.name}\n")
        assert each.digest == "sha256:" + hashlib.sha256(written.encode()).hexdigest()
        record = json.loads(record_path(tmp_path / "build", each.name).read_text())
        assert record == each.to_json()
        assert (record["compiler"], record["hlo"]) == (STUB_VERSION, each.hlo)
    left = {path.name for path in (tmp_path / "build" / "neff").iterdir()}
    assert left == {f"{each.name}{suffix}" for each in made for suffix in (".neff", ".json")}
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


def test_what_is_in_the_store_is_not_compiled_again(run, jobs, calls, tmp_path):
    first = run(jobs("double", "tail"))
    shutil.rmtree(tmp_path / "build" / "neff")
    told = Told()
    again = run(jobs("double", "tail"), progress=told)
    assert len(called(calls)) == 2
    assert [each.hit for each in again] == [True, True]
    assert [each.digest for each in again] == [each.digest for each in first]
    assert told.done_with == {"double": "from the store", "tail": "from the store"}
    assert neff_path(tmp_path / "build", "tail").is_file()


class Told:
    def __init__(self):
        self.done_with = {}
        self.stages = {}

    def stage(self, name, total):
        self.stages[name] = total

    def done(self, stage, what, how):
        self.done_with[what] = how

    def note(self, text):
        pass


def test_equal_modules_are_compiled_once(run, jobs, calls, tmp_path):
    (double,) = jobs("double")
    copy = tmp_path / "build" / "hlo" / "other.hlo_module.pb"
    shutil.copy(double.hlo, copy)
    made = run([double, ModuleJob("other", "blocks", copy, double.digest, 1)], workers=2)
    assert len(called(calls)) == 1
    assert made[0].digest == made[1].digest
    assert {each.hit for each in made} == {False, True}


@pytest.mark.parametrize("change", ["module", "flags", "target", "version"])
def test_anything_else_is_another_key(run, jobs, calls, monkeypatch, change):
    (job,) = jobs("double")
    run([job])
    options = {}
    if change == "module":
        job.hlo.write_bytes(b"another module")
        job = ModuleJob("double", "blocks", job.hlo, "sha256:" + hashlib.sha256(b"another module").hexdigest(), 1)
    elif change == "flags":
        options["preset"] = "published"
    elif change == "target":
        options["target"] = INF2
    else:
        monkeypatch.setenv("STUB_VERSION", "2.27.1.0+stub")
    (made,) = run([job], **options)
    assert not made.hit
    assert len(called(calls)) == 2
    assert run([job], **options)[0].hit


def test_the_key_has_no_names_and_no_paths(jobs, tmp_path):
    (job,) = jobs("double")
    moved = ModuleJob("x", "blocks", tmp_path / "y", job.digest)
    key = neff_action(job, TRN1, "default", "1").key
    assert key == neff_action(moved, TRN1, "default", "1").key
    assert key != neff_action(ModuleJob("x", "image", tmp_path / "y", job.digest), TRN1, "default", "1").key


def test_compilers_run_beside_one_another(run, jobs, monkeypatch):
    """Each waits for the other one."""
    monkeypatch.setenv("STUB_MEET", "2")
    assert len(run(jobs("double", "single"), workers=2)) == 2


def test_compilers_share_the_memory(run, jobs, monkeypatch):
    """Two of 6 do not fit 10, so that one waits; one of 60 may run, alone."""
    monkeypatch.setenv("STUB_ALONE", "1")
    assert len(run(jobs("double", "single", "head", memory=6), workers=3, memory=10)) == 3
    assert len(run(jobs("clip", "t5", memory=60), workers=2, memory=10)) == 2


def test_they_would_not_wait_without_the_budget(run, jobs, monkeypatch):
    """The control of the test above."""
    monkeypatch.setenv("STUB_ALONE", "1")
    monkeypatch.setenv("STUB_MEET", "2")
    with pytest.raises(CompileError, match="another one runs"):
        run(jobs("double", "single"), workers=2, memory=10)


# Failures


def test_failure_shows_the_log_and_advice(run, jobs, calls, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "double")
    monkeypatch.setenv("STUB_SAYS", "[ERROR] [NCC_EBVF030] Instructions generated 6101424 exceeds the limit")
    with pytest.raises(CompileError) as raised:
        run(jobs("clip", "double", "tail"), workers=1)
    message = str(raised.value)
    assert raised.value.exit_code == 1
    assert "double for trn1: the compiler failed with exit code 70: [ERROR] [NCC_EBVF030]" in message
    assert f"whole log: {tmp_path / 'logs' / 'double.log'}" in message
    assert "NCC_EBVF030: the program has more instructions than the compiler allows" in message
    # what was finished is kept, what came after was not started, nothing half-made is left
    assert [len(called(calls, name)) for name in ("clip", "double", "tail")] == [1, 1, 0]
    assert {path.name for path in (tmp_path / "build" / "neff").iterdir()} == {"clip.neff", "clip.json"}
    monkeypatch.delenv("STUB_FAIL")
    assert [each.hit for each in run(jobs("clip", "double", "tail"), workers=1)] == [True, False, False]


def test_codes_in_the_compilers_own_log_count(run, jobs, tmp_path, monkeypatch):
    """It writes one into its folder, which is removed."""
    monkeypatch.setenv("STUB_FAIL", "single")
    monkeypatch.setenv("STUB_SAYS", "Compiler status ERROR")
    monkeypatch.setenv("STUB_LOGS", "ERROR: [NCC_EOOM001] too much")
    with pytest.raises(
        CompileError, match=r"Compiler status ERROR; whole log: .*\. NCC_EOOM001: its tensors do not fit"
    ):
        run(jobs("single"))
    assert "NCC_EOOM001" in (tmp_path / "logs" / "single.log").read_text()


def test_codes_of_an_earlier_run_do_not(run, jobs, monkeypatch):
    monkeypatch.setenv("STUB_FAIL", "single")
    monkeypatch.setenv("STUB_SAYS", "error NCC_EOOM001")
    with pytest.raises(CompileError, match="NCC_EOOM001"):
        run(jobs("single"))
    monkeypatch.setenv("STUB_SAYS", "error of another sort")
    with pytest.raises(CompileError, match="another sort") as raised:
        run(jobs("single"))
    assert "EOOM001" not in str(raised.value)


@pytest.mark.parametrize(("says", "code"), [("[F137] neuronx-cc was forcibly killed", "70"), ("", "137")])
def test_killed_for_memory(run, jobs, monkeypatch, says, code):
    monkeypatch.setenv("STUB_FAIL", "t5")
    monkeypatch.setenv("STUB_SAYS", says)
    monkeypatch.setenv("STUB_CODE", code)
    with pytest.raises(ResourceError, match=r"t5 for trn1: .*killed.*JOBS=1.*log: .*t5\.log"):
        run(jobs("t5"))


def test_no_output_is_a_failure(run, jobs, monkeypatch):
    monkeypatch.setenv("STUB_EMPTY", "1")
    with pytest.raises(
        CompileError, match=r"tail for trn1: neuronx-cc ended well but wrote no output; whole log: .*tail"
    ):
        run(jobs("tail"))


def test_changed_module_is_refused_before_anything_runs(run, jobs, calls, tmp_path):
    made = jobs("double", "single")
    made[1].hlo.write_bytes(b"module SINGLE\n")
    with pytest.raises(
        IntegrityError, match=r"single\.hlo_module\.pb has the digest sha256:.*it was changed or damaged"
    ) as raised:
        run(made)
    assert raised.value.exit_code == 4
    assert called(calls) == []
    made[1].hlo.unlink()
    with pytest.raises(IntegrityError, match="cannot be read"):
        run(made)


def test_two_modules_of_one_name(run, jobs, calls):
    (job,) = jobs("double")
    with pytest.raises(UsageError, match="two modules are called double"):
        run([job, job])
    assert called(calls) == []


def test_what_a_kill_left_unfinished_is_removed(run, jobs, tmp_path):
    leftover = tmp_path / "build" / "neff" / ".double.neff.x.partial"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    run(jobs("double"))
    assert not leftover.exists()


def test_goes_on_after_a_kill(jobs, run, calls, tmp_path, monkeypatch):
    """The build is killed while the second of three modules is being compiled."""
    made = jobs("clip", "head", "tail")
    monkeypatch.setenv("STUB_HOLD", "head")
    code = (
        "import sys; from pathlib import Path\n"
        "from fluxkiln.artifacts.actions import ActionCache\n"
        "from fluxkiln.artifacts.store import open_store\n"
        "from fluxkiln.compile.toolchains.neuron.neff import ModuleJob\n"
        "from fluxkiln.compile.toolchains.neuron.neuronx_cc import find_neuronx_cc\n"
        "from fluxkiln.compile.targets import find_target\n"
        "from fluxkiln.compile.toolchains.neuron.compilation import compile_kinds\n"
        "root = Path(sys.argv[1])\n"
        "named = zip(sys.argv[2::2], sys.argv[3::2])\n"
        "hlo = root / 'build/hlo'\n"
        "jobs = [ModuleJob(n, 'blocks', hlo / f'{n}.hlo_module.pb', digest, 1) for n, digest in named]\n"
        "cache = ActionCache(open_store(root / 'store'))\n"
        "from fluxkiln.compile.process import JobPool\n"
        "with JobPool(1) as pool:\n"
        "    compile_kinds(pool, jobs, find_neuronx_cc(), find_target('trn1'), cache, root / 'build')\n"
    )
    words = [word for job in made for word in (job.name, job.digest)]
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path), *words])
    deadline = time.monotonic() + 60
    while not (calls / "holding").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert {path.name for path in (tmp_path / "build" / "neff").iterdir()} == {"clip.neff", "clip.json"}
    (calls / "go").touch()  # lets the stub that was left behind end
    assert [each.hit for each in run(made, workers=1)] == [True, False, False]
    assert len(called(calls, "clip")) == 1
    assert list((tmp_path / "store" / "tmp").iterdir()) == []


# What is in a folder


def test_records_are_read_and_checked(run, jobs, tmp_path):
    made = jobs("double", "single", "tail")
    compiled = run(made[:2])
    folder = tmp_path / "build"
    found = read_neffs(folder, made, TRN1, "default")
    assert list(found) == ["double", "single"]
    assert found["double"] == compiled[0]
    assert check_versions(found) == check_versions(found, STUB_VERSION) == STUB_VERSION

    with pytest.raises(IntegrityError, match=r"was compiled with --target=trn1 .* not --target=inf2"):
        read_neffs(folder, made, INF2, "default")
    other = ModuleJob("double", "blocks", made[1].hlo, made[1].digest)
    with pytest.raises(IntegrityError, match=f"was compiled from the module {made[0].digest}, this one is"):
        read_neffs(folder, [other], TRN1, "default")
    path = neff_path(folder, "double")
    data = path.read_bytes()
    path.unlink()
    path.write_bytes(data + b"!")
    with pytest.raises(IntegrityError, match=r"has the digest .* its record says") as raised:
        read_neffs(folder, made, TRN1, "default")
    assert raised.value.exit_code == 4
    record_path(folder, "double").write_text("{}")
    with pytest.raises(IntegrityError, match="has no record"):
        read_neffs(folder, made, TRN1, "default")


def test_another_compiler_version_is_named(run, jobs, tmp_path, monkeypatch):
    made = jobs("double", "single")
    run(made[:1])
    monkeypatch.setenv("STUB_VERSION", "2.27.1.0+stub")
    run(made[1:])
    found = read_neffs(tmp_path / "build", made, TRN1, "default")
    both = rf"neuronx-cc {STUB_VERSION}: double; neuronx-cc 2\.27\.1\.0\+stub: single".replace("0+s", r"0\+s")
    with pytest.raises(ToolchainError, match=f"not all of one version .{both}.*never used") as raised:
        check_versions(found)
    assert raised.value.exit_code == 5
    with pytest.raises(ToolchainError, match=r"not all of neuronx-cc 2\.27\.1"):
        check_versions(found, "2.27.1.0+stub")
    # the compile stage replaces it
    again = run(made)
    assert {each.compiler for each in again} == {"2.27.1.0+stub"}
    assert check_versions(read_neffs(tmp_path / "build", made, TRN1, "default")) == "2.27.1.0+stub"
