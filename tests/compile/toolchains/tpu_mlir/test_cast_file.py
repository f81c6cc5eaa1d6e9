"""Files that weights are cast into: what a kill leaves, and what the next call makes of it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Store
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_file
from fluxkiln.compile.toolchains.tpu_mlir.moulds import cast_part, make_mould
from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.fingerprint import digest_tensors, file_states
from fluxkiln.export.lora import fuse_lora, with_loras
from fluxkiln.files import FileState
from fluxkiln.progress import Silent
from tests.builds import altered
from tests.compile.bmodels import check_codes
from tests.export.loras import peft, write

pytestmark = pytest.mark.tpu_mlir
NAME = "blocks.bmodel"


class Told(Silent):
    """Remembers how each part was made; stops like Ctrl-C after `limit` of them."""

    def __init__(self, limit=None):
        self.limit, self.how = limit, {}

    def done(self, stage, what, how):
        if self.limit is not None and len(self.how) >= self.limit:
            raise KeyboardInterrupt
        self.how[what] = how.split(" in ")[0]


@pytest.fixture
def blocks(small_build, tmp_path):
    """A kiln whose store has the moulds of all blocks and nothing cast into them, and the blocks."""
    shared = small_build()
    parts = [part for part in shared.parts if part.kind in ("double", "single")]
    moulds = {kind: make_mould(*shared, make_template(*shared, kind, "onnx17")) for kind in ("double", "single")}
    whole, _ = cast_file(*shared, NAME, [cast_part(shared.plan, part, moulds[part.kind]) for part in parts], Silent())
    fresh = altered(replace(shared, cache=ActionCache(Store(shared.cache.store.root))), folder=tmp_path)
    for record in list(fresh.cache.records()):
        if record["stage"] in ("cast", "file"):
            fresh.cache.forget(record["key"])
    return fresh, [cast_part(fresh.plan, part, moulds[part.kind]) for part in parts], whole.blob


def test_an_interrupted_file_goes_on_where_it_was(blocks, tmp_path):
    small_build, parts, whole = blocks
    with pytest.raises(KeyboardInterrupt):
        cast_file(*small_build, NAME, parts, Told(limit=3), jobs=1)
    place = tmp_path / "casting" / NAME
    finished = len(place.with_name(f"{NAME}.journal").read_text().splitlines()) - 1
    assert 3 <= finished <= len(parts)
    told = Told()
    file, binaries = cast_file(*small_build, NAME, parts, told, jobs=2)
    assert file.blob == whole
    assert sorted(told.how.values()) == ["cast"] * (len(parts) - finished) + ["was finished before"] * finished
    assert not place.parent.exists()
    check_codes(small_build.cache.path(file.blob))
    codes = {net.name: net.check_code for net in read_bmodel(small_build.cache.path(file.blob)).nets}
    data = small_build.cache.path(file.blob).read_bytes()
    assert all(data[codes[b.net].start : codes[b.net].stop].hex() == b.digest.removeprefix("sha256:") for b in binaries)


@pytest.mark.parametrize("damage", ["region", "half a line", "another file", "no journal"])
def test_what_a_kill_left_is_not_trusted(blocks, tmp_path, damage):
    small_build, parts, whole = blocks
    with pytest.raises(KeyboardInterrupt):
        cast_file(*small_build, NAME, parts, Told(limit=2), jobs=1)
    place, journal = tmp_path / "casting" / NAME, tmp_path / "casting" / f"{NAME}.journal"
    lines = journal.read_text().splitlines()
    assert [json.loads(line)[0] for line in lines][:4] == ["file", "single_02", "single_01", "single_00"]
    finished = len(lines) - 1
    again = {"region": finished - 1, "half a line": finished - 1, "another file": 0, "no journal": 0}[damage]
    if damage == "region":
        (net,) = (net for net in read_bmodel(place).nets if net.name == "single_02")
        with place.open("r+b") as file:
            file.seek(net.coefficients.start + 100)
            file.write(b"\x55" * 8)
    elif damage == "half a line":
        journal.write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:9])
    elif damage == "another file":
        journal.write_text("\n".join([json.dumps(["file", "sha256:" + "0" * 64]), *lines[1:]]) + "\n")
    else:
        journal.unlink()
    told = Told()
    file, _ = cast_file(*small_build, NAME, parts, told)
    assert file.blob == whole
    assert list(told.how.values()).count("was finished before") == again


def test_a_shard_that_changes_ends_the_build(blocks):
    small_build, parts, _ = blocks
    shard = next(iter(small_build.checkpoint.states))
    states = {**small_build.checkpoint.states, shard: FileState(0, 0, 0, 0, 0)}
    changed = replace(small_build, checkpoint=replace(small_build.checkpoint, states=states))
    with pytest.raises(CheckpointError, match=r"changed while the build read it, and a build is of one checkpoint"):
        cast_file(*changed, NAME, parts, Silent())
    assert cast_file(*small_build, NAME, parts, Silent())[0].blob


def test_a_lora_casts_the_parts_that_it_changes(blocks, tmp_path):
    """Straight from the base checkpoint, with the bytes that the fused one gives; another strength casts them again."""
    small_build, parts, _ = blocks
    cast_file(*small_build, NAME, parts, Silent())
    layer = "single_transformer_blocks.1.proj_mlp"
    out, width = small_build.checkpoint.tensors["transformer"][f"{layer}.weight"].shape
    style = write(tmp_path / "style.safetensors", peft({f"{layer}.weight": (out, width)}, layer))

    def with_digests(checkpoint):
        digests = {name: digest_tensors(refs.values()) for name, refs in checkpoint.tensors.items()}
        return replace(checkpoint, digests=digests, states=file_states(checkpoint))

    def cast(checkpoint):
        told, changed = Told(), replace(small_build, checkpoint=with_digests(checkpoint))
        _, binaries = cast_file(*changed, NAME, parts, told)
        return {what for what, how in told.how.items() if how == "cast"}, {one.net: one.digest for one in binaries}

    plain, half, whole = (
        cast(with_loras(small_build.checkpoint, loras)) for loras in ((), ((style, 0.5),), ((style, 1.0),))
    )
    assert (plain[0], half[0], whole[0]) == (set(), {"single.01"}, {"single.01"})
    assert len({one[1]["single_01"] for one in (plain, half, whole)}) == 3
    assert plain[1] | {"single_01": half[1]["single_01"]} == half[1]
    fuse_lora(small_build.checkpoint.root, [(style, 0.5)], tmp_path / "fused")
    _, fused = cast(open_checkpoint(tmp_path / "fused"))
    assert fused == half[1]
    assert cast(with_loras(small_build.checkpoint, ((style, 0.5),)))[0] == set()
