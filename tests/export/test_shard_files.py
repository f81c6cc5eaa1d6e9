"""Shards on disk: together they are the checkpoint bit for bit, and each is what its binding says."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import CheckpointError, IntegrityError, ResourceError, UsageError
from fluxkiln.export import shard_files
from fluxkiln.export.bindings import apply_transforms, bind_shard, split_slots
from fluxkiln.export.checkpoint import open_checkpoint, read_tensor
from fluxkiln.export.shard_files import read_shard, write_part
from fluxkiln.patches.flux1.kinds import list_split_parts
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.types import Binding, SlotBinding, TensorRef, TensorSpec, Transform
from tests.ranks import join_shards, write_shards


def parts_of(checkpoint, *names, granularity="block", vae="kl"):
    return [part for part in list_split_parts(checkpoint.configs, granularity, vae) if not names or part.name in names]


def shards_by_part(files):
    found = {}
    for file in files:
        found.setdefault(file.part, []).append(read_shard(file.path, file.sha256))
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("block_bytes", [shard_files._BLOCK_BYTES, 1000])
def test_shards_together_are_the_checkpoint_bit_for_bit(tiny_checkpoint, tmp_path, monkeypatch, ranks, block_bytes):
    """Two heads on four ranks are padded. A block of 1000 bytes is no multiple of anything."""
    monkeypatch.setattr(shard_files, "_BLOCK_BYTES", block_bytes)
    checkpoint = tiny_checkpoint()
    parts = parts_of(checkpoint)
    if block_bytes == 1000:
        parts = parts_of(checkpoint, "double.01", "single.00", "vae_decoder")
    files = write_shards(parts, checkpoint, ranks, tmp_path / "weights")
    joined = {}
    for part in parts:
        shards = shards_by_part(files)[part.name]
        assert len(shards) == part.ranks(ranks)
        for name, tensor in join_shards(part, checkpoint, shards).items():
            joined[part.component, name] = tensor
            original = read_tensor(checkpoint.tensors[part.component][name])
            assert tensor.dtype == original.dtype == ml_dtypes.bfloat16
            assert tensor.tobytes() == original.tobytes(), name
    if block_bytes != 1000:
        expected = {
            (component, name)
            for component in ("text_encoder", "text_encoder_2", "transformer", "vae")
            for name in checkpoint.tensors[component]
            if component != "vae" or name.startswith("decoder.")
        }
        assert joined.keys() == expected


@pytest.mark.parametrize("granularity", ["block", "group:2", "whole"])
def test_each_file_is_what_its_binding_says(tiny_checkpoint, tmp_path, granularity):
    checkpoint, ranks = tiny_checkpoint(), 4
    parts = parts_of(checkpoint, granularity=granularity)
    files = write_shards(parts, checkpoint, ranks, tmp_path)
    assert [(file.part, file.rank) for file in files] == [
        (part.name, rank) for part in parts for rank in range(part.ranks(ranks))
    ]
    for part in parts:
        slots = split_slots(MODEL, part, checkpoint.configs, part.ranks(ranks))
        for rank, shard in enumerate(shards_by_part(files)[part.name]):
            assert list(shard) == [spec.name for spec in slots]
            for slot in bind_shard(part, slots, checkpoint, part.ranks(ranks), rank).slots:
                source = read_tensor(checkpoint.tensors[part.component][slot.sources[0]])
                expected = apply_transforms(source, slot.transforms)
                assert shard[slot.slot].shape == expected.shape
                assert shard[slot.slot].tobytes() == expected.tobytes()


def test_digests_and_names(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint()
    files = write_shards(parts_of(checkpoint, "head", "clip"), checkpoint, 2, tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")) == [
        "clip/tp0.safetensors",
        "head/tp0.safetensors",
        "head/tp1.safetensors",
    ]
    for file in files:
        assert file.path.stat().st_size == file.nbytes
        assert hashlib.sha256(file.path.read_bytes()).hexdigest() == file.sha256


def test_safetensors_reads_the_files(tiny_checkpoint, tmp_path):
    from safetensors import safe_open

    checkpoint = tiny_checkpoint()
    (file, _) = write_shards(parts_of(checkpoint, "single.01"), checkpoint, 2, tmp_path)
    with safe_open(file.path, "pt") as opened:
        mine = read_shard(file.path)
        assert set(opened.keys()) == set(mine)
        for name in mine:
            assert np.array_equal(opened.get_tensor(name).float().numpy(), mine[name].astype(np.float32))


def test_source_is_read_once_for_all_ranks(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint, read = tiny_checkpoint(), []
    original = shard_files.read_into

    def counting(stream, view, ref):
        read.append(len(view))
        return original(stream, view, ref)

    monkeypatch.setattr(shard_files, "read_into", counting)
    parts = parts_of(checkpoint, "single.00", "double.00", "t5")
    write_shards(parts, checkpoint, 4, tmp_path)
    names = {
        (part.component, slot.sources[0])
        for part in parts
        for slot in bind_shard(part, split_slots(MODEL, part, checkpoint.configs, 4), checkpoint, 4, 0).slots
    }
    assert sum(read) == sum(checkpoint.tensors[component][name].nbytes for component, name in names)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_other_floats_are_rounded_to_bfloat16(tiny_checkpoint, tmp_path, dtype):
    root = tmp_path / "model"
    shutil.copytree(tiny_checkpoint().root, root)
    values = np.float32 if dtype == "F32" else np.float16
    folder = root / "transformer"
    drawn = {}
    draw = np.random.default_rng(1)
    for file in folder.glob("*.safetensors"):
        entries, data, position = {}, [], 0
        for name, ref in sorted(shard_files.read_header(file).items()):
            drawn[name] = draw.standard_normal(ref.shape).astype(values)
            end = position + drawn[name].nbytes
            entries[name] = {"dtype": dtype, "shape": ref.shape, "data_offsets": [position, end]}
            data.append(drawn[name].tobytes())
            position = end
        header = json.dumps(entries).encode()
        file.write_bytes(len(header).to_bytes(8, "little") + header + b"".join(data))
    checkpoint = open_checkpoint(root)
    (part,) = parts_of(checkpoint, "single.02")
    files = write_shards([part], checkpoint, 2, tmp_path / "weights")
    for name, tensor in join_shards(part, checkpoint, shards_by_part(files)["single.02"]).items():
        assert tensor.tobytes() == drawn[name].astype(ml_dtypes.bfloat16).tobytes()


@pytest.mark.parametrize("axis", [0, 1])
def test_memory_does_not_grow_with_the_tensor(tmp_path, axis):
    """32 MB in blocks of 4 MB: one that is read, one that is copied from."""
    source = tmp_path / "source"
    draw = np.random.default_rng(2).integers(0, 1 << 15, (4096, 4096), np.uint16)
    draw.tofile(source)
    ref = TensorRef("w", source, "BF16", draw.shape, 0, draw.nbytes)
    spans = [Transform("slice", dim=axis, start=1024 * rank, stop=1024 * (rank + 1)) for rank in range(4)]
    bindings = [Binding("part", "transformer", (SlotBinding("w", ("w",), (span,)),)) for span in spans]
    slots = (TensorSpec("w", (1024, 4096) if axis == 0 else (4096, 1024)),)
    tracemalloc.start()
    try:
        files = write_part(slots, bindings, SimpleNamespace(tensors={"transformer": {"w": ref}}), tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    pieces = [read_shard(file.path)["w"].view(np.uint16) for file in files]
    assert np.array_equal(np.concatenate(pieces, axis=axis), draw)


def test_a_failure_leaves_neither_the_file_nor_a_piece_of_it(tiny_checkpoint, tmp_path, monkeypatch):
    checkpoint = tiny_checkpoint()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=r"tp0.safetensors cannot be written: No space left on device; free space"):
        write_shards(parts_of(checkpoint, "tail"), checkpoint, 2, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_damaged_and_unknown_sources_are_refused(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint()
    refs = dict(checkpoint.tensors["transformer"])
    odd = replace(refs["proj_out.weight"], dtype="I16")
    other = replace(checkpoint, tensors={**checkpoint.tensors, "transformer": {**refs, odd.name: odd}})
    with pytest.raises(CheckpointError, match=r"proj_out.weight in .* has the dtype I16"):
        write_shards(parts_of(checkpoint, "tail"), other, 2, tmp_path)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"\0" * 100)
    short = replace(refs["proj_out.weight"], file=cut, offset=0)
    other = replace(checkpoint, tensors={**checkpoint.tensors, "transformer": {**refs, short.name: short}})
    with pytest.raises(CheckpointError, match=r"cut.safetensors ends inside proj_out.weight"):
        write_shards(parts_of(checkpoint, "tail"), other, 2, tmp_path)
    with pytest.raises(UsageError, match="3 ranks cannot share"):
        write_shards(parts_of(checkpoint), checkpoint, 3, tmp_path / "none")
    assert not (tmp_path / "none").exists(), "refused before anything is written"


def test_a_tampered_shard_is_seen(tiny_checkpoint, tmp_path):
    checkpoint = tiny_checkpoint()
    (part,) = parts_of(checkpoint, "double.00")
    files = write_shards([part], checkpoint, 4, tmp_path)
    shards = shards_by_part(files)["double.00"]
    last = {**shards[3], "attn.to_q.weight": shards[3]["attn.to_q.weight"].copy()}
    last["attn.to_q.weight"][0, 0] = 1
    with pytest.raises(IntegrityError, match=r"attn.to_q.weight of rank 3 is not what .* zero where it is padded"):
        join_shards(part, checkpoint, [*shards[:3], last])
    other = {**shards[1], "ff.net.2.bias": shards[1]["ff.net.2.bias"] + 1}
    with pytest.raises(IntegrityError, match=r"ff.net.2.bias of rank"):
        join_shards(part, checkpoint, [shards[0], other, *shards[2:]])
    content = bytearray(files[0].path.read_bytes())
    content[-1] ^= 1
    files[0].path.write_bytes(content)
    with pytest.raises(IntegrityError, match=r"tp0.safetensors has the sha256 [0-9a-f]{64}, expected is"):
        read_shard(files[0].path, files[0].sha256)
