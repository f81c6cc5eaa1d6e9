"""Opening a bundle: digests, memory of what was checked, executors by target; and whole images on the real ones."""

from __future__ import annotations

import os
import shutil
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.build.make import build
from fluxkiln.compile.bundle import HOST_CONSTANTS
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchain import open_executor, toolchain_of
from fluxkiln.documents import DOCUMENT
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.files import digest_file
from fluxkiln.generate.painter import Painter, Request, paint
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes
from tests.eager import make_bundle
from tests.hostile.forged import forge


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
    assert "onnx/clip.onnx" in first.jobs
    assert open_bundle(folder, again).digest == bundle.digest
    assert again.jobs == []
    # touched, or given a second name: read again, and that alone
    for touch in (os.utime, lambda file: os.link(file, folder.parent / "second name")):
        touch(folder / "onnx/clip.onnx")
        third = Told()
        open_bundle(folder, third)
        assert third.jobs == [("check", 1), "onnx/clip.onnx"]
    # moved: these are the same files
    moved = folder.rename(folder.parent / "moved")
    assert open_bundle(moved, again).digest == bundle.digest
    assert again.jobs == []
    whole = Told()
    open_bundle(moved, whole, again=True)
    assert len(whole.jobs) == 1 + len(bundle.manifest.files)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # a bundle's files may be links to the store's
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: flip(f / "onnx/tail.onnx"), ("onnx/tail.onnx: sha256:", "the manifest says sha256:")),
        (lambda f: flip(f / "tokenizer/vocab.json"), ("vocab.json: sha256:",)),
        (lambda f: (f / "host/constants.safetensors").write_bytes(b"short"), ("constants.safetensors: 5 bytes",)),
        (lambda f: (f / "configs.json").unlink(), ("configs.json: missing",)),
        (lambda f: (f / "tokenizer/added_tokens.json").write_text("{}"), ("added_tokens.json: not named by",)),
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


def test_constants_of_a_large_model_are_read_whole(folder, monkeypatch):
    """At 512 tokens they have more than any document may have."""
    constants = folder / HOST_CONSTANTS
    arrays = {**load_file(constants), "more": np.arange(DOCUMENT.nbytes // 4 + 1000, dtype=np.float32)}
    save_file(arrays, constants)
    digest, size = digest_file(constants)

    def change(document):
        entry = next(file for file in document["files"] if file["path"] == HOST_CONSTANTS)
        entry.update(sha256=digest.removeprefix("sha256:"), size=size)

    bundle = open_bundle(forge(folder, change))
    assert set(bundle.constants) == set(arrays)
    np.testing.assert_array_equal(bundle.constants["more"], arrays["more"])
    nbytes = sum(array.nbytes for array in arrays.values())
    monkeypatch.setattr("fluxkiln.compile.bundle.MOST_CONSTANTS", nbytes - 1)
    with pytest.raises(IntegrityError, match=f"bytes of numbers, {nbytes - 1} are the most"):
        _ = bundle.constants


def test_a_link_is_no_file_of_a_bundle(folder, tmp_path):
    shutil.move(folder / "onnx/tail.onnx", tmp_path / "tail.onnx")
    (folder / "onnx/tail.onnx").symlink_to(tmp_path / "tail.onnx")
    with pytest.raises(IntegrityError, match=r"tail.onnx: not a regular file"):
        open_bundle(folder)


def test_a_cache_that_cannot_be_written_is_done_without(folder, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert open_bundle(folder).parts[0].name == "clip"


def test_bundles_that_cannot_be_run(folder, tmp_path):
    with pytest.raises(IntegrityError, match="is no bundle"):
        open_bundle(tmp_path)
    with pytest.raises(UsageError, match="is no bundle"):
        open_bundle(tmp_path / "missing")

    def leave_out(document):
        document["settings"]["components"].remove("vae")
        document["parts"] = [part for part in document["parts"] if part["kind"] != "vae_decoder"]

    forge(folder, leave_out)
    assert "vae_decoder" not in {part.name for part in open_bundle(folder).parts}
    with pytest.raises(UsageError, match="has no vae"):
        open_bundle(folder, whole=True)


def set_scheme(document):
    for part in document["parts"][:3]:
        part["scheme"] = "W4BF16-g64-mse"


def test_executors_by_target(folder):
    bundle = open_bundle(folder)
    assert open_executor(bundle).name == "ort"
    with pytest.raises(UsageError, match=r"executor sail: a bundle for cpu is run by ort$"):
        open_executor(bundle, "sail")
    with pytest.raises(
        UsageError, match=r"executor cuda.*are mlx, neuron, replicas, ort, openvino, cmodel, sail in all"
    ):
        open_executor(bundle, "cuda")
    board = replace(bundle, target=find_target("bm1684x"))
    assert toolchain_of(board.target).executors == ("cmodel", "sail")


def test_fast_is_for_packed_weights_on_ort(folder):
    with pytest.raises(UsageError, match=r"--fast: .* this is ort with BF16; leave it out"):
        open_executor(open_bundle(folder), fast=True)
    forge(folder, set_scheme)
    bundle = open_bundle(folder)
    assert [open_executor(bundle, fast=fast).name for fast in (False, True)] == ["ort", "ort, fast"]
    board = replace(bundle, target=find_target("bm1684x"))
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
        target=target, model="tiny-dev", size=((32, 32),), tokens=(16,), verify=False, build_dir=tmp_path / "build",
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
