"""TPU-MLIR's environment: recognised, made under a lock, put right inside itself only, proven by a compile."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import re
import subprocess
import threading
from pathlib import Path

import pytest

from fluxkiln.compile.environment import STAMP
from fluxkiln.compile.toolchains.tpu_mlir import environment as tpu_mlir_env
from fluxkiln.compile.toolchains.tpu_mlir.environment import (
    TPU_MLIR_ROOT_VARIABLE,
    TPU_MLIR_VERSION,
    TpuMlirEnv,
    bundled_glibc,
    check_tpu_mlir,
    default_tpu_mlir_root,
    ensure_tpu_mlir,
    find_tpu_mlir,
    remove_bundled_glibc,
    tool_argv,
    tpu_mlir_environ,
)
from fluxkiln.compile.toolchains.tpu_mlir.python310 import PYTHON310_VARIABLE
from fluxkiln.errors import ResourceError, ToolchainError


@pytest.fixture
def env(tmp_path: Path) -> TpuMlirEnv:
    """Paths only, and a file in a simulator's place."""
    (tmp_path / "bm1684x").mkdir()
    (tmp_path / "bm1684x/libcmodel.so").touch()
    root = Path("/nowhere")
    return TpuMlirEnv(root / "bin/python", root / "tpu_mlir", TPU_MLIR_VERSION, Path("/stubs"), tmp_path, 0.0)


def write_finished(root: Path, key: str | None = None) -> Path:
    """What `find_tpu_mlir` looks at, in a folder without a compiler."""
    (root / "bin").mkdir(parents=True, exist_ok=True)
    (root / "bin/python").touch()
    stamp = {"key": key or tpu_mlir_env.tpu_mlir_environment().key, "check": {"rel_l2": 1e-7}}
    (root / STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    return root


def unexpected(line: str) -> None:
    raise AssertionError(f"nothing should be made: {line}")


def test_root_is_named_by_the_variable(tmp_path, monkeypatch, repository):
    monkeypatch.setenv(TPU_MLIR_ROOT_VARIABLE, str(tmp_path))
    assert default_tpu_mlir_root() == tmp_path
    monkeypatch.delenv(TPU_MLIR_ROOT_VARIABLE)
    assert default_tpu_mlir_root() == repository / ".venv-tpu-mlir"


def test_finished_environment_is_found_and_not_made_again(tmp_path):
    root = write_finished(tmp_path)
    assert ensure_tpu_mlir(root, unexpected) == find_tpu_mlir(root)
    assert find_tpu_mlir(root).check_rel_l2 == 1e-7


@pytest.mark.parametrize("damage", ["missing", "no stamp", "no json", "other json", "other key", "no python"])
def test_unfinished_environment_is_not_found(tmp_path, damage):
    root = write_finished(tmp_path / "env", key="of another version" if damage == "other key" else None)
    if damage == "missing":
        root = tmp_path / "missing"
    elif damage == "no stamp":
        (root / STAMP).unlink()
    elif damage in ("no json", "other json"):
        (root / STAMP).write_text("[" if damage == "no json" else "[]", encoding="utf-8")
    elif damage == "no python":
        (root / "bin/python").unlink()
    assert find_tpu_mlir(root) is None


def test_key_follows_the_pins(tmp_path, monkeypatch):
    before = tpu_mlir_env.tpu_mlir_environment().key
    pins = tpu_mlir_env._LOCK_FILE.read_text(encoding="utf-8")
    changed = tmp_path / tpu_mlir_env._LOCK_FILE.name
    changed.write_text(pins.replace("numpy==1.24.3", "numpy==1.24.4"), encoding="utf-8")
    monkeypatch.setattr(tpu_mlir_env, "_LOCK_FILE", changed)
    assert tpu_mlir_env.tpu_mlir_environment().key != before


def test_every_package_is_pinned():
    lines = tpu_mlir_env._LOCK_FILE.read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert f"tpu_mlir=={TPU_MLIR_VERSION}" in pins
    assert [line for line in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_second_process_waits_and_takes_what_the_first_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_mlir_env, "find_python310", lambda: Path("/not/needed"))
    monkeypatch.setattr(tpu_mlir_env, "_finish", lambda *_: pytest.fail("made a second time"))
    waiting, found = threading.Event(), []

    def second() -> None:
        found.append(ensure_tpu_mlir(tmp_path, lambda line: waiting.set() if "waiting" in line else None))

    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        thread = threading.Thread(target=second)
        thread.start()
        assert waiting.wait(60)
        assert found == []
        write_finished(tmp_path)
    thread.join(60)
    assert found == [find_tpu_mlir(tmp_path)]


def test_full_disk_is_named_before_anything_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_mlir_env, "find_python310", lambda: Path("/not/needed"))
    monkeypatch.setattr(tpu_mlir_env, "_NEEDED_BYTES", 1 << 62)
    with pytest.raises(ResourceError, match=r"GB free at .* needs .* free some"):
        ensure_tpu_mlir(tmp_path, unexpected)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_folder_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_mlir_env, "find_python310", lambda: Path("/not/needed"))
    (tmp_path / "file").touch()
    with pytest.raises(ResourceError, match=TPU_MLIR_ROOT_VARIABLE):
        ensure_tpu_mlir(tmp_path / "file" / "env", unexpected)


def test_no_wheels_for_another_platform(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_mlir_env.platform, "machine", lambda: "aarch64")
    with pytest.raises(ToolchainError, match=r"linux x86_64 only, this is linux aarch64") as caught:
        ensure_tpu_mlir(tmp_path, unexpected)
    assert caught.value.exit_code == 5


def test_environ_keeps_the_callers_python_out(env):
    base = {
        "PATH": "/usr/bin",
        "PYTHONPATH": "/mine",
        "PYTHONHOME": "/home",
        "VIRTUAL_ENV": "/venv",
        "LD_PRELOAD": "x.so",
        "LD_LIBRARY_PATH": "/my/libraries",
        "LANG": "C.UTF-8",
    }
    before = dict(base)
    environ = tpu_mlir_environ(env, base=base)
    assert base == before
    assert environ["LANG"] == "C.UTF-8"
    assert not {"PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD"} & environ.keys()
    assert "/mine" not in environ["PYTHONPATH"]
    assert environ["PYTHONPATH"].startswith("/stubs:/nowhere/tpu_mlir:")
    assert environ["PATH"].split(":")[0] == "/nowhere/bin"
    assert environ["PATH"].endswith(":/usr/bin")
    assert environ["LD_LIBRARY_PATH"].startswith(f"{env.simulators}/bm1684x:/nowhere/tpu_mlir/lib:")
    assert environ["LD_LIBRARY_PATH"].endswith(":/my/libraries")
    assert tpu_mlir_environ(env, base={"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"


def test_chip_without_a_simulator_is_refused(env):
    with pytest.raises(ToolchainError, match=r"no simulator for chip 'bm1999'; it has bm1684x"):
        tpu_mlir_environ(env, "bm1999")


def write_third_party(package: Path, banner: str) -> Path:
    third_party = package / "lib/third_party"
    third_party.mkdir(parents=True)
    for name in ("libc.so.6", "libm.so.6", "libpthread.so.0", "libz.so.1"):
        (third_party / name).write_bytes(b"\x7fELF\x00" + banner.encode() + b"\x00")
    return third_party


def test_glibc_of_another_version_is_removed(tmp_path):
    third_party = write_third_party(
        tmp_path, "GNU C Library (Ubuntu GLIBC 2.35-0ubuntu3.9) stable release version 2.35.\n"
    )
    assert bundled_glibc(tmp_path) == "2.35"
    assert remove_bundled_glibc(tmp_path, "2.35") == ()
    assert len(list(third_party.iterdir())) == 4
    assert remove_bundled_glibc(tmp_path, "2.36") == ("libc.so.6", "libm.so.6", "libpthread.so.0")
    assert [path.name for path in third_party.iterdir()] == ["libz.so.1"]
    assert remove_bundled_glibc(tmp_path, "2.36") == ()
    assert bundled_glibc(tmp_path) is None


@pytest.mark.tpu_mlir
def test_tools_exist(tpu_mlir):
    for tool in ("model_transform", "model_deploy", "model_runner", "model_tool", "tpuc-opt"):
        argv = tool_argv(tpu_mlir, tool)
        assert Path(argv[-1]).is_file()
        assert argv[:-1] in ([], [str(tpu_mlir.python)])
    with pytest.raises(ToolchainError, match="has no tool 'model_melt'"):
        tool_argv(tpu_mlir, "model_melt")


@pytest.mark.tpu_mlir
def test_stamp_records_what_was_put_right(tpu_mlir):
    stamp = json.loads((tpu_mlir.python.parent.parent / STAMP).read_text(encoding="utf-8"))
    assert stamp["tpu_mlir"] == TPU_MLIR_VERSION
    assert stamp["check"]["rel_l2"] <= 1e-6
    same = stamp["glibc"]["bundled"] == stamp["glibc"]["host"]
    assert bool(stamp["glibc"]["removed"]) != same
    assert (bundled_glibc(tpu_mlir.package_root) is None) != same


@pytest.mark.tpu_mlir
def test_stub_stands_in_for_torch_in_compiler_processes_only(tpu_mlir):
    code = (
        "import torch, plotly.graph_objects, onnxruntime_extensions\n"
        "print(torch.__file__, torch.tensor([[1.0, 2.5]]).numpy().tolist())\n"
        "try:\n    from torch import nn\nexcept ImportError as error:\n    print(error)"
    )
    before = dict(os.environ)
    done = subprocess.run(
        [tpu_mlir.python, "-c", code], env=tpu_mlir_environ(tpu_mlir), capture_output=True, text=True, check=True
    )
    where, refused = done.stdout.splitlines()
    assert where == f"{tpu_mlir.stub / 'torch.py'} [[1.0, 2.5]]"
    assert refused.startswith("torch.nn is not available")
    assert dict(os.environ) == before
    without = subprocess.run(
        [tpu_mlir.python, "-c", "import torch"], capture_output=True, text=True, check=False, env={}
    )
    assert "No module named 'torch'" in without.stderr


@pytest.mark.tpu_mlir
def test_self_check_compiles_and_simulates(tpu_mlir, tmp_path):
    numbers = check_tpu_mlir(tpu_mlir, tmp_path / "check")
    assert 0 < numbers["rel_l2"] <= 1e-6
    assert (tmp_path / "check/check.bmodel").is_file()


@pytest.mark.tpu_mlir
def test_process_gets_the_simulator_of_its_chip(tpu_mlir):
    """Whatever chip ran last: TPU-MLIR re-points a link of its own at that."""
    code = (
        "import ctypes\nctypes.CDLL('libcmodel.so')\n"
        "print(next(line.split('/')[-1] for line in open('/proc/self/maps') if 'libcmodel' in line))"
    )
    for chip in ("bm1684x", "bm1688"):
        environ = tpu_mlir_environ(tpu_mlir, chip)
        done = subprocess.run([tpu_mlir.python, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert done.stdout.split() == [f"libcmodel_{chip}.so"]


@pytest.mark.tpu_mlir
def test_self_check_fails_on_a_wrong_number(tpu_mlir, tmp_path, monkeypatch):
    monkeypatch.setattr(tpu_mlir_env, "_CHECK_REL_L2", 0.0)
    with pytest.raises(ToolchainError, match=r"relative L2 error of \d"):
        check_tpu_mlir(tpu_mlir, tmp_path / "check")


@pytest.mark.tpu_mlir
def test_self_check_fails_without_the_stub(tpu_mlir, tmp_path):
    bare = dataclasses.replace(tpu_mlir, stub=tmp_path)
    with pytest.raises(ToolchainError, match=r"self-check .*No module named '.*check\.log") as caught:
        check_tpu_mlir(bare, tmp_path / "check")
    assert caught.value.exit_code == 5


@pytest.mark.tpu_mlir
def test_failed_install_leaves_no_finished_environment(tpu_mlir, tmp_path, monkeypatch):
    monkeypatch.setenv(PYTHON310_VARIABLE, str(tpu_mlir.python))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    root = tmp_path / "env"
    (root / "lib").mkdir(parents=True)
    (root / "lib/left by a killed process").touch()
    with pytest.raises(ToolchainError, match=r"packages were not installed .*tpu_mlir.*install\.log"):
        ensure_tpu_mlir(root, lambda line: None)
    assert find_tpu_mlir(root) is None
    assert not (root / "lib/left by a killed process").exists()
    assert (root / "install.log").is_file()
