"""Distributions as an installer leaves them: a package on the path, and beside it what it registers."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path

from tests.ran import Run

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = Path(__file__).resolve().parent
PATIENCE = 900


def register(site: Path, name: str, version: str, entry_points: Mapping[str, Mapping[str, str]]) -> None:
    """Write a distribution's metadata into `site`: entry points by group and name."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{entry} = {value}" for entry, value in entries.items())]
    (folder / "entry_points.txt").write_text("\n".join(lines) + "\n")


def install(site: Path, example: str) -> None:
    """Install an example by its own pyproject.toml; its package is linked, as with an editable install."""
    project = tomllib.loads((EXAMPLES / example / "pyproject.toml").read_text(encoding="utf-8"))
    register(site, *(project["project"][key] for key in ("name", "version", "entry-points")))
    for package in project["tool"]["setuptools"]["packages"]:
        (site / package).symlink_to(EXAMPLES / example / package)


def run_python(site: Path, folder: Path, *arguments: object) -> Run:
    """This Python with fluxkiln and what is installed in `site`, in `folder`."""
    kept = {key: value for key, value in os.environ.items() if key != "FLUXKILN_STORE"}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**kept, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "XDG_CACHE_HOME": str(folder / "cache")},
        cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False,
    )  # fmt: skip
    return Run(done.returncode, done.stdout, done.stderr)


def fluxkiln(site: Path, folder: Path, *arguments: object) -> Run:
    """A command of fluxkiln, which must succeed."""
    run = run_python(site, folder, "-m", "fluxkiln", *arguments)
    assert run.code == 0, run.err
    return run
