"""Find a Python 3.10: TPU-MLIR's wheel takes no other."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from fluxkiln.errors import ToolchainError

PYTHON310_VARIABLE = "FLUXKILN_PYTHON310"
HOW_TO_GET_PYTHON310 = (
    "install it with `uv python install 3.10`, `pyenv install 3.10` or the system's packages (python3.10 and "
    f"python3.10-venv), or name one in {PYTHON310_VARIABLE}"
)

# What the environment is made with and what TPU-MLIR imports; a Python built without sqlite or OpenSSL lacks some.
_PROBE = "import ctypes, ensurepip, sqlite3, ssl, sys, venv; print(*sys.version_info[:2], sys.executable)"


def find_python310() -> Path:
    """The interpreter named by FLUXKILN_PYTHON310, else the first of PATH, pyenv, uv; ToolchainError if none works."""
    named = os.environ.get(PYTHON310_VARIABLE)
    for candidate in [named] if named else _candidates():
        if found := _probe(candidate):
            return found
    if named:
        raise ToolchainError(
            f"{PYTHON310_VARIABLE}={named} is no working Python 3.10 with venv, ssl and sqlite3; {HOW_TO_GET_PYTHON310}"
        )
    raise ToolchainError(f"no working Python 3.10 found on PATH, in pyenv or by uv; {HOW_TO_GET_PYTHON310}")


def _candidates() -> Iterator[str]:
    if on_path := shutil.which("python3.10"):
        yield on_path
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    installed = [path for path in pyenv.glob("versions/3.10*/bin/python3.10") if not path.parent.parent.is_symlink()]
    yield from (str(path) for path in sorted(installed, key=_patch_release, reverse=True))
    if (uv := shutil.which("uv")) and (answer := _answer([uv, "python", "find", "--no-project", "3.10"])):
        yield answer


def _patch_release(python: Path) -> int:
    """13 for `.../versions/3.10.13/bin/python3.10`."""
    last = python.parent.parent.name.rpartition(".")[2]
    return int(last) if last.isdigit() else -1


def _probe(python: str) -> Path | None:
    """The interpreter behind `python` if it runs and is a complete 3.10; pyenv has shims for inactive versions too."""
    answer = _answer([python, "-I", "-c", _PROBE])
    major, minor, executable = (answer or "0 0 -").split(" ", 2)
    return Path(executable) if (major, minor) == ("3", "10") else None


def _answer(argv: list[str]) -> str | None:
    """What a command prints, or None when it cannot be run, fails or hangs."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=20, check=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
