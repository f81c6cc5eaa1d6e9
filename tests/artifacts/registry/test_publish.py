"""From a build's folder to a layout and back: what is published, what is refused, what is left after a failure."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.modelpack import Layer
from fluxkiln.artifacts.registry import distribution
from fluxkiln.artifacts.registry.distribution import quarantine_of
from fluxkiln.artifacts.registry.place import LayoutPlace
from fluxkiln.artifacts.registry.transfer import Arrival
from fluxkiln.artifacts.store import FOLDERS, Store
from fluxkiln.build.publish import (
    Terms,
    inspect_reference,
    list_tags,
    publish_bundle,
    pull_bundle,
    read_described,
    tag_reference,
)
from fluxkiln.errors import IntegrityError, ParityError, ResourceError, UsageError

FAILED = {"verified": True, "passed": False, "failure": "double.01 missed its gate", "rows": 12, "failed_rows": 1}


@pytest.fixture
def layout(tmp_path) -> str:
    return f"oci-layout:{tmp_path / 'layout'}"


def test_what_was_published_comes_back(build, layout, tmp_path, tree):
    folder = build()
    done = publish_bundle(folder, f"{layout}:v1")
    pulled = pull_bundle(f"{layout}:v1", tmp_path / "out")
    bundle = tree(folder / "bundle")
    del bundle["build.json"]
    assert tree(tmp_path / "out" / "bundle") == bundle
    assert read_bundle(tmp_path / "out" / "bundle").manifest == pulled.found.manifest
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md", "bundle", "provenance.json", "pulled.json", "report.json",
    ]  # fmt: skip
    assert (tmp_path / "out" / "report.json").read_bytes() == (folder / "report.json").read_bytes()
    record = json.loads((tmp_path / "out" / "pulled.json").read_bytes())
    assert record["digest"] == done.document.digest
    assert (record["parity"], record["signature"]) == ("passed", "unsigned")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out")] == []


def test_what_was_pulled_can_be_published_again_as_the_same(build, layout, tmp_path):
    done = publish_bundle(build(), f"{layout}:v1")
    pull_bundle(f"{layout}:v1", tmp_path / "out")
    again = publish_bundle(tmp_path / "out", f"oci-layout:{tmp_path / 'other'}:v1")
    assert again.document.digest == done.document.digest


def test_pull_by_digest_and_from_the_store_of_builds(build, layout, tmp_path, store):
    from fluxkiln.artifacts.modelpack import store_bundle

    done = publish_bundle(build(), f"{layout}:v1")
    by_digest = pull_bundle(f"{layout}@{done.document.digest}", tmp_path / "one")
    assert by_digest.found.document == done.document
    # The store has no card and no provenance, and is a layout all the same.
    store_bundle(store, build("again") / "bundle", "tiny-dev:cpu")
    pull_bundle(f"oci-layout:{store.root}:tiny-dev:cpu", tmp_path / "two")
    assert (tmp_path / "two" / "bundle" / "manifest.json").is_file()


def test_shared_blobs_are_sent_once(build, layout):
    publish_bundle(build("one"), f"{layout}:one")
    again = publish_bundle(build("one"), f"{layout}:one")
    assert (again.pushed.files, again.pushed.sent) == ((), 0)
    other = publish_bundle(build("two", files={"transformer.bmodel": b"other" * 999}), f"{layout}:two")
    assert set(other.pushed.files) == {"transformer.bmodel", "manifest.json", "provenance.json", "README.md"}
    same = {f"copies/{i}.bin": b"same" * 5000 for i in range(4)}
    done = publish_bundle(build("three", files=same), f"{layout}:three")
    assert [path for path in done.pushed.files if path.startswith("copies")] == ["copies/0.bin"]


def test_equal_files_come_back_as_files_of_their_own(build, layout, tmp_path):
    publish_bundle(build(files={f"copies/{i}.bin": b"same" * 5000 for i in range(3)}), f"{layout}:v1")
    pull_bundle(f"{layout}:v1", tmp_path / "out")
    copies = sorted((tmp_path / "out" / "bundle" / "copies").iterdir())
    assert len({os.stat(path).st_ino for path in copies}) == 3
    read_bundle(tmp_path / "out" / "bundle")


def test_tags(build, layout):
    done = publish_bundle(build(), f"{layout}:v1")
    target, document = tag_reference(f"{layout}:v1", "latest")
    assert str(target) == f"{layout}:latest"
    assert document == done.document
    _, tags = list_tags(layout)
    assert {name: found.digest for name, found in tags.items()} == dict.fromkeys(("v1", "latest"), document.digest)
    with pytest.raises(UsageError, match="not legal"):
        tag_reference(f"{layout}:v1", "..")
    with pytest.raises(UsageError, match=r"no tag 'v9'.* has latest, v1"):
        inspect_reference(f"{layout}:v9")


def test_parity_that_failed_is_refused_and_can_be_published_marked(build, layout):
    folder = build(parity=FAILED)
    with pytest.raises(ParityError, match=r"double\.01 missed its gate.*--allow-failed-parity") as found:
        publish_bundle(folder, f"{layout}:v1")
    assert found.value.exit_code == 3
    assert not Path(layout.removeprefix("oci-layout:")).exists()
    publish_bundle(folder, f"{layout}:v1", Terms(allow_failed_parity=True))
    found = inspect_reference(f"{layout}:v1")
    assert found.document.annotations["org.fluxkiln.parity"] == "failed"
    assert found.manifest.parity["passed"] is False


@pytest.mark.parametrize("parity", [{}, {"verified": False}, {"verified": False, "passed": True}])
def test_what_nobody_verified_is_not_called_passed(build, layout, parity):
    done = publish_bundle(build(parity=parity), f"{layout}:v1")
    assert done.parity == done.document.annotations["org.fluxkiln.parity"] == "unverified"
    assert done.document.find("report.json") is None


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda bundle: flip(bundle / "transformer.bmodel"),
        lambda bundle: (bundle / "tokenizer" / "vocab.json").write_bytes(b"{}\n"),
        lambda bundle: (bundle / "LICENSE.md").unlink(),
        lambda bundle: (bundle / "more.txt").write_bytes(b"more"),
        lambda bundle: (bundle / "link").symlink_to("/etc/passwd"),
        lambda bundle: ((bundle / "LICENSE.md").unlink(), (bundle / "LICENSE.md").symlink_to("/etc/hostname")),
    ],
    ids=["flipped", "longer", "missing", "added", "link added", "link in place"],
)
def test_bundle_changed_after_it_was_verified_is_refused(build, layout, change):
    folder = build()
    # Also when the registry has all of its blobs already.
    publish_bundle(build("whole"), f"{layout}:whole")
    change(folder / "bundle")
    with pytest.raises(IntegrityError, match="A bundle holds what its manifest says and nothing else"):
        publish_bundle(folder, f"{layout}:v1")
    assert list(list_tags(layout)[1]) == ["whole"]


def test_report_of_another_checkpoint_is_refused(build, layout):
    folder = build()
    (folder / "report.json").write_text('{"provenance": {"checkpoint": "sha256:00"}}')
    with pytest.raises(IntegrityError, match="is about the checkpoint sha256:00"):
        publish_bundle(folder, f"{layout}:v1")


def test_no_bundle_no_digest_and_taken_names_are_refused(build, layout, tmp_path):
    with pytest.raises(UsageError, match="is no bundle"):
        publish_bundle(tmp_path / "nothing", f"{layout}:v1")
    with pytest.raises(UsageError, match="names a digest"):
        publish_bundle(build(), f"{layout}@sha256:{'a' * 64}")
    with pytest.raises(UsageError, match=r"has a file README\.md of its own"):
        publish_bundle(build("readme", files={"README.md": b"mine"}), f"{layout}:v1")


def test_damaged_blob_is_quarantined_named_and_nothing_is_left(build, layout, tmp_path):
    done = publish_bundle(build(), f"{layout}:v1")
    out = tmp_path / "out"
    pull_bundle(f"{layout}:v1", out)
    # Or it would be taken from there.
    (out / "bundle" / "transformer.bmodel").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    layer = done.document.find("transformer.bmodel")
    flip(Store(tmp_path / "layout").path(layer.digest))
    for destination in (out, tmp_path / "new"):
        with pytest.raises(IntegrityError, match=r"transformer\.bmodel from the layout .* has the digest") as found:
            pull_bundle(f"{layout}:v1", destination)
        aside = quarantine_of(destination) / layer.digest.removeprefix("sha256:")
        assert str(aside) in str(found.value)
        assert aside.stat().st_size == layer.size
        assert [path.name for path in tmp_path.iterdir() if ".pull-" in path.name] == []
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # Publishing it again puts the damaged blob right.
    assert publish_bundle(build("again"), f"{layout}:v1").pushed.files == ("transformer.bmodel",)
    pull_bundle(f"{layout}:v1", tmp_path / "new")


def test_missing_and_truncated_blobs_are_integrity_errors(build, layout, tmp_path):
    done = publish_bundle(build(), f"{layout}:v1")
    path = Store(tmp_path / "layout").path(done.document.find("transformer.bmodel").digest)
    path.chmod(0o644)
    os.truncate(path, 100)
    with pytest.raises(IntegrityError, match=r"transformer\.bmodel"):
        pull_bundle(f"{layout}:v1", tmp_path / "out")
    path.unlink()
    with pytest.raises(IntegrityError, match="is not in the store"):
        pull_bundle(f"{layout}:v1", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pull_replaces_an_earlier_pull_and_nothing_else(build, layout, tmp_path):
    publish_bundle(build("one"), f"{layout}:one")
    publish_bundle(build("two", files={"transformer.bmodel": b"other"}), f"{layout}:two")
    pull_bundle(f"{layout}:one", tmp_path / "out")
    pull_bundle(f"{layout}:two", tmp_path / "out")
    assert (tmp_path / "out" / "bundle" / "transformer.bmodel").read_bytes() == b"other"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for name in ("mine", "file", "link"):
        with pytest.raises(UsageError, match="pull"):
            pull_bundle(f"{layout}:one", tmp_path / name)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_what_the_earlier_pull_has_is_not_fetched_again(build, layout, tmp_path, monkeypatch):
    publish_bundle(build("one"), f"{layout}:one")
    publish_bundle(build("two", files={"transformer.bmodel": b"other"}), f"{layout}:two")
    out, fetched = tmp_path / "out", []
    pull_bundle(f"{layout}:one", out)
    receive = LayoutPlace.receive

    def watch(self: LayoutPlace, layer: Layer, arrival: Arrival) -> None:
        fetched.extend([layer.path] if arrival.received < layer.size else [])
        receive(self, layer, arrival)

    monkeypatch.setattr(LayoutPlace, "receive", watch)
    pull_bundle(f"{layout}:two", out)
    assert set(fetched) == {"", "manifest.json", "transformer.bmodel", "README.md", "provenance.json", "report.json"}
    read_bundle(out / "bundle")
    # What was changed meanwhile is no help, and does no harm.
    flip(out / "bundle" / "text_encoder" / "model.onnx")
    fetched.clear()
    pull_bundle(f"{layout}:one", out)
    assert {"transformer.bmodel", "text_encoder/model.onnx"} <= set(fetched)
    assert "tokenizer/vocab.json" not in fetched
    read_bundle(out / "bundle")


def test_what_a_kill_between_the_renames_leaves_is_healed(build, layout, tmp_path):
    publish_bundle(build(), f"{layout}:v1")
    out = tmp_path / "out"
    pull_bundle(f"{layout}:v1", out)
    out.rename(tmp_path / ".out.old")
    (tmp_path / ".out.pull-0123456789abcdef").mkdir()
    with pytest.raises(UsageError, match="no tag"):
        pull_bundle(f"{layout}:none", out)
    pull_bundle(f"{layout}:v1", out)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []
    read_bundle(out / "bundle")


def test_a_pull_goes_on_where_an_earlier_process_ended(build, layout, tmp_path, monkeypatch):
    done = publish_bundle(build(files={"large.data": os.urandom(3 << 20)}), f"{layout}:v1")
    layer = done.document.find("large.data")
    out, staging = tmp_path / "out", tmp_path / f".out.pull-{done.document.digest[7:23]}"
    (staging / "parts").mkdir(parents=True)
    data = Store(tmp_path / "layout").read(layer.digest)
    (staging / "parts" / layer.digest[7:]).write_bytes(data[: 2 << 20])
    (staging / "bundle").mkdir()
    (staging / "bundle" / "transformer.bmodel").write_bytes(b"damaged by a power cut")
    written = []
    write = Arrival.write
    monkeypatch.setattr(Arrival, "write", lambda self, piece: (written.append(len(piece)), write(self, piece))[1])
    pull_bundle(f"{layout}:v1", out)
    assert sum(written) < (1 << 20) + 100_000, "what had arrived was fetched again"
    read_bundle(out / "bundle")
    # The same with bytes that are not the right ones: they are noticed, and fetched anew.
    shutil.rmtree(out)
    (staging / "parts").mkdir(parents=True)
    (staging / "parts" / layer.digest[7:]).write_bytes(b"x" * (2 << 20))
    pull_bundle(f"{layout}:v1", out)
    read_bundle(out / "bundle")


def test_a_disk_that_is_full_is_said_before_and_during_and_nothing_is_left(build, layout, tmp_path, monkeypatch):
    publish_bundle(build(), f"{layout}:v1")
    out = tmp_path / "far" / "out"
    usage = namedtuple("usage", "f_bavail f_frsize")
    with monkeypatch.context() as patch:
        patch.setattr(distribution.os, "statvfs", lambda path: usage(1, 4096))
        with pytest.raises(ResourceError, match="4096 are free"):
            pull_bundle(f"{layout}:v1", out)

    write = Arrival.write

    def full(self: Arrival, piece: bytes) -> None:
        if not isinstance(self._file, io.BytesIO):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, piece)

    with monkeypatch.context() as patch:
        patch.setattr(Arrival, "write", full)
        with pytest.raises(ResourceError, match="No space left"):
            pull_bundle(f"{layout}:v1", out)
    assert list((tmp_path / "far").iterdir()) == []


def test_folders_that_are_no_layout_are_refused(build, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    with pytest.raises(UsageError, match="no OCI image layout"):
        publish_bundle(build(), f"oci-layout:{tmp_path / 'full'}:v1")
    with pytest.raises(UsageError, match="makes one"):
        pull_bundle(f"oci-layout:{tmp_path / 'none'}:v1", tmp_path / "out")
    assert not (tmp_path / "none").exists()


def test_a_layout_that_was_just_begun_is_gone_on_with(build, tmp_path):
    """Killed between its first folder and the file that names it a layout."""
    folder = build()
    for count in range(1, len(FOLDERS) + 1):
        place = tmp_path / str(count)
        for name in FOLDERS[:count]:
            (place / name).mkdir(parents=True)
        with pytest.raises(UsageError, match="makes one"):
            pull_bundle(f"oci-layout:{place}:v1", tmp_path / "out")
        publish_bundle(folder, f"oci-layout:{place}:v1")
        pull_bundle(f"oci-layout:{place}:v1", tmp_path / "out")


def test_described_from_a_folder_or_a_reference(build, layout):
    folder = build()
    publish_bundle(folder, f"{layout}:v1")
    assert read_described(str(folder)) == read_described(str(folder / "bundle")) == read_described(f"{layout}:v1")
