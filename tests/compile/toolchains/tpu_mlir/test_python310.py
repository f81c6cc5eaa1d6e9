"""Finding a Python 3.10, and saying how to get one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fluxkiln.compile.toolchains.tpu_mlir.python310 import PYTHON310_VARIABLE, find_python310
from fluxkiln.errors import ToolchainError


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without Python 3.10: an empty folder on PATH, an empty pyenv."""
    commands = tmp_path / "bin"
    commands.mkdir()
    monkeypatch.setenv("PATH", str(commands))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
    monkeypatch.delenv(PYTHON310_VARIABLE, raising=False)
    return commands


def write_command(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def claim(executable: str, version: str = "3 10") -> str:
    """A stand-in's answer to the probe."""
    return f'echo "{version} {executable}"'


def test_none_is_exit_5_with_the_remedy(bare):
    with pytest.raises(ToolchainError, match=r"no working Python 3\.10 .*uv python install 3\.10") as caught:
        find_python310()
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)


def test_path_comes_before_pyenv(bare, tmp_path):
    write_command(bare / "python3.10", claim("/on/path/python3.10"))
    write_command(tmp_path / "pyenv/versions/3.10.13/bin/python3.10", claim("/pyenv/python3.10"))
    assert find_python310() == Path("/on/path/python3.10")


def test_shim_of_an_inactive_version_is_passed_over(bare, tmp_path):
    write_command(bare / "python3.10", 'echo "pyenv: python3.10: command not found" >&2; exit 127')
    write_command(tmp_path / "pyenv/versions/3.10.9/bin/python3.10", claim("/pyenv/3.10.9"))
    write_command(tmp_path / "pyenv/versions/3.10.13/bin/python3.10", claim("/pyenv/3.10.13"))
    assert find_python310() == Path("/pyenv/3.10.13"), "the newest patch release, by number"


def test_incomplete_python_is_passed_over(bare):
    write_command(bare / "python3.10", "echo \"No module named 'ensurepip'\" >&2; exit 1")
    with pytest.raises(ToolchainError, match="no working"):
        find_python310()


def test_uv_is_asked_last(bare, tmp_path):
    from_uv = write_command(tmp_path / "uv-python/python3.10", claim("/uv/python3.10"))
    write_command(bare / "uv", f'test "$1 $2" = "python find" && echo {from_uv}')
    assert find_python310() == Path("/uv/python3.10")


def test_named_python_of_another_version_is_refused(bare, monkeypatch):
    write_command(bare / "python3.10", claim("/on/path/python3.10"))
    monkeypatch.setenv(PYTHON310_VARIABLE, sys.executable)
    with pytest.raises(ToolchainError, match=f"{PYTHON310_VARIABLE}=.* is no working Python 3.10"):
        find_python310()


@pytest.mark.tpu_mlir
def test_real_one_is_found_by_name(bare, monkeypatch, tpu_mlir):
    monkeypatch.setenv(PYTHON310_VARIABLE, str(tpu_mlir.python))
    assert find_python310() == tpu_mlir.python
