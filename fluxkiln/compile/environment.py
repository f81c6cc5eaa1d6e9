"""Environments of their own: for compilers and clients whose packages do not go with fluxkiln's.

Each is a virtual environment of pinned packages in a folder beside the main one, made under a lock, checked, and
stamped last with the digest of all that decides what is in it: one that was left unfinished, or belongs to other pins,
is made again. Nothing here needs a package, so that any Python can make them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.errors import FluxkilnError, ResourceError, ToolchainError

STAMP = "fluxkiln.json"
Tell = Callable[[str], None]
_CHECKOUT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment that is there or can be made.

    Attributes:
        title: what it is for, with the version: "TPU-MLIR 1.30.2".
        folder: beside the main environment; cached: elsewhere, of the user's cache. variable: names another one.
        needed_bytes: of disk, to make it.
        pins: file of the exact versions. sources: further files that decide what it is or how it was checked.
        python: finds the interpreter that it is made with; ToolchainError where there is none.
        finish: what is done in its folder after the install, a check last; facts for the stamp. ToolchainError: it
            does not work.
        options: of pip. layout: raised when what `finish` does changes.
    """

    title: str
    folder: str
    cached: str
    variable: str
    needed_bytes: int
    pins: Path
    python: Callable[[], Path]
    finish: Callable[[Path, Tell], Mapping[str, Any]]
    sources: tuple[Path, ...] = ()
    options: tuple[str, ...] = ("--no-deps", "--no-compile")
    layout: int = 1

    @property
    def root(self) -> Path:
        """What its variable names, else its folder in the source checkout, else one of the user's cache."""
        named = os.environ.get(self.variable)
        if named:
            return Path(named).absolute()
        if (_CHECKOUT / "pyproject.toml").is_file():
            return _CHECKOUT / self.folder
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return cache / "fluxkiln" / self.cached

    @property
    def key(self) -> str:
        """Digest of everything that decides what the environment is and how it was checked."""
        digest = hashlib.sha256(f"layout {self.layout}".encode())
        for path in (self.pins, *self.sources):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return digest.hexdigest()

    def find(self, root: Path | None = None) -> Mapping[str, Any] | None:
        """The stamp of the finished, current environment in `root`; None where there is none. Starts nothing."""
        folder = root or self.root
        try:
            stamp: Mapping[str, Any] = json.loads((folder / STAMP).read_text(encoding="utf-8"))
            current = stamp["key"] == self.key
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return stamp if current and (folder / "bin" / "python").exists() else None

    def ensure(self, tell: Tell, root: Path | None = None) -> Mapping[str, Any]:
        """The stamp of the environment in `root`, made first when it is missing, unfinished or of another version.

        Raises:
            ToolchainError: no interpreter, a failed install, or a failed check. ResourceError: too little disk.
        """
        folder = (root or self.root).absolute()
        if found := self.find(folder):
            return found
        python = self.python()
        with self._locked(folder, tell):
            # another process may have made it meanwhile
            return self.find(folder) or self._make(folder, python, tell)

    def run(self, argv: Sequence[str], log: Path, cwd: Path, environ: Mapping[str, str], what_failed: str) -> None:
        """Run a command with its output appended to `log`; ToolchainError with the log's last lines when it fails."""
        with log.open("ab") as output:
            done = subprocess.run(
                argv, cwd=cwd, env=environ, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                check=False,
            )  # fmt: skip
        if done.returncode:
            raise ToolchainError(
                f"{self.title}: {what_failed} (exit code {done.returncode}): {_last_lines(log)}; all of it is in {log}"
            )

    def main(self) -> int:
        """Make it; progress and errors go to stderr."""
        try:
            self.ensure(lambda line: print(line, file=sys.stderr, flush=True))
        except FluxkilnError as error:
            print(f"error: {error}", file=sys.stderr)
            return error.exit_code
        os.utime(self.root / STAMP)  # tells make that it is as new as its sources
        return 0

    def _make(self, root: Path, python: Path, tell: Tell) -> Mapping[str, Any]:
        free = shutil.disk_usage(root).free
        if free < self.needed_bytes:
            raise ResourceError(
                f"{free / 1e9:.1f} GB free at {root}: {self.title} needs {self.needed_bytes / 1e9:.1f} GB; free some, "
                f"or name another folder in {self.variable}"
            )
        for leftover in root.iterdir():
            if leftover.name != ".lock":
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        tell(f"{self.title}: making its environment in {root} with {python}")
        log, own = root / "install.log", root / "bin" / "python"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self.run([str(python), "-m", "venv", str(root)], log, root, clean, "the virtual environment was not made")
        install = [str(own), "-m", "pip", "install", "-q", *self.options, "-r", str(self.pins)]
        self.run(install, log, root, clean, "its packages were not installed")
        stamp = {"key": self.key, "python": str(python), **self.finish(root, tell)}
        unfinished = root / f"{STAMP}.part"
        unfinished.write_text(json.dumps(stamp, indent=2) + "\n", encoding="utf-8")
        unfinished.replace(root / STAMP)
        tell(f"{self.title}: ready")
        return stamp

    @contextmanager
    def _locked(self, root: Path, tell: Tell) -> Iterator[None]:
        """Hold `root` for this process; the lock goes with the process, however that ends."""
        try:
            root.mkdir(parents=True, exist_ok=True)
            lock = (root / ".lock").open("w")
        except OSError as error:
            raise ResourceError(
                f"{root} cannot be written ({error.strerror}); name another folder in {self.variable}"
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                tell(f"another process is making {root}: waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _last_lines(log: Path) -> str:
    """The last lines that say something: errors when there are any, else whatever came last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|not found|killed|no space|failed", line, re.IGNORECASE)]
    return " / ".join((errors or lines)[-3:]) or "it said nothing"
