"""What is installed and what is missing, without importing or starting anything heavy."""

from __future__ import annotations

import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from fluxkiln.compile.installed import package_status
from fluxkiln.compile.targets import all_targets
from fluxkiln.compile.toolchain import ToolStatus, all_toolchains

# What every build imports; the environment holds more, which these pull in.
KEY_PACKAGES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime", "numba", "safetensors")
# what `fluxkiln serve` is made of
SERVE_PACKAGES = ("starlette", "uvicorn")

ENVIRONMENT = "`make env`, or `pip install fluxkiln`"
_BUILD_DISK_GB = 5.0
_BUILD_MEMORY_GB = 6.0


@dataclass(frozen=True, slots=True)
class Tool:
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


def examine(work: Path | None = None) -> list[Tool]:
    """The main environment, what every toolchain says of itself, optional tools, disk and memory.

    Args:
        work: where builds go; its disk is looked at. The current folder by default.
    """
    every = tuple(all_targets())
    serve = [package_status(name, "`fluxkiln serve` needs it: pip install 'fluxkiln[serve]'", needed=False)
             for name in SERVE_PACKAGES]  # fmt: skip
    rows = [(status, every) for status in (_python(), *(package_status(name, ENVIRONMENT) for name in KEY_PACKAGES))]
    for toolchain in all_toolchains().values():
        targets = tuple(name for name, target in all_targets().items() if target.toolchain == toolchain.name)
        rows += [(status, targets) for status in toolchain.doctor()]
    return [
        *(_row(status, targets) for status, targets in (*rows, *((status, every) for status in serve))),
        _command("docker-registry", "the tests that push to a registry need it: apt install docker-registry"),
        _command("skopeo", "the tests that read the store with another client need it: apt install skopeo"),
        _command("chromium", "only pictures of a report need it: apt install chromium"),
        _row(_disk((work or Path.cwd()).absolute()), every),
        _memory(),
    ]


def missing_for(target: str, statuses: list[Tool]) -> list[Tool]:
    """What `target` needs and does not have."""
    return [status for status in statuses if target in status.needed_for and not status.found]


def _row(status: ToolStatus, targets: tuple[str, ...]) -> Tool:
    needed_for, optional_for = (targets, ()) if status.needed else ((), targets)
    return Tool(status.name, status.found, status.version, status.path, needed_for, status.remedy, optional_for)


def _python() -> ToolStatus:
    found = sys.version_info >= (3, 11)
    version = ".".join(map(str, sys.version_info[:3]))
    return ToolStatus("python", found, version, sys.executable, "" if found else "use Python 3.11 or later")


def _command(name: str, remedy: str) -> Tool:
    """An optional command: looked up, not started (a browser's version takes a second)."""
    path = shutil.which(name)
    return Tool(name, path is not None, "", path or "", (), "" if path else remedy)


def _disk(folder: Path) -> ToolStatus:
    free = shutil.disk_usage(folder).free / 1e9
    found = free >= _BUILD_DISK_GB
    remedy = "" if found else f"a small build with its environments needs {_BUILD_DISK_GB:.0f} GB: free some"
    return ToolStatus("disk", found, f"{free:.1f} GB free", str(folder), remedy)


def _memory() -> Tool:
    available = _available_memory_bytes() / 1e9
    found = available >= _BUILD_MEMORY_GB
    remedy = "" if found else f"compiling a full-size block needs {_BUILD_MEMORY_GB:.0f} GB: stop other work"
    return Tool("memory", found, f"{available:.1f} GB available", "", (), remedy)


def _available_memory_bytes() -> int:
    """What the kernel would hand out without swapping, or all there is where it does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        match = None
    return int(match[1]) * 1024 if match else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
