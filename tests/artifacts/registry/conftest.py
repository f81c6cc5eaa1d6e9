"""A finished build in a folder, and a bundle's OCI manifest to change."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.store import Store
from fluxkiln.build import publish
from fluxkiln.build.publish import Published, publish_bundle

DEV_LICENCE = (
    "FLUX.1 [dev] Non-Commercial License v1.1.1\n" + "Stand-in for the terms, of their length. " * 60
).encode()


@pytest.fixture(autouse=True)
def own_credentials(tmp_path, monkeypatch, request) -> Path:
    """No test reads the credentials of whoever runs it."""
    folder = tmp_path / "docker"
    folder.mkdir()
    monkeypatch.setenv("DOCKER_CONFIG", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)
    if request.node.get_closest_marker("hub") is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    return folder / "config.json"


@pytest.fixture(autouse=True)
def small_bundles(monkeypatch):
    """The bundles here are four small files: they travel, and no toolchain knows them. Their manifests and bytes are
    checked; what else the opener looks at is tested where there are bundles of real parts."""
    monkeypatch.setattr(publish, "open_bundle", lambda folder, progress=None: read_bundle(folder, progress=progress))


@pytest.fixture
def build(tmp_path: Path, store: Store, manifest_parts: dict, bundle_bytes: dict) -> Callable[..., Path]:
    """Make a build's folder: `bundle` and `report.json`. Keywords replace keys of the manifest.

    schnell unless said otherwise, since nobody has to accept anything for it.
    """

    def make(name: str = "build", files: dict[str, bytes] | None = None, **manifest: Any) -> Path:
        complete = {
            **manifest_parts,
            "variant": "schnell",
            "licence": {"spdx": "Apache-2.0", "file": "LICENSE.md"},
            **manifest,
        }
        blobs = {path: store.add_bytes(data) for path, data in {**bundle_bytes, **(files or {})}.items()}
        folder = tmp_path / name
        write_bundle(folder / "bundle", blobs, complete, store, build={"machine": "this one"})
        report = {"verdict": {}, "provenance": {"checkpoint": complete["checkpoint"]["fingerprint"]}}
        (folder / "report.json").write_text(json.dumps(report))
        return folder

    return make


@pytest.fixture
def dev_build(build) -> Callable[..., Path]:
    """A build of FLUX.1-dev, with its licence."""

    def make(text: bytes = DEV_LICENCE, **manifest: Any) -> Path:
        terms = {"spdx": "LicenseRef-FLUX-1-dev-Non-Commercial", "file": "LICENSE.md"}
        return build(files={"LICENSE.md": text}, **{"variant": "dev", "licence": terms, **manifest})

    return make


@pytest.fixture
def published(build, tmp_path) -> Published:
    """A bundle under the tag v1 of the layout `layout`."""
    return publish_bundle(build(), f"oci-layout:{tmp_path / 'layout'}:v1")


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """Path -> bytes of every file below a folder."""

    def read(folder: Path) -> dict[str, bytes]:
        return {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }

    return read
