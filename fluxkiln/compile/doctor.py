"""What is installed and what is missing, without importing or starting anything heavy."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from fluxkiln.compile import toolchain
from fluxkiln.compile.installed import package_status, runtime_status
from fluxkiln.compile.targets import target_names
from fluxkiln.compile.toolchain import find_toolchain
from fluxkiln.compile.toolchains.tpu_mlir.environment import (
    TPU_MLIR_VERSION,
    TpuMlirEnv,
    default_tpu_mlir_root,
    find_tpu_mlir,
)
from fluxkiln.compile.toolchains.tpu_mlir.python310 import find_python310
from fluxkiln.errors import ToolchainError

ALL_TARGETS = target_names()
TPU_TARGETS = tuple(name for name in ALL_TARGETS if name.startswith("bm"))
NEURON_TARGETS = tuple(name for name in ALL_TARGETS if name.startswith(("trn", "inf")))

# What every build imports; the environment holds more, which these pull in.
KEY_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numba", "safetensors")
# what `fluxkiln serve` is made of
SERVE_PACKAGES = ("starlette", "uvicorn")

_BUILD_DISK_GB = 5.0
_BUILD_MEMORY_GB = 6.0


@dataclass(frozen=True, slots=True)
class ToolStatus:
    """One line of `fluxkiln doctor`.

    `found` is whether the tool is usable as it stands; `path` where it lies. `needed_for` lists targets, and is empty
    for what no build needs. `optional_for` lists targets whose bundles it helps to run: what is missing there keeps
    nothing from being built. `remedy` is empty when `found`.
    """

    name: str
    found: bool
    version: str
    path: str
    needed_for: tuple[str, ...]
    remedy: str
    optional_for: tuple[str, ...] = ()


def examine(work: Path | None = None) -> list[ToolStatus]:
    """The status of every toolchain, the main environment, optional tools, disk and memory.

    Args:
        work: where builds go; its disk is looked at. The current folder by default.
    """
    root = default_tpu_mlir_root()
    tpu_mlir = find_tpu_mlir(root)
    return [
        _main_python(),
        *(_package(name) for name in KEY_PACKAGES),
        _tpu_mlir(tpu_mlir, root),
        # Only needed while TPU-MLIR's environment has yet to be made.
        _python310(() if tpu_mlir else TPU_TARGETS),
        _row(
            runtime_status(
                "sophon-sail",
                "sophon",
                ("sophon", "sophon-arm", "sophon-sail"),
                "the executor sail needs it, on a machine with a BM1684X: install the wheel of your Sophgo SDK",
                "sail",
            ),
            TPU_TARGETS,
        ),
        *(_row(status, NEURON_TARGETS) for status in find_toolchain("neuron").doctor()),
        *(
            replace(
                _package(name, (), "`fluxkiln serve` needs it: pip install 'fluxkiln[serve]'"), optional_for=ALL_TARGETS
            )
            for name in SERVE_PACKAGES
        ),
        _command("docker-registry", "the tests that push to a registry need it: apt install docker-registry"),
        _command("skopeo", "the tests that read the store with another client need it: apt install skopeo"),
        _command("chromium", "only pictures of a report need it: apt install chromium"),
        _disk((work or Path.cwd()).absolute()),
        _memory(),
    ]


def missing_for(target: str, statuses: list[ToolStatus]) -> list[ToolStatus]:
    """What `target` needs and does not have."""
    return [status for status in statuses if target in status.needed_for and not status.found]


def _main_python() -> ToolStatus:
    version = ".".join(map(str, sys.version_info[:3]))
    found = sys.version_info >= (3, 11)
    return ToolStatus(
        "python", found, version, sys.executable, ALL_TARGETS, "" if found else "use Python 3.11 or later"
    )


def _package(
    name: str, needed_for: tuple[str, ...] = ALL_TARGETS, remedy: str = "`make env`, or `pip install fluxkiln`"
) -> ToolStatus:
    return _row(package_status(name, remedy), needed_for)


def _row(status: toolchain.ToolStatus, targets: tuple[str, ...]) -> ToolStatus:
    needed_for, optional_for = (targets, ()) if status.needed else ((), targets)
    return ToolStatus(status.name, status.found, status.version, status.path, needed_for, status.remedy, optional_for)


def _tpu_mlir(env: TpuMlirEnv | None, root: Path) -> ToolStatus:
    if env is not None:
        version = f"{env.version} (self-check relative L2 {env.check_rel_l2:.1e})"
        return ToolStatus("tpu-mlir", True, version, str(root), TPU_TARGETS, "")
    state = "unfinished or of another version" if (root / "bin").is_dir() else "not made yet"
    remedy = (
        f"{state}: the next build for {' or '.join(TPU_TARGETS)} makes version {TPU_MLIR_VERSION}, or run "
        f"`{sys.executable} -m fluxkiln.compile.toolchains.tpu_mlir.environment`"
    )
    return ToolStatus("tpu-mlir", False, "", str(root), TPU_TARGETS, remedy)


def _python310(needed_for: tuple[str, ...]) -> ToolStatus:
    try:
        python = find_python310()
    except ToolchainError as error:
        return ToolStatus("python3.10", False, "", "", needed_for, str(error))
    return ToolStatus("python3.10", True, "3.10", str(python), needed_for, "")


def _command(name: str, remedy: str) -> ToolStatus:
    """An optional command: looked up, not started (a browser's version takes a second)."""
    path = shutil.which(name)
    return ToolStatus(name, path is not None, "", path or "", (), "" if path else remedy)


def _disk(folder: Path) -> ToolStatus:
    free = shutil.disk_usage(folder).free / 1e9
    found = free >= _BUILD_DISK_GB
    remedy = "" if found else f"a small build with its environments needs {_BUILD_DISK_GB:.0f} GB: free some"
    return ToolStatus("disk", found, f"{free:.1f} GB free", str(folder), ALL_TARGETS, remedy)


def _memory() -> ToolStatus:
    available = _available_memory_bytes() / 1e9
    found = available >= _BUILD_MEMORY_GB
    remedy = "" if found else f"compiling a full-size block needs {_BUILD_MEMORY_GB:.0f} GB: stop other work"
    return ToolStatus("memory", found, f"{available:.1f} GB available", "", (), remedy)


def _available_memory_bytes() -> int:
    """What the kernel would hand out without swapping, or all there is where it does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
