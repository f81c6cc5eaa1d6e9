"""The command line run in this process, and a small bundle with its report."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.store import Store, open_store
from fluxkiln.build import publish
from fluxkiln.cli.main import main
from fluxkiln.compile import opener
from fluxkiln.verify.ladder import Ladder
from fluxkiln.verify.report.document import build_report, write_report
from tests.ran import Run


@pytest.fixture
def fluxkiln(capsys, monkeypatch, tmp_path):
    """Run a command in an empty folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("FLUXKILN_STORE", raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def run(*arguments: object) -> Run:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


def _part(name: str, kind: str, scheme: str) -> dict:
    spec = {"name": "hidden_states", "shape": [1, 16, 64], "dtype": "bfloat16"}
    digest = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    return {
        "name": name, "kind": kind, "scheme": scheme, "file": "transformer.bmodel", "net": name.replace(".", "_"),
        "inputs": [spec], "outputs": [spec], "digest": digest, "size": 1500,
    }  # fmt: skip


@pytest.fixture
def store(tmp_path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def built(tmp_path, store, monkeypatch) -> Path:
    """A build's folder: `bundle`, `report.json` and `report.html`.

    Its parts are none that a toolchain knows: the opener looks at manifest and files alone.
    """
    for module in (opener, publish):
        monkeypatch.setattr(module, "open_bundle", lambda folder, progress=None, again=False: read_bundle(folder))
    folder = tmp_path / "build" / "bm1684x" / "tiny-dev"
    files = {
        "transformer.bmodel": store.add_bytes(b"net" * 1000),
        "tokenizer/vocab.json": store.add_bytes(b"{}"),
        "LICENSE": store.add_bytes(b"licence text"),
    }
    manifest = {
        "name": "tiny-dev",
        "target": "bm1684x",
        "model": "flux1",
        "variant": "dev",
        "shapes": {"height": 64, "width": 128, "tokens": 32},
        "checkpoint": {"source": "tiny-dev", "fingerprint": "sha256:" + "ab" * 32},
        "licence": {"spdx": "Apache-2.0", "file": "LICENSE"},
        "settings": {"vae": "kl"},
        "parity": {"verified": True, "passed": True, "rows": 12, "rungs": ["patched"]},
        "tools": {"tpu_mlir": "1.30.2"},
        "parts": [
            _part("double.00", "double", "W4BF16"),
            _part("double.01", "double", "W4BF16"),
            _part("tail", "tail", "BF16"),
        ],
    }
    write_bundle(folder / "bundle", files, manifest, store)
    write_report(folder, build_report(Ladder(), {"title": "tiny-dev", "target": "bm1684x"}))
    return folder
