"""`compile_neff.sh`, run as a user would, with `stub-neuronx-cc` where the compiler would be.

The stub compiles nothing; its output stands where compiled modules would.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import open_store
from fluxkiln.compile.process import JobPool
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchains.neuron.compilation import compile_kinds, write_compile_script
from fluxkiln.compile.toolchains.neuron.neff import ModuleJob, neff_path, read_neffs, record_path
from fluxkiln.compile.toolchains.neuron.neuronx_cc import compile_argv, find_neuronx_cc
from fluxkiln.errors import UsageError

STUB = Path(__file__).with_name("stub-neuronx-cc")
STUB_VERSION = "2.26.6360.0+stub"
TRN1 = find_target("trn1")
SHELLS = [shell for shell in ("dash", "bash") if shutil.which(shell)]


class Place:
    """A build's folder whose name needs quoting, the script in it, and an environment with the stub."""

    def __init__(self, root, *names):
        self.root, self.folder, self.calls = root, root / "it's a $HOME `x`", root / "calls"
        self.store = root / "store"
        for folder in (self.folder / "hlo", self.calls, root / "bin"):
            folder.mkdir(parents=True)
        self.jobs = []
        for name in names:
            path = self.folder / "hlo" / f"{name}.hlo_module.pb"
            path.write_bytes(f"module {name}\n".encode())
            self.jobs.append(ModuleJob(name, "blocks", path, digest(path)))
        shutil.copy(STUB, root / "bin" / "neuronx-cc")
        self.environ = {"PATH": f"{root / 'bin'}:{os.environ['PATH']}", "STUB_CALLS": str(self.calls)}
        self.script = write_compile_script(self.folder, self.jobs, TRN1)

    def run(self, *words, shell=None, cwd=None, **environ):
        argv = [*([shell] if shell else []), str(self.script), *words]
        return subprocess.run(
            argv, env={**self.environ, **environ}, cwd=cwd or self.root, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip

    def called(self, name="*"):
        return sorted(self.calls.glob(f"call.{name}.*"))

    def made(self):
        return {path.name for path in (self.folder / "neff").iterdir()}


def digest(path):
    return "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path, "double", "clip", "vae_decoder")


@pytest.mark.parametrize("shell", SHELLS)
def test_syntax(place, shell):
    subprocess.run([shell, "-n", str(place.script)], check=True)
    assert os.access(place.script, os.X_OK)
    assert "@" not in place.script.read_text().replace('"$@"', "")


@pytest.mark.parametrize("shell", [*SHELLS, None])
def test_compiles_everything(place, shell):
    done = place.run(shell=shell, NEURON_CC_FLAGS="--auto-cast=all")  # the stub fails when it sees them
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "Finished: 3 compiled, 0 from before" in done.stderr
    assert "fluxkiln compile --resume" in done.stderr
    for job in place.jobs:
        (call,) = place.called(job.name)
        model = f"../../hlo/{job.name}.hlo_module.pb"
        assert call.read_text().split("\n")[:-1] == compile_argv(
            job.form, TRN1, "default", model, f"{job.name}.neff"
        )[1:]  # fmt: skip
        written = neff_path(place.folder, job.name).read_text()
        assert written.startswith("This is output of stub-neuronx-cc")
        assert written.endswith(f"module {job.name}\n")
    assert place.made() == {f"{job.name}{suffix}" for job in place.jobs for suffix in (".neff", ".json")}


def test_records_are_those_of_the_compile_stage(place, monkeypatch):
    """Byte for byte, so that each takes over what the other one finished."""
    assert place.run().returncode == 0
    read = read_neffs(place.folder, place.jobs, TRN1, "default")
    assert {each.compiler for each in read.values()} == {STUB_VERSION}
    by_script = {job.name: record_path(place.folder, job.name).read_bytes() for job in place.jobs}

    for name, value in place.environ.items():
        monkeypatch.setenv(name, value)
    cache = ActionCache(open_store(place.store))
    with JobPool(1) as pool:
        made = compile_kinds(pool, place.jobs, find_neuronx_cc(), TRN1, cache, place.folder)
    assert len(place.called()) == 3  # none of them by the compile stage
    assert [each.digest for each in made] == [read[job.name].digest for job in place.jobs]
    assert {job.name: record_path(place.folder, job.name).read_bytes() for job in place.jobs} == by_script
    assert "Finished: 0 compiled, 3 from before" in place.run().stderr


def test_finished_modules_are_kept(place):
    place.run("double")
    assert place.made() == {"double.neff", "double.json"}
    done = place.run()
    assert "double: finished before by neuronx-cc 2.26.6360.0+stub, kept" in done.stderr
    assert "Finished: 2 compiled, 1 from before" in done.stderr
    assert "Finished: 0 compiled, 3 from before" in place.run().stderr
    assert len(place.called()) == 3


@pytest.mark.parametrize("change", ["version", "output", "record", "module", "flags"])
def test_anything_else_is_compiled_again(place, change):
    environ = {}
    place.run()
    if change == "version":
        environ = {"STUB_VERSION": "2.27.1.0+stub"}
    elif change == "output":
        with neff_path(place.folder, "double").open("ab") as file:
            file.write(b"!")
    elif change == "record":
        record_path(place.folder, "double").unlink()
    elif change == "module":
        job = place.jobs[0]
        job.hlo.write_bytes(b"another module")
        place.jobs[0] = ModuleJob("double", "blocks", job.hlo, digest(job.hlo))
        write_compile_script(place.folder, place.jobs, TRN1)
    else:
        write_compile_script(place.folder, place.jobs, TRN1, "published")
    done = place.run("double", **environ)
    assert "Finished: 1 compiled, 0 from before" in done.stderr
    assert len(place.called("double")) == 2
    assert "Finished: 0 compiled, 1 from before" in place.run("double", **environ).stderr
    record = json.loads(record_path(place.folder, "double").read_text())
    assert record["neff"] == digest(neff_path(place.folder, "double"))
    assert record["compiler"] == environ.get("STUB_VERSION", STUB_VERSION)


@pytest.mark.parametrize("cwd", ["/", "hlo", "."])
def test_runs_from_anywhere(place, cwd):
    folder = place.folder / cwd
    script = os.path.relpath(place.script, folder)
    done = subprocess.run(
        ["sh", script, "clip"], env=place.environ, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert neff_path(place.folder, "clip").is_file()


def test_folder_can_be_moved(place, tmp_path):
    place.folder.rename(tmp_path / "copied")
    done = subprocess.run(
        [tmp_path / "copied" / "compile_neff.sh"], env=place.environ, capture_output=True, text=True, check=False
    )
    assert "Finished: 3 compiled" in done.stderr


def test_a_relative_path_to_the_compiler(place):
    done = place.run("clip", PATH=f"bin:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr


def test_no_compiler(place):
    path = place.root / "none"
    path.mkdir()
    done = place.run(PATH=str(path), shell=shutil.which("sh"))
    assert done.returncode == 5
    assert "neuronx-cc is not on PATH. Install the Neuron SDK" in done.stderr
    assert "Nothing was compiled." in done.stderr
    assert not (place.folder / "neff").exists()


@pytest.mark.parametrize("body", ["echo 'ImportError: WRONG PACKAGE' >&2; exit 1", "echo hello 1.2.3", ":"])
def test_a_command_that_is_no_compiler(place, body):
    (place.root / "bin" / "neuronx-cc").write_text(f"#!/bin/sh\n{body}\n")
    done = place.run()
    assert done.returncode == 5
    assert "is no Neuron compiler" in done.stderr
    assert "PyPI's package neuronx-cc is a placeholder" in done.stderr
    assert not (place.folder / "neff").exists()


def test_changed_module_is_refused_before_anything_runs(place):
    place.jobs[2].hlo.write_bytes(b"module vae_decodeR\n")
    done = place.run("double")
    assert done.returncode == 4
    assert (
        f"hlo/vae_decoder.hlo_module.pb has the sha256 {digest(place.jobs[2].hlo)[7:]}, it was written with"
        in done.stderr
    )
    assert place.called() == []
    place.jobs[2].hlo.unlink()
    done = place.run()
    assert done.returncode == 4
    assert "hlo/vae_decoder.hlo_module.pb is missing" in done.stderr


def test_unknown_module(place):
    done = place.run("double", "doubl")
    assert done.returncode == 2
    assert "There is no module 'doubl'; there are: double clip vae_decoder" in done.stderr
    assert place.called() == []


def test_failure_shows_the_log_and_keeps_the_rest(place):
    done = place.run(STUB_FAIL="clip", STUB_SAYS="[ERROR] [NCC_EOOM001] too much", STUB_LOGS="the long story")
    assert done.returncode == 1
    assert "clip: FAILED, neuronx-cc ended with 70:\n    [ERROR] [NCC_EOOM001] too much" in done.stderr
    assert "Failed: clip. Their logs are in" in done.stderr
    neff = place.folder / "neff"
    assert (neff / "clip.log-neuron-cc.txt").read_text() == "the long story\n"
    assert not (neff / "clip.neff").exists()
    assert place.made() == {
        "double.neff", "double.json", "clip.log", "clip.log-neuron-cc.txt",
        "vae_decoder.neff", "vae_decoder.json",
    }  # fmt: skip
    assert "Finished: 1 compiled, 2 from before" in place.run().stderr


def test_no_output_is_a_failure(place):
    done = place.run("clip", STUB_EMPTY="1")
    assert done.returncode == 1
    assert place.made() == {"clip.log"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_goes_on_after_a_kill(place, number):
    """Killed with all it started while the second of three modules is being compiled."""
    process = subprocess.Popen(
        [place.script], env={**place.environ, "STUB_HOLD": "clip"}, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 30
    while not (place.calls / "holding").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, number)
    process.wait()
    assert {"double.neff", "double.json"} <= place.made()
    assert not {"clip.neff", "clip.json"} & place.made()
    assert [name for name in place.made() if name.startswith(".work")] == (
        [f".work.{process.pid}"] if number == signal.SIGKILL else []
    )
    done = place.run()
    assert "Finished: 2 compiled, 1 from before" in done.stderr
    assert not [name for name in place.made() if name.startswith(".work")]


def test_two_runs_at_once_leave_one_another_alone(place):
    """The second one clears what dead runs left, not the work of the first."""
    first = subprocess.Popen(
        [place.script, "clip"], env={**place.environ, "STUB_HOLD": "clip"}, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 30
    while not (place.calls / "holding").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert place.run("double").returncode == 0
    (place.calls / "go").touch()
    assert "Finished: 1 compiled" in first.communicate(timeout=30)[1]
    assert "Finished: 1 compiled, 2 from before" in place.run().stderr


def test_modules_lie_in_the_folder_under_names_of_their_own(place, tmp_path):
    job = place.jobs[0]
    with pytest.raises(UsageError, match="must be"):
        write_compile_script(tmp_path, [job], TRN1)
    with pytest.raises(UsageError, match="two modules are called double"):
        write_compile_script(place.folder, [job, job], TRN1)
