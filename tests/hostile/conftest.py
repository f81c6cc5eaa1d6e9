"""Checkpoints to damage: hard links to one pristine folder, so that a case costs a few milliseconds."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def pristine(tiny_checkpoint) -> Path:
    """tiny-dev, not to be changed."""
    root: Path = tiny_checkpoint().root
    return root


@pytest.fixture
def folder(pristine, tmp_path) -> Path:
    """A copy whose files may be replaced, and not written to."""
    return copy(pristine, tmp_path / "tiny-dev")


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target, copy_function=os.link))


@pytest.fixture
def replace_file() -> Callable[[Path, bytes], None]:
    def replace(path: Path, data: bytes) -> None:
        path.unlink(missing_ok=True)
        path.write_bytes(data)

    return replace
