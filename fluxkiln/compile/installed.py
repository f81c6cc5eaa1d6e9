"""What is installed, looked up and not imported: rows of `fluxkiln doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import subprocess
from pathlib import Path

from fluxkiln.compile.toolchain import ToolStatus


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
