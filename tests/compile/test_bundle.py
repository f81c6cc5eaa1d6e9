"""Opening a bundle: digests, memory of what was checked, executors by target; and whole images on the real ones."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest

from fluxkiln.artifacts.bundle import read_manifest
from fluxkiln.build.make import build
from fluxkiln.compile.bundle import open_bundle
from fluxkiln.compile.toolchain import open_executor, toolchain_of
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.generate.painter import Painter, Request, paint
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes
from tests.eager import make_bundle


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_checkpoint, tmp_path):
    return make_bundle(tiny_checkpoint(), tmp_path / "made")


class Told:
    def __init__(self):
        self.jobs = []

    def stage(self, name, total):
        self.jobs.append((name, total))

    def done(self, stage, what, how):
        self.jobs.append(what)

    def note(self, text):
        pass


def test_files_are_checked_once(folder):
    first, again = Told(), Told()
    bundle = open_bundle(folder, first)
    assert bundle.digest.startswith("sha256:")
    assert ("check", len(bundle.manifest.files)) in first.jobs
    assert "parts.bin" in first.jobs
    assert open_bundle(folder, again).digest == bundle.digest
    assert again.jobs == []
    # touched: read again, and that alone
    os.utime(folder / "parts.bin")
    third = Told()
    open_bundle(folder, third)
    assert third.jobs == [("check", 1), "parts.bin"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a bundle's files may be links to the store's
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flip(f / "parts.bin"), ("parts.bin", "has the digest sha256:", "the manifest says sha256:")),
        (lambda f: flip(f / "tokenizer/vocab.json"), ("vocab.json", "has the digest")),
        (lambda f: (f / "host/constants.safetensors").write_bytes(b"short"), ("constants", "has 5 bytes")),
        (lambda f: (f / "configs.json").unlink(), ("configs.json", "No such file")),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_a_damaged_file_is_named(folder, damage, words, known):
    if known:
        open_bundle(folder)
    damage(folder)
    with pytest.raises(IntegrityError) as caught:
        open_bundle(folder)
    assert caught.value.exit_code == 4
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_link_is_no_file_of_a_bundle(folder, tmp_path):
    shutil.move(folder / "parts.bin", tmp_path / "parts.bin")
    (folder / "parts.bin").symlink_to(tmp_path / "parts.bin")
    with pytest.raises(IntegrityError, match="symbolic link"):
        open_bundle(folder)


def test_a_cache_that_cannot_be_written_is_done_without(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_bundle(folder).parts[0].name == "clip"


def test_bundles_that_cannot_be_run(folder, tmp_path):
    with pytest.raises(UsageError, match="is no bundle"):
        open_bundle(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["parts"] = [part for part in manifest["parts"] if part["name"] != "vae_decoder"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match="has no vae"):
        open_bundle(folder)


@pytest.mark.parametrize(
    ("key", "old", "new", "clue"),
    [
        ("kind", "double_modulated", "triple", "part double.00 is of the kind 'triple'; FLUX.1 has the kinds clip,"),
        ("variant", "dev", "pro", "the model is of the variant 'pro'; FLUX.1 has the variants dev, schnell: build or"),
    ],
)
def test_what_the_model_has_not_is_refused(folder, key, old, new, clue):
    path = folder / "manifest.json"
    assert f'"{key}": "{old}"' in path.read_text()
    path.write_text(path.read_text().replace(f'"{key}": "{old}"', f'"{key}": "{new}"'))
    with pytest.raises(IntegrityError) as caught:
        open_bundle(folder)
    assert str(caught.value).startswith(f"{path}: {clue}")


def retarget(folder: Path, target: str) -> Path:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"target": "cpu"', f'"target": "{target}"'))
    return folder


def test_executors_by_target(folder):
    bundle = open_bundle(folder)
    assert open_executor(bundle).name == "ort"
    with pytest.raises(UsageError, match=r"executor sail: a bundle for cpu is run by ort$"):
        open_executor(bundle, "sail")
    with pytest.raises(UsageError, match=r"executor cuda.*there are neuron, replicas, ort, cmodel, sail in all"):
        open_executor(bundle, "cuda")
    board = open_bundle(retarget(folder, "bm1684x"))
    assert toolchain_of(board.target).executors == ("cmodel", "sail")


def test_fast_is_for_packed_weights_on_ort(folder):
    with pytest.raises(UsageError, match=r"--fast: .* this is ort with BF16; leave it out"):
        open_executor(open_bundle(folder), fast=True)
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"scheme": "BF16"', '"scheme": "W4BF16-g64-mse"', 3))
    bundle = open_bundle(folder)
    assert [open_executor(bundle, fast=fast).name for fast in (False, True)] == ["ort", "ort, fast"]
    board = open_bundle(retarget(folder, "bm1684x"))
    with pytest.raises(UsageError, match=r"this is cmodel with W4BF16-g64-mse"):
        open_executor(board, fast=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "executor"),
    [
        ("cpu", "ort"),
        pytest.param("trn1", "replicas", marks=pytest.mark.thorough),
        pytest.param("bm1684x", "cmodel", marks=[pytest.mark.tpu_mlir, pytest.mark.thorough]),
    ],
)
def test_a_build_paints_the_reference(target, executor, tiny_recording, tmp_path):
    """The bundle as a runtime finds it: without checkpoint or store."""
    if target == "trn1":
        pytest.importorskip("jax", reason="the extra trn1 is not installed")
    shapes = Shapes(32, 32, 16)
    recording = tiny_recording("tiny-dev", "kl", shapes)
    settings = Settings(
        target=target, model="tiny-dev", size=(32, 32), tokens=16, verify=False, build_dir=tmp_path / "build",
        modulation="inline" if target == "cpu" else "hoisted",
    )  # fmt: skip
    # no neuronx-cc: all the rest is there
    with suppress(ToolchainError) if target == "trn1" else nullcontext():
        build(settings)
    (found,) = (tmp_path / "build" / target).iterdir()
    moved = tmp_path / "bundle"
    shutil.move(found / "bundle", moved)
    shutil.move(tmp_path / "build", tmp_path / "gone")
    assert read_manifest(moved).shapes == shapes
    bundle = open_bundle(moved)
    with Painter(bundle, open_executor(bundle)) as painter:
        assert painter.executor.name == executor
        (picture,) = paint(painter, [Request(recording.prompt, recording.seed, steps=recording.steps)])
    error = np.linalg.norm(picture.latents - recording.latents) / np.linalg.norm(recording.latents)
    assert error < {"ort": 1e-5, "replicas": 0.02, "cmodel": 0.1}[executor]
    assert np.abs(picture.image.astype(int) - (recording.image * 255).round()).mean() < {"ort": 0.01}.get(executor, 8)
