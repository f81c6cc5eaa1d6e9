"""Moulds that travel: from a store with the compiler to one without, and what is refused on the way."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import replace

import pytest

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Store
from fluxkiln.build.mould_archive import MOULDS_FILE, export_moulds, import_moulds, list_moulds
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.jobs import make_files
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.progress import Laps, Silent
from fluxkiln.settings import Settings
from tests.builds import altered

pytestmark = pytest.mark.tpu_mlir
KINDS = ("double", "single")


def only_blocks(small_build):
    return altered(small_build, parts=tuple(part for part in small_build.parts if part.kind in KINDS))


@pytest.fixture(scope="module")
def filled(small_build, tmp_path_factory):
    """A build of blocks in whose store all of them are, and the file of their moulds."""
    blocks = only_blocks(small_build())
    root = tmp_path_factory.mktemp("travelling")
    shutil.copytree(blocks.cache.store.root, root / "store")
    blocks = altered(replace(blocks, cache=ActionCache(Store(root / "store"))), folder=root / "build")
    made = make_files(*blocks, Settings("bm1684x"), Silent(), Laps())
    export_moulds(blocks.cache.store, root / "moulds.tar")
    return blocks, made, root / "moulds.tar"


def test_imported_moulds_need_no_compiler(filled, tmp_path, monkeypatch):
    blocks, before, tar = filled
    monkeypatch.setattr(environment, "installed", lambda: None)
    elsewhere = altered(replace(blocks, cache=ActionCache(Store(tmp_path / "store"))), folder=tmp_path / "build")
    with pytest.raises(ToolchainError, match=r"is not in the store, and TPU-MLIR, which makes it, is not installed in"):
        make_files(*elsewhere, Settings("bm1684x"), Silent(), Laps())
    taken = import_moulds(elsewhere.cache.store, tar)
    assert {"double_00 W4BF16", "single_00 W4BF16"} <= {entry.what for entry in taken}
    made = make_files(*elsewhere, Settings("bm1684x"), Silent(), Laps())
    assert [file.blob for file in made.files] == [file.blob for file in before.files]
    assert [binary.digest for binary in made.binaries] == [binary.digest for binary in before.binaries]
    counts = elsewhere.cache.counts
    assert counts["mould"] == [len(KINDS), 0]
    assert counts["combine"] == [1, 0]
    assert "compile" not in counts


def test_a_list_says_what_can_be_cast(filled, small_build):
    blocks, *_ = filled
    make_mould(*blocks, make_template(*blocks, "double", "onnx17"))
    moulds = list_moulds(blocks.cache.store)
    # the other form of the block takes its modulation as an input, and is called the same
    double = next(entry for entry in moulds if entry.what == "double_00 W4BF16" and "temb" in entry.inputs)
    assert (double.chip, double.scheme, double.why) == ("bm1684x", "W4BF16", "")
    assert double.weight_bytes > 1_000_000
    assert json.loads(json.dumps(double.to_json()))["castable"] is True


def rewritten(tar, target, change):
    """The tar with `change` applied to its list of (name, data); None leaves a member out."""
    with tarfile.open(tar) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive]
    with tarfile.open(target, "w") as archive:
        for name, data in change(members):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return target


def flip(members):
    name, data = members[-1]
    return [*members[:-1], (name, data[:-1] + bytes([data[-1] ^ 1]))]


def forge(members):
    """A record whose settings were changed under its old key."""
    index = json.loads(members[0][1])
    index["records"][0]["tools"] = {"torch": "0"}
    return [(MOULDS_FILE, json.dumps(index).encode()), *members[1:]]


SPOILT = {
    "a flipped bit": (flip, IntegrityError, "a blob has sha256:"),
    "a blob is missing": (lambda members: members[:-1], IntegrityError, "ends before sha256:"),
    "one too many": (
        lambda m: [*m, ("blobs/sha256/" + "0" * 64, b"")],
        IntegrityError,
        "holds 'blobs/sha256/0+', which its",
    ),
    "a path that leads out": (lambda m: [*m, ("../../evil", b"x")], IntegrityError, r"holds '\.\./\.\./evil'"),
    "no index": (lambda members: members[1:], UsageError, "does not begin with moulds.json"),
    "another format": (lambda m: [(MOULDS_FILE, b'{"format": "x"}'), *m[1:]], UsageError, "is not of the format"),
    "a forged record": (forge, IntegrityError, "its ingredients have"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_spoilt_files_are_refused_and_leave_nothing(filled, tmp_path, what):
    change, error, sentence = SPOILT[what]
    spoilt = rewritten(filled[2], tmp_path / "spoilt.tar", change)
    store = Store(tmp_path / "store")
    with pytest.raises(error, match=sentence):
        import_moulds(store, spoilt)
    assert list_moulds(store) == []
    assert not (tmp_path / "evil").exists()
    # the control: nothing but the change was wrong
    assert import_moulds(store, rewritten(filled[2], tmp_path / "same.tar", lambda members: members))


def test_what_is_no_tar_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"not a tar" * 100)
    with pytest.raises(UsageError, match="is no file of moulds"):
        import_moulds(Store(tmp_path / "store"), tmp_path / "x")
    with pytest.raises(UsageError, match="has no moulds for bm1688; fluxkiln mould build makes some"):
        export_moulds(Store(tmp_path / "store"), tmp_path / "y", "bm1688")
    assert not (tmp_path / "y").exists()
