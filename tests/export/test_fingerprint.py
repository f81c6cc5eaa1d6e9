"""Content keys: every change counts, unchanged files are not read again, NaN and Inf are found."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import CheckpointError
from fluxkiln.export import fingerprint as module
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.fingerprint import (
    DigestMemo,
    check_states,
    digest_tensors,
    file_states,
    fingerprint,
    scan_finite,
)
from fluxkiln.export.synth import synthesize
from fluxkiln.types import TensorRef

TENSOR = "transformer_blocks.1.ff.net.2.weight"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return synthesize("tiny-dev", tmp_path_factory.mktemp("pristine") / "tiny-dev")


@pytest.fixture
def folder(pristine, tmp_path):
    """A copy whose files look an hour old, so that a memo may trust their times."""
    copy = Path(shutil.copytree(pristine, tmp_path / "tiny-dev"))
    age(copy)
    return copy


@pytest.fixture
def settled(monkeypatch):
    """ctime cannot be set, so trust new files at once."""
    monkeypatch.setattr(module, "_SETTLE_NS", 0)


def age(folder: Path, seconds: int = 3600) -> None:
    for file in folder.rglob("*"):
        os.utime(file, (file.stat().st_atime - seconds, file.stat().st_mtime - seconds))


def poke(ref: TensorRef, index: int, value: float) -> None:
    """Overwrite one bfloat16 value in place and put the file's times back."""
    stat = ref.file.stat()
    with ref.file.open("r+b") as stream:
        stream.seek(ref.offset + 2 * index)
        stream.write(np.array(value, ml_dtypes.bfloat16).tobytes())
    os.utime(ref.file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def refs_of(folder: Path) -> dict[str, TensorRef]:
    return dict(open_checkpoint(folder).tensors["transformer"])


@pytest.fixture
def reads(monkeypatch):
    """Names of the tensors whose bytes are read."""
    names = []
    original = module._read_stream

    def counting(stream, ref):
        names.append(ref.name)
        return original(stream, ref)

    monkeypatch.setattr(module, "_read_stream", counting)
    return names


@pytest.mark.usefixtures("settled")
def test_a_change_in_place_changes_one_digest_and_the_fingerprint(folder, tmp_path):
    memo_path = tmp_path / "memo.json"
    refs = refs_of(folder)
    before = digest_tensors(refs.values(), DigestMemo(memo_path))
    key = fingerprint(open_checkpoint(folder), DigestMemo(memo_path))
    poke(refs[TENSOR], 7, 3.0)
    after = digest_tensors(refs.values(), DigestMemo(memo_path))
    assert {name for name in before if before[name] != after[name]} == {TENSOR}
    assert fingerprint(open_checkpoint(folder), DigestMemo(memo_path)) != key
    assert after == digest_tensors(refs.values())


@pytest.mark.usefixtures("settled")
def test_unchanged_files_are_not_read_again(folder, tmp_path, reads):
    memo_path = tmp_path / "deep" / "memo.json"
    checkpoint = open_checkpoint(folder)
    key = fingerprint(checkpoint, DigestMemo(memo_path))
    assert len(reads) == sum(len(refs) for refs in checkpoint.tensors.values())
    reads.clear()
    assert fingerprint(open_checkpoint(folder), DigestMemo(memo_path)) == key
    scan_finite(checkpoint.tensors["transformer"].values(), DigestMemo(memo_path))
    assert reads == []
    assert [path.name for path in memo_path.parent.iterdir()] == ["memo.json"]


def test_a_new_file_is_never_trusted(folder, tmp_path, reads):
    """Two writes within one tick of the clock leave the same times."""
    refs = refs_of(folder)
    digest_tensors([refs[TENSOR]], DigestMemo(tmp_path / "memo.json"))
    digest_tensors([refs[TENSOR]], DigestMemo(tmp_path / "memo.json"))
    assert reads == [TENSOR, TENSOR]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": 0, "files": {}}', b'{"format": 1, "files": 3}', b'{"format": 1}']
)
def test_a_damaged_memo_costs_time_only(folder, tmp_path, content):
    (tmp_path / "memo.json").write_bytes(content)
    refs = refs_of(folder)
    assert digest_tensors(refs.values(), DigestMemo(tmp_path / "memo.json")) == digest_tensors(refs.values())


@pytest.mark.usefixtures("settled")
def test_the_memo_forgets_files_that_are_gone(folder, tmp_path):
    memo_path = tmp_path / "memo.json"
    digest_tensors(refs_of(folder).values(), DigestMemo(memo_path))
    moved = folder.rename(tmp_path / "elsewhere")
    digest_tensors(refs_of(moved).values(), DigestMemo(memo_path))
    assert {Path(file).parents[1].name for file in json.loads(memo_path.read_text())["files"]} == {"elsewhere"}


def test_the_fingerprint_does_not_depend_on_place_or_shards(folder, tmp_path):
    key = fingerprint(open_checkpoint(folder))
    moved = folder.rename(tmp_path / "elsewhere")
    assert fingerprint(open_checkpoint(moved)) == key
    from safetensors.numpy import load_file, save_file

    tensors = {}
    for shard in (moved / "transformer").glob("*.safetensors"):
        tensors |= load_file(shard)
        shard.unlink()
    next((moved / "transformer").glob("*.index.json")).unlink()
    save_file(tensors, moved / "transformer" / "diffusion_pytorch_model.safetensors")
    assert fingerprint(open_checkpoint(moved)) == key


@pytest.mark.parametrize("file", ["transformer/config.json", "scheduler/scheduler_config.json"])
def test_configs_count(folder, file):
    key = fingerprint(open_checkpoint(folder))
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added": 1}))
    assert fingerprint(open_checkpoint(folder)) != key


def test_tokenizers_count(folder):
    key = fingerprint(open_checkpoint(folder))
    with (folder / "tokenizer" / "merges.txt").open("a") as stream:
        stream.write("\n")
    assert fingerprint(open_checkpoint(folder)) != key


def opened(folder: Path):
    """A checkpoint as a build has it: what was read of which state."""
    checkpoint = open_checkpoint(folder)
    digests = {name: digest_tensors(refs.values()) for name, refs in checkpoint.tensors.items()}
    return replace(checkpoint, digests=digests, states=file_states(checkpoint))


def test_a_second_name_is_no_change(folder, tmp_path, reads):
    """It moves ctime: the file is read again, once, and has what it had."""
    checkpoint = opened(folder)
    file = refs_of(folder)[TENSOR].file
    check_states(checkpoint)
    reads.clear()
    os.link(file, tmp_path / "second name")
    for _ in range(2):
        check_states(checkpoint)
    assert set(reads) == {ref.name for ref in refs_of(folder).values() if ref.file == file}
    assert len(reads) == len(set(reads))


def test_a_change_behind_the_same_times_is_one(folder):
    checkpoint = opened(folder)
    poke(refs_of(folder)[TENSOR], 7, 3.0)
    with pytest.raises(CheckpointError, match="changed while the build read it"):
        check_states(checkpoint)


@pytest.mark.parametrize("restless", [1, 2, 3])
def test_a_second_name_while_it_is_read(folder, tmp_path, monkeypatch, restless):
    """Two readings that agree are what the file holds, however often it gets another name meanwhile."""
    ref = refs_of(folder)[TENSOR]
    wanted = digest_tensors([ref])
    names, original = iter(range(restless)), module._read_stream

    def linking(stream, one):
        facts = original(stream, one)
        if (number := next(names, None)) is not None:
            os.link(ref.file, tmp_path / f"name {number}")
        return facts

    monkeypatch.setattr(module, "_read_stream", linking)
    assert digest_tensors([ref]) == wanted


@pytest.mark.parametrize("times", ["moved", "put back"])
def test_a_change_while_it_is_read(folder, monkeypatch, times):
    ref = refs_of(folder)[TENSOR]
    values, original = iter(range(1, 9)), module._read_stream

    def changing(stream, one):
        facts = original(stream, one)
        poke(ref, 7, next(values))
        if times == "moved":
            os.utime(ref.file)
        return facts

    monkeypatch.setattr(module, "_read_stream", changing)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        digest_tensors([ref])


def test_shape_and_dtype_count(folder):
    ref = refs_of(folder)[TENSOR]
    flat = replace(ref, shape=(ref.nbytes // 2,))
    other = replace(ref, dtype="F16")
    digests = {digest_tensors([one])[TENSOR] for one in (ref, flat, other)}
    assert len(digests) == 3


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_found(folder, tmp_path, value, monkeypatch):
    # Several chunks a tensor, so that the index counts across them.
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4096)
    refs = refs_of(folder)
    scan_finite(refs.values(), DigestMemo(tmp_path / "memo.json"))
    poke(refs[TENSOR], 200 * 1024 + 77, value)
    poke(refs[TENSOR], 255 * 1024, value)
    for _ in range(2):
        with pytest.raises(CheckpointError, match=rf"{TENSOR} in .* is NaN or Inf at \[200, 77\], weights must be"):
            scan_finite(refs.values(), DigestMemo(tmp_path / "memo.json"))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_nonfinite_values_of_other_dtypes(tmp_path, dtype):
    from safetensors.numpy import save_file

    from fluxkiln.export.safetensors_header import read_header

    values = np.full((3, 5), np.finfo(dtype).max, dtype)
    save_file({"x": values}, tmp_path / "good.safetensors")
    scan_finite(read_header(tmp_path / "good.safetensors").values())
    values[2, 1] = np.nan
    save_file({"x": values}, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError, match=r"at \[2, 1\]"):
        scan_finite(read_header(tmp_path / "bad.safetensors").values())


def test_progress_reaches_the_total(folder):
    refs = refs_of(folder)
    calls = []
    digest_tensors(refs.values(), progress=lambda done, total: calls.append((done, total)))
    total = sum(ref.nbytes for ref in refs.values())
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_a_file_that_shrinks_or_goes_is_named(folder):
    ref = refs_of(folder)[TENSOR]
    os.truncate(ref.file, ref.offset + 10)
    with pytest.raises(CheckpointError, match=f"ends inside {TENSOR}"):
        digest_tensors([ref])
    ref.file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read: No such file"):
        digest_tensors([ref])
