"""The files of a checkpoint's folder: regular, inside it, with names that a bundle can hold, and no larger than sane.

A symbolic link may lead to another file of the folder, or of the repository whose snapshot the folder is in a Hugging
Face cache. One that leads elsewhere would put a file of the user's into a bundle that is then passed on.
"""

from __future__ import annotations

import stat
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.documents import read_object_file
from fluxkiln.errors import CheckpointError

MAX_SIDECAR_BYTES = 64 << 20
MAX_SIDECARS = 200
REMEDY = "give a folder that a pipeline's save_pretrained wrote, a Hugging Face id, or a synthetic preset"
_REFETCH = "copy or fetch it again"


@dataclass(frozen=True, slots=True)
class Contents:
    """The folder `root`, absolute; links may lead into it and into the folders `homes`, which are resolved."""

    root: Path
    homes: tuple[Path, ...]

    def file(self, relative: str) -> Path:
        """The regular file of that name, links resolved; it may be missing.

        Raises:
            CheckpointError: it is something else, or lies elsewhere.
        """
        path = self.root / relative
        try:
            resolved = path.resolve()
            if not any(resolved.is_relative_to(home) for home in self.homes):
                raise CheckpointError(
                    f"{path} leads out of the checkpoint, to {resolved}; put the file itself in its place, or a hard "
                    "link to it"
                )
            if resolved.exists() and not stat.S_ISREG(resolved.stat().st_mode):
                raise CheckpointError(f"{path} is no regular file; put a file in its place")
        except (OSError, RuntimeError) as error:  # a circle of links
            raise CheckpointError(f"{path} cannot be read: {error}; {REMEDY}") from error
        return resolved

    def read_json(self, relative: str) -> dict[str, Any]:
        """The JSON object in a file; CheckpointError when there is none."""
        path = self.file(relative)
        try:
            return read_object_file(path, error=CheckpointError, remedy=_REFETCH)
        except FileNotFoundError:
            raise CheckpointError(f"{self.root} is no diffusers checkpoint: {relative} is missing; {REMEDY}") from None

    def sidecars(self, folders: Collection[str]) -> dict[str, Path]:
        """The files of folders that a bundle copies as they are, by their path below `root`."""
        found: dict[str, Path] = {}
        for folder in folders:
            path = self.root / folder
            for entry in sorted(path.iterdir()) if path.is_dir() else ():
                if entry.is_dir():
                    continue
                name = f"{folder}/{entry.name}"
                if not name.isascii() and not _is_text(name):
                    raise CheckpointError(
                        f"{str(path)!r} holds {entry.name!r}, a name that is no text; rename the file"
                    )
                file = found[name] = self.file(name)
                _check_size(entry, file)
                if len(found) > MAX_SIDECARS:
                    raise CheckpointError(
                        f"{path} and its like hold more than {MAX_SIDECARS} files; remove those that are no part of it"
                    )
        return found

    def licence(self) -> Path | None:
        """The text of the licence, where there is one."""
        names = sorted(one.name for one in self.root.iterdir() if one.stem.lower() in ("license", "licence"))
        files = [name for name in names if not (self.root / name).is_dir()]
        if not files:
            return None
        file = self.file(files[0])
        _check_size(self.root / files[0], file)
        return file


def open_contents(root: Path) -> Contents:
    """The contents of a checkpoint's folder."""
    return Contents(root.absolute(), (root.resolve(), *_repository(root)))


def hub_repository(root: Path) -> Path | None:
    """The folder of a repository in the Hugging Face cache, where `root` is a snapshot of one."""
    repository = root.absolute().parent.parent
    is_snapshot = root.absolute().parent.name == "snapshots" and repository.name.startswith("models--")
    return repository if is_snapshot else None


def _repository(root: Path) -> tuple[Path, ...]:
    found = hub_repository(root)
    return (found.resolve(),) if found else ()


def _check_size(path: Path, file: Path) -> None:
    if not file.exists():
        raise CheckpointError(f"{path} is a link to nothing; {_REFETCH}")
    if file.stat().st_size > MAX_SIDECAR_BYTES:
        raise CheckpointError(
            f"{path} has {file.stat().st_size} bytes, {MAX_SIDECAR_BYTES} are the most for a file beside the weights; "
            "remove it, or fetch the right one"
        )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return name.isprintable()
