"""`stub-neuronx-cc` in the Neuron compiler's place: it notes how it was called, and compiles nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

STUB = Path(__file__).parent / "compile" / "toolchains" / "neuron" / "stub-neuronx-cc"
STUB_VERSION = "2.26.6360.0+stub"


def install_stub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put the stub first on PATH, as `folder`/bin/neuronx-cc; the folder that it notes its calls in."""
    calls, path = folder / "calls", folder / "bin"
    calls.mkdir()
    path.mkdir()
    shutil.copy(STUB, path / "neuronx-cc")
    monkeypatch.setenv("PATH", f"{path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STUB_CALLS", str(calls))
    return calls
