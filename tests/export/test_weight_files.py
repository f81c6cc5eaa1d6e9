"""Shards that change or go are noticed; a second name for one is no change."""

from __future__ import annotations

import os
import shutil

import pytest

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.fingerprint import check_unchanged, shard_states


@pytest.fixture
def shards(tiny_checkpoint, tmp_path):
    """(states, tensors, one file) of a copy of the tiny transformer."""
    root = tmp_path / "model"
    shutil.copytree(tiny_checkpoint().root, root)
    refs = tuple(open_checkpoint(root).tensors["transformer"].values())
    return shard_states(refs), refs, refs[0].file


def test_untouched(shards, tmp_path):
    states, refs, file = shards
    assert len(states) == 3
    os.link(file, tmp_path / "second name")
    check_unchanged(states, refs)


def test_gone(shards):
    states, refs, file = shards
    file.unlink()
    with pytest.raises(CheckpointError, match=r"has gone .*put it back"):
        check_unchanged(states, refs)
    with pytest.raises(CheckpointError, match="has gone"):
        shard_states(refs)


def test_replaced_by_an_equal_file(shards, tmp_path):
    states, refs, file = shards
    shutil.copy2(file, tmp_path / "copy")
    (tmp_path / "copy").rename(file)
    with pytest.raises(CheckpointError, match="was replaced"):
        check_unchanged(states, refs)


def test_written_to(shards):
    states, refs, file = shards
    with file.open("r+b") as stream:
        stream.seek(-2, 2)
        stream.write(b"xx")
    with pytest.raises(CheckpointError, match="was written to"):
        check_unchanged(states, refs)


def test_another_header_with_the_times_put_back(shards):
    """Two tensors of one shape exchange their names: size and, with a little effort, times stay."""
    states, refs, file = shards
    stat = file.stat()
    data = file.read_bytes()
    first, second = (b"transformer_blocks.0.attn.to_q.bias", b"transformer_blocks.0.attn.to_k.bias")
    assert first in data
    assert second in data
    file.write_bytes(data.replace(b'"dtype":"BF16"', b'"dtype":"F16" ', 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CheckpointError, match="no longer at byte"):
        check_unchanged(states, refs)
