"""Exports of graphs with weights: nothing copied, nothing half-written, shards out of reach in every way."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from fluxkiln.compile.onnx import linked as linking
from fluxkiln.compile.onnx.external_data import external_range
from fluxkiln.compile.onnx.linked import export_graphs
from fluxkiln.compile.onnx.session import open_session
from fluxkiln.errors import CheckpointError, ResourceError, UsageError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.progress import Silent
from fluxkiln.types import Shapes, find_part

SHAPES = Shapes(height=32, width=32, tokens=16)
SHARED_MEMORY = Path("/dev/shm")


@pytest.fixture
def root(tiny_checkpoint, tmp_path):
    """A checkpoint of one's own."""
    return shutil.copytree(tiny_checkpoint().root, tmp_path / "model")


@pytest.fixture
def export(root):
    """Export the tail, which is traced fastest."""

    def run(destination, name="tail", progress=None, model=root, **options):
        checkpoint = open_checkpoint(model)
        part = find_part(list_parts(checkpoint.configs), name)
        return export_graphs(checkpoint, {f"{name}.onnx": [part]}, SHAPES, destination, progress or Silent(), **options)

    return run


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def check_runs(graph):
    session = open_session(graph, threads=1)
    feeds = {value.name: np.ones(value.shape, np.float32) for value in session.get_inputs()}
    (output,) = session.run(None, feeds)
    assert np.isfinite(output).all()


def test_new_folder(export, root, tmp_path):
    before = files_below(root)
    made = export(tmp_path / "out")
    [shard] = made.weights
    assert made.weights == {shard: "hard link"} or made.weights == {shard: "clone"}
    assert files_below(tmp_path / "out") == {"tail.onnx", shard}
    if made.weights[shard] == "hard link":
        assert os.path.samefile(tmp_path / "out" / shard, root / shard.removeprefix("weights/"))
    assert made.weight_bytes_written == 0
    assert files_below(root) == before
    [graph] = made.graphs
    assert (graph.tensors, graph.copied, graph.parts) == (4, {}, ("tail",))
    assert graph.size == (tmp_path / "out" / "tail.onnx").stat().st_size
    check_runs(tmp_path / "out" / "tail.onnx")
    with pytest.raises(UsageError, match="is not empty"):
        export(tmp_path / "out")


@pytest.mark.parametrize("where", ["model", "."])
def test_folder_that_has_the_shards_gets_the_graph_only(where, export, root, tmp_path):
    before = files_below(tmp_path)
    folder = tmp_path / where
    made = export(folder)
    assert set(made.weights.values()) == {"in place"}
    assert files_below(tmp_path) - before == {str((folder / "tail.onnx").relative_to(tmp_path))}
    check_runs(folder / "tail.onnx")
    onnx.load(folder / "tail.onnx")  # shards of one name: the onnx package reads them too
    with pytest.raises(UsageError, match="is there already"):
        export(folder)
    assert (folder / "tail.onnx").exists()


def test_hub_cache(export, root, tmp_path):
    """Snapshots are links to blobs: the graph names the blobs."""
    cache = tmp_path / "models--org--name"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in root.rglob("*") if path.is_file())):
        blob = cache / "blobs" / f"{number:064x}"
        shutil.move(file, blob)
        link = snapshot / file.relative_to(root)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    made = export(tmp_path / "out", model=snapshot)
    assert [Path(name).parent.name for name in made.weights] == ["blobs"]
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    check_runs(tmp_path / "out" / "tail.onnx")
    export(cache, model=snapshot)
    tensors = onnx.load(cache / "tail.onnx", load_external_data=False).graph.initializer
    assert {external_range(tensor)[0].split("/")[0] for tensor in tensors if tensor.external_data} == {"blobs"}
    check_runs(cache / "tail.onnx")


@pytest.fixture
def elsewhere(root):
    """A new folder on another file system."""
    if not SHARED_MEMORY.is_dir() or SHARED_MEMORY.stat().st_dev == root.stat().st_dev:
        pytest.skip("no second file system: /dev/shm is none")
    folder = SHARED_MEMORY / f"fluxkiln-test-{os.getpid()}"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def test_other_file_system(export, elsewhere, root, monkeypatch):
    def trace(*_):
        raise AssertionError("nothing may be traced for an export that cannot work")

    with monkeypatch.context() as patch:
        patch.setattr("fluxkiln.export.trace.export_template", trace)
        with pytest.raises(ResourceError, match=r"neither cloned nor hard-linked.*cross-device.*or --copy"):
            export(elsewhere)
    assert not elsewhere.exists()
    made = export(elsewhere, copy=True)
    size = sum(ref.nbytes for name, ref in open_checkpoint(root).tensors["transformer"].items() if name in TAIL)
    assert made.weight_bytes_written == size
    assert set(made.weights.values()) == {"copy"}
    check_runs(elsewhere / "tail.onnx")
    equal = [path.read_bytes() for path in (elsewhere / "weights").iterdir()]
    assert size <= sum(map(len, equal)) < size + 1000


TAIL = {f"{name}.{kind}" for name in ("norm_out.linear", "proj_out") for kind in ("weight", "bias")}


def test_system_that_allows_no_links(export, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(linking, "clone", lambda *_: False)
    with pytest.raises(ResourceError, match=r"\(Operation not permitted\).*give a folder"):
        export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert set(export(tmp_path / "out", copy=True).weights.values()) == {"copy"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(ResourceError, match="GB free, the weights take"):
        export(tmp_path / "second", copy=True)
    assert not (tmp_path / "second").exists()


def test_clones_are_preferred(export, tmp_path, monkeypatch):
    def clone(source, target):
        target.write(source.read())
        return True

    monkeypatch.setattr(linking, "clone", clone)
    made = export(tmp_path / "out")
    assert set(made.weights.values()) == {"clone"}
    assert made.weight_bytes_written == 0
    check_runs(tmp_path / "out" / "tail.onnx")


class AtTemplate(Silent):
    """Does something to the checkpoint when the first template is there."""

    def __init__(self, work):
        self.work = work

    def done(self, stage, what, how):
        if stage == "template":
            self.work()


@pytest.mark.parametrize("folder", ["out", "model"])
def test_shard_that_goes_or_changes(folder, export, root, tmp_path):
    shards = sorted((root / "transformer").glob("*.safetensors"))
    kept = [shutil.copy2(shard, tmp_path) for shard in shards]

    def touch():
        for shard in shards:
            os.utime(shard, ns=(1, 1))

    def replace():
        for shard, copy in zip(shards, kept, strict=True):
            shutil.copy2(copy, shard.with_suffix(".new"))
            shard.with_suffix(".new").rename(shard)

    def remove():
        for shard in shards:
            shard.unlink()

    before = files_below(tmp_path)
    for work, sentence in ((touch, "was written to"), (replace, "was replaced"), (remove, "has gone|No such file")):
        with pytest.raises((CheckpointError, FileNotFoundError), match=sentence):
            export(tmp_path / folder, progress=AtTemplate(work))
        assert not files_below(tmp_path) - before, "nothing is left of what was begun"


def test_full_disk(export, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(linking, "write_durably", full)
    with pytest.raises(ResourceError, match="No space left on device"):
        export(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_formats(export, tmp_path):
    export(tmp_path / "out", graph_format="onnx17")
    check_runs(tmp_path / "out" / "tail.onnx")
    with pytest.raises(UsageError, match="onnx23 or onnx17, not as pt2"):
        export(tmp_path / "pt2", graph_format="pt2")
