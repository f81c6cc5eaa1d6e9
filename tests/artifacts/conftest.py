"""Shared fixtures: a store, a small bundle, and Python in another process."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from fluxkiln.artifacts.store import Store, open_store

REPOSITORY = Path(__file__).parents[2]

BUNDLE_BYTES = {
    "transformer.bmodel": b"net" * 1000,
    "text_encoder/model.onnx": b"clip" * 100,
    "tokenizer/vocab.json": b"{}",
    "LICENSE.md": b"licence text",
}


def _sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _part(name: str, kind: str, file: str, scheme: str = "W4BF16") -> dict:
    spec = {"name": "hidden_states", "shape": [1, 16, 64], "dtype": "bfloat16"}
    return {
        "name": name,
        "kind": kind,
        "scheme": scheme,
        "file": file,
        "net": name,
        "inputs": [spec],
        "outputs": [{**spec, "name": "hidden_states_out"}],
        "digest": _sha(name.encode()),
        "size": 10,
    }


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(tmp_path / "store")


@pytest.fixture
def bundle_bytes() -> dict[str, bytes]:
    return dict(BUNDLE_BYTES)


@pytest.fixture
def manifest_parts() -> dict:
    """What a build hands to `write_bundle`: all keys but `schema_version` and `files`."""
    return {
        "name": "tiny-dev",
        "target": "bm1684x",
        "model": "flux1",
        "variant": "dev",
        "shapes": {"height": 64, "width": 64, "tokens": 32},
        "checkpoint": {"source": "tiny-dev", "fingerprint": _sha(b"weights")},
        "licence": {"spdx": "LicenseRef-FLUX-1-dev-Non-Commercial", "file": "LICENSE.md"},
        "settings": {"vae": "kl", "group_size": 64},
        "parity": {"passed": True, "rows": 12},
        "tools": {"tpu_mlir": "1.30.2", "fluxkiln": "0.1.0"},
        "parts": [
            _part("clip", "clip", "text_encoder/model.onnx", "F16"),
            _part("double.00", "double", "transformer.bmodel"),
            _part("double.01", "double", "transformer.bmodel"),
            _part("tail", "tail", "transformer.bmodel", "BF16"),
        ],
    }


@pytest.fixture
def blobs(store: Store, bundle_bytes: dict[str, bytes]) -> dict:
    return {path: store.add_bytes(data) for path, data in bundle_bytes.items()}


@pytest.fixture
def run_python(start_python):
    """Run a script in another Python to its end and return what it printed."""

    def run(script: str, *args: object) -> str:
        process = start_python(script, *args)
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        return out

    return run
