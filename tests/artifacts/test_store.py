from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from pathlib import Path

import pytest

from fluxkiln.artifacts.store import Store, open_store
from fluxkiln.errors import IntegrityError, UsageError

# slowly: it must not be finished when it is killed, however busy the machine is
ADD_LARGE = """
import sys, time
from pathlib import Path
from fluxkiln.artifacts import store

class Slow:
    def __init__(self, source):
        self.source = source

    def readinto(self, buffer):
        time.sleep(0.05)
        return self.source.readinto(buffer)

copy = store.copy_hashing
store.copy_hashing = lambda source, target: copy(Slow(source), target)
store.open_store(Path(sys.argv[1])).add_file(Path(sys.argv[2]))
"""

ADD_AND_TAG = """
import json, sys
from pathlib import Path
from fluxkiln.artifacts.store import open_store
root, source, writer = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
sys.stdin.readline()
store = open_store(root)
for i in range(10):
    blob = store.add_file(source)
    entry = {"digest": blob.digest, "size": blob.size}
    manifest = store.add_bytes(json.dumps({"config": entry, "layers": [entry], "writer": writer, "i": i}).encode())
    store.tag(f"writer{writer}:{i}", manifest.digest)
"""


def flip_byte(path: Path, at: int = 5) -> None:
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def add_manifest(store: Store, text: bytes = b"layer") -> str:
    blob = store.add_bytes(text)
    entry = {"digest": blob.digest, "size": blob.size}
    return store.add_bytes(json.dumps({"config": entry, "layers": [entry]}).encode()).digest


def test_layout_is_an_oci_image_layout(store):
    blob = store.add_bytes(b"hello")
    assert json.loads((store.root / "oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((store.root / "index.json").read_text())
    assert index["schemaVersion"] == 2
    assert index["manifests"] == []
    assert blob.digest == "sha256:" + hashlib.sha256(b"hello").hexdigest()
    assert (store.root / "blobs/sha256" / blob.digest[7:]).read_bytes() == b"hello"


def test_making_the_value_touches_nothing(tmp_path):
    store = Store(tmp_path / "store")
    assert list(store.digests()) == []
    assert store.tags() == {}
    assert store.clean() == ()
    assert not store.root.exists()


@pytest.mark.parametrize("move", [False, True])
def test_added_file_is_a_read_only_blob(store, tmp_path, move):
    source = tmp_path / "source"
    source.write_bytes(b"x" * 3_000_000)
    inode = source.stat().st_ino
    blob = store.add_file(source, move=move)
    assert store.verify(blob.digest) == blob
    assert blob.size == 3_000_000
    assert source.exists() is not move
    assert (store.path(blob.digest).stat().st_ino == inode) is move
    assert stat.S_IMODE(store.path(blob.digest).stat().st_mode) == 0o444
    assert list(store.digests()) == [blob]


@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_file_with_another_name_is_copied_not_adopted(store, tmp_path, link):
    source, other = tmp_path / "source", tmp_path / "other"
    other.write_bytes(b"data")
    os.link(other, source) if link == "hard" else source.symlink_to(other)
    blob = store.add_file(source, move=True)
    other.write_bytes(b"DATA")
    assert store.verify(blob.digest) == blob
    assert not os.path.lexists(source)


def test_file_of_another_file_system_is_copied_and_given_up(store):
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == store.root.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    source = shared / f"fluxkiln-test-{os.getpid()}"
    source.write_bytes(b"data")
    blob = store.add_file(source, move=True)
    assert not source.exists()
    assert store.verify(blob.digest) == blob


def test_exported_file_is_its_own(store, tmp_path):
    blob = store.add_bytes(b"x" * 100_000)
    destination = tmp_path / "out.bmodel"
    assert store.export(blob.digest, destination) in ("reflink", "copy")
    assert destination.stat().st_ino != store.path(blob.digest).stat().st_ino
    assert destination.stat().st_nlink == 1
    assert not destination.is_symlink()
    destination.write_bytes(b"changed")
    assert store.verify(blob.digest) == blob
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.bmodel", "store"]


def test_flipped_byte_is_found_quarantined_and_put_right_by_adding_again(store, tmp_path):
    blob = store.add_bytes(b"x" * 1000)
    flip_byte(store.path(blob.digest))
    with pytest.raises(IntegrityError, match=blob.digest) as error:
        store.verify(blob.digest)
    assert error.value.exit_code == 4
    assert not store.has(blob)
    assert (store.root / "quarantine" / blob.digest[7:]).exists()
    assert store.add_bytes(b"x" * 1000) == blob
    assert store.verify(blob.digest) == blob


def test_adding_replaces_a_damaged_blob_that_no_one_has_noticed(store):
    blob = store.add_bytes(b"x" * 1000)
    flip_byte(store.path(blob.digest))
    store.add_bytes(b"x" * 1000)
    assert store.verify(blob.digest) == blob


def test_damaged_blob_is_not_exported_and_the_old_file_stays(store, tmp_path):
    blob = store.add_bytes(b"x" * 1000)
    flip_byte(store.path(blob.digest))
    destination = tmp_path / "out"
    destination.write_bytes(b"old")
    with pytest.raises(IntegrityError):
        store.export(blob.digest, destination)
    assert destination.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "store"]


@pytest.mark.parametrize("digest", ["", "abc", "sha256:" + "A" * 64, "sha256:../" + "0" * 61, "md5:" + "0" * 32])
def test_what_is_no_digest_is_refused(store, digest):
    with pytest.raises(IntegrityError, match="64 lower-case hex"):
        store.open(digest)


def test_missing_blob_is_named(store):
    with pytest.raises(IntegrityError, match="sha256:" + "0" * 64):
        store.verify("sha256:" + "0" * 64)


def test_tags_point_move_and_go(store):
    first, second = add_manifest(store, b"1"), add_manifest(store, b"2")
    store.tag("flux-dev:bm1684x", first)
    store.tag("other:cpu", first)
    store.tag("flux-dev:bm1684x", second)
    assert store.tags() == {"flux-dev:bm1684x": second, "other:cpu": first}
    index = json.loads((store.root / "index.json").read_bytes())
    index["manifests"] = [one for one in index["manifests"] if "other:cpu" not in one["annotations"].values()]
    (store.root / "index.json").write_text(json.dumps(index))
    assert store.resolve("flux-dev:bm1684x") == second
    with pytest.raises(UsageError, match="flux-dev:bm1684x"):
        store.resolve("other:cpu")


@pytest.mark.parametrize("name", ["", "a b", "../x", ":x", "x:", "a\n", "ü"])
def test_illegal_tag_is_refused(store, name):
    with pytest.raises(UsageError):
        store.tag(name, add_manifest(store))


def test_tag_of_an_incomplete_manifest_is_refused(store):
    digest = add_manifest(store, b"layer")
    layer = store.add_bytes(b"layer")
    store.path(layer.digest).unlink()
    with pytest.raises(IntegrityError, match=layer.digest):
        store.tag("a:b", digest)
    with pytest.raises(IntegrityError):
        store.tag("a:b", store.add_bytes(b'{"config": 1}').digest)
    assert store.tags() == {}


def test_entries_of_other_tools_in_the_index_are_kept(store):
    foreign = {"mediaType": "application/vnd.oci.image.index.v1+json", "digest": "sha256:" + "1" * 64, "size": 7}
    index = json.loads((store.root / "index.json").read_text())
    (store.root / "index.json").write_text(json.dumps({**index, "manifests": [foreign]}))
    store.tag("a:b", add_manifest(store))
    assert foreign in json.loads((store.root / "index.json").read_text())["manifests"]
    assert list(store.tags()) == ["a:b"]


def bytes_unfinished(root):
    """Size of the largest file that is being written."""
    largest = 0
    for path in root.glob("tmp/*.partial"):
        with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
            largest = max(largest, path.stat().st_size)
    return largest


def test_kill_9_while_a_large_blob_is_written_leaves_no_blob_and_is_cleaned_up(tmp_path, start_python):
    source = tmp_path / "large"
    with source.open("wb") as file:
        file.truncate(1 << 30)  # sparse
    root = tmp_path / "store"
    writer = start_python(ADD_LARGE, root, source)
    while bytes_unfinished(root) < 1 << 16:  # more than the store's own small files, which come before the blob
        assert writer.poll() is None
        time.sleep(0.001)
    assert Store(root).clean() == ()  # its writer lives
    writer.kill()
    assert writer.wait() == -9
    assert len(list(root.glob("tmp/*.partial"))) == 1
    store = open_store(root)
    assert list(root.glob("tmp/*")) == []
    assert list(store.digests()) == []
    assert store.verify(store.add_bytes(b"works again").digest)


@pytest.mark.parametrize(("scenario", "states"), [("action", {"recorded", "not recorded"}), ("tag", {"old", "new"})])
def test_kill_9_before_every_single_file_operation(tmp_path, run_python, scenario, states):
    script = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    found = json.loads(run_python(script, Path(__file__).with_name("crash_points.py"), scenario, tmp_path))
    assert set(found) == states


def test_several_writers_at_once_lose_no_tag_and_no_blob(tmp_path, start_python):
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2_000_000))
    writers = [start_python(ADD_AND_TAG, tmp_path / "store", source, i) for i in range(4)]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate(timeout=120)
        assert writer.returncode == 0
    store = Store(tmp_path / "store")
    assert sorted(store.tags()) == sorted(f"writer{w}:{i}" for w in range(4) for i in range(10))
    assert len({store.verify(blob.digest) for blob in store.digests()}) == 41
    assert os.listdir(store.root / "tmp") == []
    assert os.listdir(store.root / "locks") == []
