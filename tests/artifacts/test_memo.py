from __future__ import annotations

import os
import time

import pytest

from fluxkiln.artifacts import memo
from fluxkiln.artifacts.memo import remember


@pytest.fixture
def calls():
    return []


@pytest.fixture
def settled(tmp_path, monkeypatch):
    """A file that counts as unchanged for long enough."""
    monkeypatch.setattr(memo, "SETTLED_NS", -1)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"weights")
    return path


def compute(path, calls):
    def read():
        calls.append(1)
        return {"text": path.read_text()}

    return read


def test_unchanged_file_is_read_once(store, settled, calls):
    for _ in range(3):
        assert remember(store, settled, "text", compute(settled, calls)) == {"text": "weights"}
    assert len(calls) == 1
    remember(store, settled, "other facts", compute(settled, calls))
    assert len(calls) == 2


def test_link_and_target_are_one_file(store, settled, tmp_path, calls):
    (tmp_path / "link").symlink_to(settled)
    remember(store, settled, "text", compute(settled, calls))
    remember(store, tmp_path / "link", "text", compute(settled, calls))
    assert len(calls) == 1


def test_changed_file_is_read_again_though_size_and_modification_time_are_the_same(store, settled, calls):
    before = settled.stat()
    remember(store, settled, "text", compute(settled, calls))
    while time.time_ns() - before.st_ctime_ns < 50_000_000:  # let the kernel's clock tick
        time.sleep(0.01)
    settled.write_bytes(b"WEIGHTS")
    os.utime(settled, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert settled.stat().st_mtime_ns == before.st_mtime_ns
    assert remember(store, settled, "text", compute(settled, calls)) == {"text": "WEIGHTS"}


def test_file_that_has_just_been_written_is_not_remembered(store, tmp_path, calls):
    path = tmp_path / "fresh"
    path.write_bytes(b"fresh")
    for _ in range(2):
        remember(store, path, "text", compute(path, calls))
    assert len(calls) == 2


def test_file_that_changes_while_it_is_read_is_not_remembered(store, settled, calls):
    def write_and_read():
        settled.write_bytes(b"longer than before")
        return compute(settled, calls)()

    remember(store, settled, "text", write_and_read)
    remember(store, settled, "text", compute(settled, calls))
    assert len(calls) == 2


def test_damaged_memo_is_made_again(store, settled, calls):
    remember(store, settled, "text", compute(settled, calls))
    [record] = (store.root / "memo").iterdir()
    record.write_bytes(b"{")
    remember(store, settled, "text", compute(settled, calls))
    assert len(calls) == 2
