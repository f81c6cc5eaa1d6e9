"""What `fluxkiln doctor` finds, and what it says is missing for which target."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fluxkiln.compile import doctor
from fluxkiln.compile.doctor import KEY_PACKAGES, Tool, examine, missing_for
from fluxkiln.compile.targets import target_names
from fluxkiln.compile.toolchains.neuron import neuronx_cc
from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_ROOT_VARIABLE, TPU_MLIR_VERSION
from fluxkiln.compile.toolchains.tpu_mlir.python310 import PYTHON310_VARIABLE


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH; no Python 3.10 and no TPU-MLIR environment anywhere."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.setenv(TPU_MLIR_ROOT_VARIABLE, str(tmp_path / "env"))
    monkeypatch.delenv(PYTHON310_VARIABLE, raising=False)
    return folder


def write_command(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


def status(name: str) -> Tool:
    found = [row for row in examine() if row.name == name]
    assert len(found) == 1
    return found[0]


def test_packages_of_this_environment_are_found():
    rows = {row.name: row for row in examine()}
    assert set(KEY_PACKAGES) < rows.keys()
    assert rows["torch"].version.startswith("2.13.0")
    assert rows["python"].path == sys.executable
    assert [row for row in rows.values() if row.found and row.remedy] == []
    assert [row.name for row in rows.values() if not row.found and not row.remedy] == []


def test_missing_package_is_missing_for_every_target(monkeypatch):
    monkeypatch.setattr(doctor, "KEY_PACKAGES", ("no-such-package",))
    assert "no-such-package" in [row.name for row in missing_for("cpu", examine())]


@pytest.mark.tpu_mlir
def test_made_environment_is_found():
    row = status("tpu-mlir")
    assert row.found
    assert row.version.startswith(TPU_MLIR_VERSION)
    assert "tpu-mlir" not in [missing.name for missing in missing_for("bm1684x", examine())]


def test_machine_without_the_compiler(commands, tmp_path):
    rows = examine()
    assert [row.name for row in missing_for("bm1684x", rows)] == ["tpu-mlir", "python3.10"]
    assert missing_for("cpu", rows) == []
    row = status("tpu-mlir")
    assert row.path == str(tmp_path / "env")
    assert row.remedy.startswith("not made yet")
    assert "uv python install 3.10" in status("python3.10").remedy


def test_unfinished_environment_is_told_from_none(commands, tmp_path):
    (tmp_path / "env/bin").mkdir(parents=True)
    assert status("tpu-mlir").remedy.startswith("unfinished")


def test_neuron_compiler_is_believed_for_its_version(commands):
    write_command(commands / "neuronx-cc", "echo 'NeuronX Compiler version 2.26.6360.0+abc'")
    row = status("neuronx-cc")
    assert (row.found, row.version) == (True, "2.26.6360.0+abc")
    assert missing_for("trn1", [row]) == []


@pytest.mark.parametrize("body", ["echo WRONG PACKAGE >&2; exit 1", "echo hello"])
def test_command_that_is_no_neuron_compiler_is_refused(commands, body):
    write_command(commands / "neuronx-cc", body)
    row = status("neuronx-cc")
    assert not row.found
    assert "not from PyPI" in row.remedy
    assert missing_for("trn1", [row]) == [row]


def test_placeholder_package_is_no_compiler(commands, monkeypatch):
    monkeypatch.setattr(neuronx_cc, "installed_version", lambda package: "1.0.0.post1")
    row = status("neuronx-cc")
    assert not row.found
    assert "neuronx-cc 1.0.0.post1 is PyPI's placeholder" in row.remedy


def test_optional_commands_are_needed_for_no_target(commands):
    for name in ("docker-registry", "skopeo", "chromium"):
        assert status(name).needed_for == ()
        assert not status(name).found


@pytest.mark.parametrize(
    ("name", "targets"),
    [("sophon-sail", ("bm1684x", "bm1684x2", "bm1688", "cv184x")), ("nrtpy", ("inf2", "trn1", "trn2", "trn2_lnc1"))],
)
def test_a_vendor_s_runtime_is_optional_and_told_from_others_of_its_name(name, targets, tmp_path, monkeypatch):
    row = status(name)
    assert (row.found, row.needed_for, row.optional_for) == (False, (), targets)
    assert "executor" in row.remedy
    assert name not in [missing.name for target in targets for missing in missing_for(target, examine())]
    package = tmp_path / {"sophon-sail": "sophon", "nrtpy": "nrtpy"}[name]
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert status(name).found == (name == "nrtpy")
    (package / "sail.cpython-311-x86_64-linux-gnu.so").touch()
    (tmp_path / f"{package.name}-3.8.0.dist-info").mkdir()
    (tmp_path / f"{package.name}-3.8.0.dist-info" / "METADATA").write_text(f"Name: {package.name}\nVersion: 3.8.0\n")
    found = status(name)
    assert (found.found, found.version, found.path, found.remedy) == (True, "3.8.0", str(package), "")


def test_what_the_page_needs_is_optional(monkeypatch):
    for name in doctor.SERVE_PACKAGES:
        assert status(name).found
    monkeypatch.setattr(doctor, "SERVE_PACKAGES", ("no-such-package",))
    row = status("no-such-package")
    assert (row.found, row.needed_for, row.optional_for) == (False, (), target_names())
    assert "fluxkiln[serve]" in row.remedy
    assert "no-such-package" not in [missing.name for missing in missing_for("cpu", examine())]


def test_only_targets_that_can_be_built_are_judged():
    assert target_names() == (
        "bm1684x",
        "bm1684x2",
        "bm1688",
        "cpu",
        "cv184x",
        "gguf",
        "inf2",
        "mlx",
        "mlx_example",
        "openvino",
        "trn1",
        "trn2",
        "trn2_lnc1",
    )
    assert {name for row in examine() for name in row.needed_for} <= set(target_names())


def test_full_disk_is_missing_for_every_target(monkeypatch):
    monkeypatch.setattr(doctor, "_BUILD_DISK_GB", 1e9)
    row = status("disk")
    assert not row.found
    assert "free some" in row.remedy
    assert row.needed_for == target_names()


def test_nothing_heavy_is_imported():
    code = (
        "import sys; from fluxkiln.compile.doctor import examine; examine()\n"
        "print([name for name in ('torch', 'numpy', 'onnx', 'diffusers', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
