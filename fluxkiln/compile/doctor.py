"""What is installed and what is missing, without importing or starting anything heavy."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from fluxkiln.compile.targets import target_names
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
# what lowers for Neuron
NEURON_PACKAGES = ("jax", "jaxlib", "torchax")
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
        *(_package(name, NEURON_TARGETS, "`make env`, or `pip install 'fluxkiln[trn1]'`") for name in NEURON_PACKAGES),
        _neuronx_cc(),
        _runtime(
            "sophon-sail",
            "sophon",
            ("sophon", "sophon-arm", "sophon-sail"),
            TPU_TARGETS,
            "sail",
            "the executor sail needs it, on a machine with a BM1684X: install the wheel of your Sophgo SDK",
        ),
        _runtime(
            "nrtpy",
            "nrtpy",
            ("nrtpy",),
            NEURON_TARGETS,
            "",
            "the executor neuron needs it, on a Trainium or Inferentia instance: install nrtpy and "
            "aws-neuronx-runtime-lib from the AWS Neuron package index",
        ),
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
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return ToolStatus(name, False, "", "", needed_for, remedy)
    return ToolStatus(name, True, distribution.version, str(distribution.locate_file("")), needed_for, "")


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


def _neuronx_cc() -> ToolStatus:
    """The Neuron compiler; what PyPI has under its name is a placeholder without the command."""
    source = "install it from the AWS Neuron package index, not from PyPI; all up to its call works without it"
    command = shutil.which("neuronx-cc")
    if command is None:
        placeholder = _installed_version("neuronx-cc")
        why = f"the package neuronx-cc {placeholder} is PyPI's placeholder, without a compiler: " if placeholder else ""
        return ToolStatus("neuronx-cc", False, "", "", NEURON_TARGETS, why + source)
    version = _version_line(command)
    if version is None:
        remedy = f"{command} --version names no version, so it is no compiler: {source}"
        return ToolStatus("neuronx-cc", False, "", command, NEURON_TARGETS, remedy)
    return ToolStatus("neuronx-cc", True, version, command, NEURON_TARGETS, "")


def _runtime(
    name: str, module: str, distributions: tuple[str, ...], runs: tuple[str, ...], inside: str, remedy: str
) -> ToolStatus:
    """A vendor's runtime library, which is looked up and not imported: that would start its driver.

    Args:
        module: its package; `inside`: what must lie in it, as others have a package of the same name.
        distributions: the names under which it is installed, any of them.
        runs: the targets whose bundles it runs.
    """
    spec = importlib.util.find_spec(module)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []
    if spec is None or (inside and not any(any(folder.glob(f"{inside}*")) for folder in folders)):
        return ToolStatus(name, False, "", "", (), remedy, runs)
    version = next((found for one in distributions if (found := _installed_version(one))), "")
    return ToolStatus(name, True, version, str(folders[0] if folders else spec.origin or ""), (), "", runs)


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


def _installed_version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _version_line(command: str) -> str | None:
    """The version in what `command --version` prints, or None."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(r"\d+\.\d+(?:\.\d+)+\S*", done.stdout + done.stderr)
    return match[0] if match else None
