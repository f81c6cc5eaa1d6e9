"""What is installed and what is missing, looked up and not imported: `fluxkiln doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fluxkiln.compile.process import available_memory
from fluxkiln.compile.targets import all_targets
from fluxkiln.compile.toolchain import ToolStatus, all_toolchains

# What every build imports; the environment holds more, which these pull in.
KEY_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numba", "safetensors")
# what `fluxkiln serve` is made of
SERVE_PACKAGES = ("starlette", "uvicorn")

ENVIRONMENT = "`make env`, or `pip install 'fluxkiln[build]'`"
# optional programs, and what needs them
_PROGRAMS = {
    "docker-registry": "the tests that push to a registry",
    "skopeo": "the tests that read the store with another client",
    "chromium": "only pictures of a report",
}
_BUILD_DISK_GB, _BUILD_MEMORY_GB = 5, 6


@dataclass(frozen=True, slots=True)
class Tool:
    """One line of `fluxkiln doctor`, with the targets that need it.

    `needed_for` is empty for what no build needs; `optional_for` lists targets whose bundles it helps to run. `makes`
    is as `ToolStatus` has it.
    """

    name: str
    found: bool
    version: str
    path: str
    needed_for: tuple[str, ...]
    remedy: str
    optional_for: tuple[str, ...] = ()
    makes: str = ""


def examine() -> list[Tool]:
    """The main environment, what every toolchain says of itself, optional tools, disk and memory."""
    every = tuple(all_targets())
    version = ".".join(map(str, sys.version_info[:3]))
    python = ToolStatus("python", sys.version_info >= (3, 11), version, sys.executable, "use Python 3.11 or later")
    rows = [(status, every) for status in (python, *(package_status(name, ENVIRONMENT) for name in KEY_PACKAGES))]
    for toolchain in all_toolchains().values():
        targets = tuple(name for name, target in all_targets().items() if target.toolchain == toolchain.name)
        rows += [(status, targets) for status in toolchain.doctor()]
    serve = "`fluxkiln serve` needs it: pip install 'fluxkiln[serve]'"
    rows += [(package_status(name, serve, needed=False), every) for name in SERVE_PACKAGES]
    # looked up, not started: a browser's version takes a second
    for command, use in _PROGRAMS.items():
        path = shutil.which(command)
        rows.append((ToolStatus(command, bool(path), "", path or "", f"{use} need it: apt install {command}"), ()))
    free, available = shutil.disk_usage(Path.cwd()).free / 1e9, available_memory() / 1e9
    remedy = f"a small build with its environments needs {_BUILD_DISK_GB} GB: free some"
    rows.append((ToolStatus("disk", free >= _BUILD_DISK_GB, f"{free:.1f} GB free", str(Path.cwd()), remedy), every))
    remedy = f"compiling a full-size block needs {_BUILD_MEMORY_GB} GB: stop other work"
    rows.append((ToolStatus("memory", available >= _BUILD_MEMORY_GB, f"{available:.1f} GB available", "", remedy), ()))
    return [
        Tool(
            status.name, status.found, status.version, status.path, targets if status.needed else (),
            "" if status.found else status.remedy, () if status.needed else targets, status.makes,
        )
        for status, targets in rows
    ]  # fmt: skip


def missing_for(target: str, statuses: list[Tool]) -> list[Tool]:
    """What `target` needs and does not have."""
    return [status for status in statuses if target in status.needed_for and not status.found]


def package_status(name: str, remedy: str, needed: bool = True) -> ToolStatus:
    """A Python package of this environment."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return ToolStatus(name, False, "", "", remedy, needed)
    return ToolStatus(name, True, distribution.version, str(distribution.locate_file("")), "", needed)


def runtime_status(
    name: str, module: str, distributions: tuple[str, ...], remedy: str, holding: str = ""
) -> ToolStatus:
    """A vendor's runtime library, which runs bundles; imported it would start its driver.

    Args:
        module: its package; `holding`: what must lie in it, as others have a package of the same name.
        distributions: the names under which it is installed, any of them.
    """
    spec = importlib.util.find_spec(module)
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()] if spec is not None else []
    if spec is None or (holding and not any(any(folder.glob(f"{holding}*")) for folder in folders)):
        return ToolStatus(name, False, "", "", remedy, needed=False)
    version = next((found for one in distributions if (found := installed_version(one))), "")
    return ToolStatus(name, True, version, str(folders[0] if folders else spec.origin or ""), "", needed=False)


def installed_version(package: str) -> str:
    """The version of an installed package; empty where it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def version_line(command: str) -> str:
    """The version in what `command --version` prints; empty where it names none."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    match = re.search(r"\d+\.\d+(?:\.\d+)+\S*", done.stdout + done.stderr)
    return match[0] if match else ""
