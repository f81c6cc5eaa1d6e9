from __future__ import annotations

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest

from fluxkiln.artifacts.bundle import heal_bundle, write_bundle
from fluxkiln.artifacts.intact import read_bundle, read_manifest
from fluxkiln.artifacts.manifest import role_of
from fluxkiln.errors import IntegrityError, UsageError


@pytest.fixture
def destination(tmp_path: Path) -> Path:
    return tmp_path / "build" / "bundle"


@pytest.fixture
def written(destination, blobs, manifest_parts, store) -> Path:
    write_bundle(destination, blobs, manifest_parts, store)
    return destination


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_bundle_holds_its_files_and_says_so(written, bundle_bytes):
    manifest = read_bundle(written).manifest
    assert manifest == read_manifest(written)
    found = snapshot(written)
    found.pop("manifest.json")
    assert found == bundle_bytes
    assert {file.path: file.role for file in manifest.files} == {
        "transformer.bmodel": "binary",
        "text_encoder/model.onnx": "binary",
        "tokenizer/vocab.json": "tokenizer",
        "LICENSE.md": "licence",
    }
    assert os.listdir(written.parent) == ["bundle"]


def test_same_contents_give_the_same_bytes_whatever_the_time_and_the_source(
    destination, tmp_path, blobs, bundle_bytes, manifest_parts, store
):
    write_bundle(destination, blobs, manifest_parts, store, build={"created": "yesterday", "host": "a"})
    first = (destination / "manifest.json").read_bytes()
    plain = tmp_path / "vocab.json"
    plain.write_bytes(bundle_bytes["tokenizer/vocab.json"])
    mixed = dict(reversed({**blobs, "tokenizer/vocab.json": plain}.items()))
    write_bundle(destination, mixed, manifest_parts, store, build={"created": "today", "host": "b"})
    assert (destination / "manifest.json").read_bytes() == first
    record = json.loads((destination / "build.json").read_text())
    assert record.items() >= {"created": "today", "host": "b"}.items()
    assert record["manifests"] == [read_manifest(destination).digest]
    assert b"today" not in first
    read_bundle(destination)


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("transformer.neff", "binary"),
        ("t5/model.safetensors", "weights"),
        ("t5/model.onnx.data", "weights"),
        ("rope.npz", "constants"),
        ("tokenizer_2/spiece.model", "tokenizer"),
        ("hlo/double.hlo_module.pb", "binary"),
        ("host/constants.safetensors", "constants"),
        ("onnx/weights/codes.bin", "weights"),
        ("scheduler/scheduler_config.json", "config"),
        ("licences/NOTICE", "licence"),
        ("README.md", "doc"),
    ],
)
def test_role_of_a_name(path, role):
    assert role_of(path) == role


def _flip(folder):
    path = folder / "transformer.bmodel"
    data = bytearray(path.read_bytes())
    data[1234] ^= 1
    path.write_bytes(data)


def _link(folder):
    (folder / "LICENSE.md").rename(folder.parent / "away")
    (folder / "LICENSE.md").symlink_to(folder.parent / "away")


def _link_folder(folder):
    (folder / "tokenizer").rename(folder.parent / "away")
    (folder / "tokenizer").symlink_to(folder.parent / "away")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (_flip, "transformer.bmodel: sha256:"),
        (lambda folder: (folder / "tokenizer/vocab.json").unlink(), "tokenizer/vocab.json: missing"),
        (lambda folder: (folder / "LICENSE.md").write_bytes(b""), "LICENSE.md: 0 bytes, the manifest says 12"),
        (lambda folder: (folder / "extra/evil.py").write_bytes(b"x"), "extra/evil.py: not named by the manifest"),
        (_link, "LICENSE.md: not a regular file"),
        (_link_folder, "tokenizer/vocab.json: missing"),
    ],
)
def test_damage_is_named(written, damage, named):
    (written / "extra").mkdir()
    read_bundle(written)
    damage(written)
    with pytest.raises(IntegrityError) as error:
        read_bundle(written)
    assert f"{written}: {named}" in str(error.value)
    assert error.value.exit_code == 4


def test_all_damage_is_listed_the_first_first(written):
    _flip(written)
    (written / "LICENSE.md").unlink()
    (written / "stray").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"LICENSE.md: missing; 2 more: transformer.bmodel: .*; stray: not named"):
        read_bundle(written)


def test_of_much_damage_the_first_is_named_and_the_rest_counted(written):
    for number in range(9):
        (written / f"stray{number}").write_bytes(b"")
    with pytest.raises(IntegrityError, match=r"stray0: not named .*; 8 more: .*stray4: [^;]*; \.\.\.\. A bundle holds"):
        read_bundle(written)


@pytest.mark.parametrize("data", [b"", b"{}", b'{"schema_version": 2}', b"[]", b" " * (17 << 20)])
def test_damaged_manifest_is_refused(written, data):
    (written / "manifest.json").write_bytes(data)
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        read_manifest(written)


def test_folder_without_a_manifest_is_no_bundle(tmp_path):
    (tmp_path / "file").touch()
    for path, error in (("", IntegrityError), ("missing", UsageError), ("file", UsageError)):
        with pytest.raises(error, match="is no bundle"):
            read_manifest(tmp_path / path)


@pytest.mark.parametrize("name", ["manifest.json", "build.json"])
@pytest.mark.parametrize("what", ["a link", "a pipe", "a folder"])
def test_what_is_no_file_is_not_read_for_one(destination, blobs, manifest_parts, store, name, what):
    write_bundle(destination, blobs, manifest_parts, store, build={"host": "a"})
    (destination / name).rename(destination.parent / "away")
    if what == "a link":
        (destination / name).symlink_to(destination.parent / "away")
    elif what == "a pipe":  # nobody writes to it: opening it would never end
        os.mkfifo(destination / name)
    else:
        (destination / name).mkdir()
    with pytest.raises(IntegrityError, match=rf"{name}: not a regular file"):
        read_manifest(destination)


def test_build_record_names_the_manifest(destination, blobs, manifest_parts, store):
    """Another bundle's manifest, whole in itself, does not pass for the one that was built; nor a changed record."""
    for name in ("one", "two"):
        write_bundle(destination / name, blobs, {**manifest_parts, "name": name}, store, build={"host": "a"})
    read_bundle(destination / "one")
    record, other = destination / "one/build.json", (destination / "two/manifest.json").read_bytes()
    text = record.read_text()
    record.write_text(text.replace('"a"', '"b"'))
    with pytest.raises(IntegrityError, match=r"build.json is damaged"):
        read_bundle(destination / "one")
    record.write_text(text)
    (destination / "one/manifest.json").write_bytes(other)
    with pytest.raises(IntegrityError, match=r"build.json is about a bundle whose manifest has the digest sha256:"):
        read_bundle(destination / "one")


@pytest.mark.parametrize("path", ["../escape", "/tmp/escape", "a\\b", "manifest.json", "LICENSE.MD"])
def test_illegal_path_is_refused_before_anything_is_written(written, blobs, manifest_parts, store, path):
    before = snapshot(written.parent)
    with pytest.raises(IntegrityError):
        write_bundle(written, {**blobs, path: blobs["LICENSE.md"]}, manifest_parts, store)
    assert snapshot(written.parent) == before


def test_dev_bundle_without_its_licence_text_is_refused(destination, blobs, manifest_parts, store):
    del blobs["LICENSE.md"]
    with pytest.raises(IntegrityError, match="licence text"):
        write_bundle(destination, blobs, manifest_parts, store)
    assert not destination.parent.exists()


def test_damaged_blob_leaves_the_old_bundle(written, blobs, manifest_parts, store):
    before = snapshot(written.parent)
    path = store.path(blobs["transformer.bmodel"].digest)
    damaged = b"tet" + path.read_bytes()[3:]
    path.unlink()  # the old bundle has a link to it
    path.write_bytes(damaged)
    with pytest.raises(IntegrityError, match="damaged"):
        write_bundle(written, blobs, {**manifest_parts, "name": "new"}, store)
    assert snapshot(written.parent) == before


def test_blob_of_another_size_than_said_is_refused(destination, blobs, manifest_parts, store):
    wrong = dataclasses.replace(blobs["transformer.bmodel"], size=7)
    with pytest.raises(IntegrityError, match="7 were expected"):
        write_bundle(destination, {**blobs, "transformer.bmodel": wrong}, manifest_parts, store)
    assert not destination.exists()


def test_folder_that_is_no_bundle_is_never_replaced(destination, blobs, manifest_parts, store):
    destination.mkdir(parents=True)
    (destination / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="is no bundle and is not replaced"):
        write_bundle(destination, blobs, manifest_parts, store)
    assert snapshot(destination) == {"thesis.tex": b"years of work"}
    (destination / "thesis.tex").unlink()
    write_bundle(destination, blobs, manifest_parts, store)


def test_file_or_link_in_the_place_of_a_bundle_is_never_replaced(written, tmp_path, blobs, manifest_parts, store):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(written)
    for name in ("file", "link"):
        with pytest.raises(UsageError, match="is no folder"):
            write_bundle(tmp_path / name, blobs, manifest_parts, store)


def test_kill_between_the_two_renames_is_healed(written):
    before = snapshot(written)
    os.rename(written, written.parent / ".bundle.old")
    (written.parent / ".bundle.x.partial").mkdir()
    heal_bundle(written)
    assert snapshot(written) == before
    assert os.listdir(written.parent) == ["bundle"]


def test_kill_after_the_second_rename_is_healed(written):
    before = snapshot(written)
    (written.parent / ".bundle.old").mkdir()
    (written.parent / ".bundle.old" / "half").write_bytes(b"x")
    heal_bundle(written)
    assert snapshot(written) == before
    assert os.listdir(written.parent) == ["bundle"]


def test_failure_between_the_two_renames_restores_the_old_bundle(written, blobs, manifest_parts, store, monkeypatch):
    before = snapshot(written)
    rename = os.rename

    def interrupted(source, target):
        if Path(target) == written and str(source).endswith(".partial"):
            raise KeyboardInterrupt
        rename(source, target)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(written, blobs, {**manifest_parts, "name": "new"}, store)
    assert snapshot(written) == before
    assert os.listdir(written.parent) == ["bundle"]


def test_kill_9_before_every_single_file_operation(tmp_path, run_python):
    script = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    found = json.loads(run_python(script, Path(__file__).with_name("crash_points.py"), "bundle", tmp_path))
    assert set(found) == {"old", "new"}
    assert sum(found.values()) > 20


def test_two_writers_of_one_bundle_take_turns(destination, blobs, manifest_parts, store):
    names = [f"writer-{i}" for i in range(6)]
    threads = [
        threading.Thread(target=write_bundle, args=(destination, blobs, {**manifest_parts, "name": name}, store))
        for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_bundle(destination).manifest.name in names
    assert os.listdir(destination.parent) == ["bundle"]
