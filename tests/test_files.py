from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fluxkiln import files
from fluxkiln.errors import ResourceError
from fluxkiln.files import (
    copy_hashing,
    digest_file,
    disk_full_named,
    file_state,
    open_beneath,
    partial_directory,
    partial_file,
    remove_unheld,
    write_durably,
)

HOLD = """
import sys
from pathlib import Path
from fluxkiln.files import partial_directory, partial_file
with partial_file(Path(sys.argv[1]), "blob") as (path, file), partial_directory(Path(sys.argv[1]), "work") as folder:
    (folder / "inner").write_text("x")
    print("ready", flush=True)
    sys.stdin.read()
"""


def test_partial_is_gone_after_an_error(tmp_path):
    def fail():
        with partial_file(tmp_path, "a") as (path, file), partial_directory(tmp_path, "b") as folder:
            file.write(b"half")
            assert sorted(tmp_path.iterdir()) == [path, folder]
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_living_process_holds_is_left_and_what_a_killed_one_left_is_removed(tmp_path, start_python):
    holder = start_python(HOLD, tmp_path)
    assert holder.stdout.readline() == "ready\n"
    assert remove_unheld(tmp_path) == ()
    assert len(list(tmp_path.iterdir())) == 2
    holder.kill()
    holder.wait()
    (tmp_path / "someone-elses").write_text("stays")
    assert len(remove_unheld(tmp_path)) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["someone-elses"]


def test_write_durably_replaces_and_leaves_nothing_beside(tmp_path):
    for data in (b"old", b"new"):
        write_durably(tmp_path / "record.json", data)
    assert (tmp_path / "record.json").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["record.json"]


@pytest.mark.parametrize("size", [0, 1, files.CHUNK - 1, files.CHUNK, 2 * files.CHUNK + 7])
def test_copy_hashing_copies_and_hashes(tmp_path, size):
    data = os.urandom(size)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("w+b") as target:
        target.truncate(size + 100)  # reserved for a source that has shrunk
        assert copy_hashing(source, target) == ("sha256:" + hashlib.sha256(data).hexdigest(), size)
    assert (tmp_path / "b").read_bytes() == data


def test_files_are_opened_beneath_a_folder(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/c").write_bytes(b"data")
    (tmp_path / "link").symlink_to(tmp_path / "a")  # how a folder is named is its user's business
    for root, path in ((tmp_path, "a/b/c"), (tmp_path / "link", "b/c")):
        with open_beneath(root, path) as file:
            assert file.read() == b"data"


def test_no_link_pipe_or_folder_is_opened_beneath_a_folder(tmp_path):
    """A pipe that nobody writes to would be waited for."""
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "root/real").mkdir(parents=True)
    (tmp_path / "root/file").symlink_to("../secret")
    (tmp_path / "root/folder").symlink_to("..")
    os.mkfifo(tmp_path / "root/pipe")
    for path in ("file", "folder/secret", "pipe", "real", "missing", "real/missing", "../secret", "/etc/hostname", ""):
        with pytest.raises(OSError, match=r"symbolic link|[Nn]ot a dir|no regular file|No such file|leads out"):
            open_beneath(tmp_path / "root", path)


def test_a_second_name_moves_ctime_alone(tmp_path):
    (tmp_path / "a").write_bytes(b"data")
    before = file_state(tmp_path / "a")
    os.link(tmp_path / "a", tmp_path / "b")
    after = file_state(tmp_path / "a")
    assert after != before
    assert after.is_same_file(before)
    (tmp_path / "a").write_bytes(b"more data")
    assert not file_state(tmp_path / "a").is_same_file(before)


def test_digest_of_a_symbolic_link_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(b"data")
    (tmp_path / "link").symlink_to("a")
    assert digest_file(tmp_path / "a") == ("sha256:" + hashlib.sha256(b"data").hexdigest(), 4)
    with pytest.raises(OSError, match="symbolic links") as error:
        digest_file(tmp_path / "link")
    assert error.value.errno == errno.ELOOP


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_simulated_full_disk_names_needed_and_free_bytes(tmp_path, number):
    needed = r"12345 bytes are needed, \d+ bytes are free"
    with pytest.raises(ResourceError, match=needed), disk_full_named(tmp_path / "not" / "there", 12345):
        raise OSError(number, os.strerror(number))


def test_other_system_errors_pass(tmp_path):
    with pytest.raises(PermissionError), disk_full_named(tmp_path, 1):
        raise PermissionError(errno.EACCES, "no")


def test_refused_reflink_falls_back_and_other_errors_do_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"data")

    def failing(number):
        def ioctl(*_):
            raise OSError(number, os.strerror(number))

        return ioctl

    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("w+b") as target:
        monkeypatch.setattr(fcntl, "ioctl", failing(errno.EOPNOTSUPP))
        assert files.clone(source, target) is False
        monkeypatch.setattr(fcntl, "ioctl", failing(errno.EIO))
        with pytest.raises(OSError, match="Input/output"):
            files.clone(source, target)


FULL_DISK = """
import sys
from pathlib import Path
from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.store import open_store
from fluxkiln.errors import ResourceError
disk, big = Path(sys.argv[1]), Path(sys.argv[2])
store = open_store(disk / "store")
kept = store.add_bytes(b"k" * 300_000)
other = open_store(big.parent / "other")
large = other.add_file(big)

def refused(work):
    try:
        work()
    except ResourceError as error:
        assert "bytes are free" in str(error), error
        print(error)
    else:
        raise SystemExit("the full disk was not noticed")

def produce(workdir):
    (workdir / "big").write_bytes(bytes(8 << 20))
    return {"big": workdir / "big"}, {}

refused(lambda: store.add_file(big))
refused(lambda: other.export(large.digest, disk / "exported"))
refused(lambda: run_action(ActionCache(store), Action("cast", "x", "c", {}), produce))
assert [blob for blob in store.digests()] == [kept]
assert store.verify(kept.digest) == kept
assert list((store.root / "tmp").iterdir()) == []
assert sorted(p.name for p in disk.iterdir()) == ["store"]
store.add_bytes(b"n" * 300_000)
"""


def test_full_disk_of_its_own(tmp_path):
    """A tmpfs of 2 MiB in a mount namespace: the kernel's own ENOSPC."""
    disk = tmp_path / "disk"
    disk.mkdir()
    (tmp_path / "big").write_bytes(bytes(4 << 20))
    unshare = shutil.which("unshare")
    if unshare is None or subprocess.run([unshare, "-rm", "true"], capture_output=True).returncode:
        pytest.skip("needs unshare(1) with mount namespaces")
    script = 'mount -t tmpfs -o size=2m tmpfs "$1" && exec "$2" -c "$3" "$1" "$4"'
    done = subprocess.run(
        [unshare, "-rm", "sh", "-c", script, "sh", disk, sys.executable, FULL_DISK, tmp_path / "big"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    if "mount:" in done.stderr:
        pytest.skip(f"tmpfs cannot be mounted: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{4 << 20} bytes are needed") == 2


def test_a_device_or_a_pipe_is_not_replaced(tmp_path):
    """As `--out /dev/null` would."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="it is no regular file"):
        write_durably(tmp_path / "fifo", b"x")
    assert (tmp_path / "fifo").is_fifo()
    assert os.listdir(tmp_path) == ["fifo"]
