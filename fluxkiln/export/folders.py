"""Folders that appear whole or not at all: written beside their place, under a lock, and renamed at the end."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fluxkiln.errors import CheckpointError, ResourceError, UsageError
from fluxkiln.files import partial_directory, remove_unheld
from fluxkiln.patches.model import Preset

# Leave this much of the disk to others.
_SPARE_BYTES = 64 << 20


def check_destination(destination: Path) -> None:
    """Raise UsageError when `destination` is something else than an empty folder or nothing."""
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise UsageError(f"{destination} is not empty; give a folder that does not exist yet, or remove it first")


@contextmanager
def whole_or_nothing(destination: Path, nbytes: int, remedy: str) -> Iterator[Path]:
    """A locked folder beside `destination` that takes its place when the block ends, and vanishes when it raises.

    What killed processes left is removed first.

    Args:
        nbytes: what will be written to it.
        remedy: what to do besides freeing space where the disk has less.

    Raises:
        ResourceError: not enough room on the disk, before or while it is written.
        UsageError: `destination` was filled meanwhile.
    """
    parent, label = destination.absolute().parent, f".{destination.name}"
    parent.mkdir(parents=True, exist_ok=True)
    remove_unheld(parent, f"{label}.")
    free = shutil.disk_usage(parent).free
    if free < nbytes + _SPARE_BYTES:
        raise ResourceError(
            f"{parent} has {free / 1e9:.1f} GB free, {destination.name} takes {nbytes / 1e9:.1f} GB; free some space, "
            f"or {remedy}"
        )
    try:
        with partial_directory(parent, label) as partial:
            yield partial
            try:
                os.rename(partial, destination)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise UsageError(
                    f"{destination} was filled by another process meanwhile; use it, or remove it first"
                ) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise ResourceError(
            f"the disk of {parent} is full after part of {nbytes / 1e9:.1f} GB; free some space"
        ) from error


def trained_folder(preset: Preset) -> Path:
    """The folder of a trained preset's checkpoint, which ships with its model.

    Raises:
        CheckpointError: it is not there.
    """
    if preset.trained is None or not (preset.trained / "model_index.json").is_file():
        raise CheckpointError(
            f"the trained weights of {preset.name} do not come with this version; make them with "
            f"`fluxkiln train recipe {preset.name} DIR`, and give DIR as the model"
        )
    return preset.trained
