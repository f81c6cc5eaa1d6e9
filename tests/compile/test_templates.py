"""What a change makes anew, and what it leaves alone."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.compile import templates
from fluxkiln.compile.templates import make_template, net_name, template_action
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_file
from fluxkiln.compile.toolchains.tpu_mlir.moulds import cast_part, compile_memory, make_mould, mould_action, proof_part
from fluxkiln.patches.flux1.kinds import list_parts
from fluxkiln.progress import Silent
from fluxkiln.types import find_part
from tests.builds import altered

CAST_KINDS = ("double", "single", "tail")


def cast_all(small_build):
    """Blocks and tail of the transformer in one file, by name."""
    parts = [part for part in small_build.parts if part.kind in CAST_KINDS]
    moulds = {kind: make_mould(*small_build, make_template(*small_build, kind, "onnx17")) for kind in CAST_KINDS}
    file, binaries = cast_file(
        *small_build, "x.bmodel", [cast_part(small_build.plan, p, moulds[p.kind]) for p in parts], Silent()
    )
    assert file.parts == tuple(part.name for part in parts)
    return {binary.part.name: binary for binary in binaries}


def misses(small_build):
    return {stage: count for stage, (_, count) in small_build.cache.counts.items()}


@pytest.mark.tpu_mlir
def test_another_scheme_uses_every_template_again(small_build):
    first = small_build(scheme="W4BF16")
    for kind in first.plan.kinds():
        make_template(*first, kind, "onnx17")
    for scheme in ("BF16", "F32", "W4BF16-g128", "W8BF16,tail=F16"):
        other = small_build(scheme=scheme)
        for kind in other.plan.kinds():
            make_template(*other, kind, "onnx17")
        assert other.cache.counts == {"template": [len(other.plan.kinds()), 0]}


@pytest.mark.tpu_mlir
def test_another_scheme_is_another_mould(small_build):
    """The control: what does depend on the scheme is not taken from the store."""
    first, other = small_build(scheme="W4BF16"), small_build(scheme="BF16")
    template = make_template(*first, "single", "onnx17")
    assert (
        mould_action(first.checkpoint, first.plan, template).key
        != mould_action(other.checkpoint, other.plan, template).key
    )
    assert (
        mould_action(first.checkpoint, first.plan, template).key
        == mould_action(small_build(scheme="W4BF16").checkpoint, small_build(scheme="W4BF16").plan, template).key
    )


@pytest.mark.tpu_mlir
def test_one_changed_tensor_recasts_one_part(small_build, tiny_checkpoint, tmp_path):
    before = cast_all(small_build())
    copy = tmp_path / "tiny-dev"
    shutil.copytree(tiny_checkpoint().root, copy)
    ref = tiny_checkpoint().tensors["transformer"]["single_transformer_blocks.1.attn.to_q.weight"]
    shard = copy / ref.file.relative_to(tiny_checkpoint().root)
    data = bytearray(shard.read_bytes())
    data[ref.offset : ref.offset + 128] = np.full(64, 0x3F00, "<u2").tobytes()  # the first group: all 0.5
    shard.chmod(0o644)
    shard.write_bytes(data)
    changed = small_build(copy)
    after = cast_all(changed)
    assert misses(changed) == {"template": 0, "mould": 0, "combine": 0, "cast": 1, "file": 1}
    assert {name for name in before if before[name].digest != after[name].digest} == {"single.01"}
    # and again: nothing is left to do
    again = small_build(copy)
    cast_all(again)
    assert misses(again) == {"template": 0, "mould": 0, "combine": 0, "cast": 0, "file": 0}


@pytest.mark.tpu_mlir
def test_changed_code_makes_templates_stale(small_build, monkeypatch):
    """Which code that is: `tests/artifacts/test_code.py`."""
    build = small_build()
    keys = {kind: template_action(build.checkpoint, build.plan, kind, "onnx17").key for kind in build.plan.kinds()}
    monkeypatch.setattr(templates, "code_version", lambda *_, **__: "sha256:" + "0" * 64)
    for kind in build.plan.kinds():
        stale = template_action(build.checkpoint, build.plan, kind, "onnx17")
        assert stale.key != keys[kind]
        assert build.cache.lookup(stale.key) is None


@pytest.mark.tpu_mlir
def test_depth_and_seed_share_templates_and_shapes_do_not(small_build):
    build = small_build()
    key = template_action(build.checkpoint, build.plan, "single", "onnx17").key
    configs = dict(build.checkpoint.configs)
    deeper = replace(build, checkpoint=replace(
        build.checkpoint, configs={**configs, "transformer": {**configs["transformer"], "num_single_layers": 38}}
    ))  # fmt: skip
    assert template_action(deeper.checkpoint, deeper.plan, "single", "onnx17").key == key
    other_shapes = altered(build, shapes=replace(build.plan.shapes, width=48))
    assert template_action(other_shapes.checkpoint, other_shapes.plan, "single", "onnx17").key != key
    assert template_action(build.checkpoint, build.plan, "single", "onnx23").key != key


def test_proof_is_chosen_by_seed(tiny_checkpoint):
    parts = [part for part in list_parts(tiny_checkpoint().configs) if part.kind == "single"]
    chosen = [proof_part(parts, seed).name for seed in range(20)]
    assert chosen == [proof_part(parts, seed).name for seed in range(20)]
    assert set(chosen) == {part.name for part in parts}


def test_net_names_are_as_long_as_the_moulds(tiny_checkpoint):
    parts = list_parts(tiny_checkpoint().configs)
    names = [net_name(part) for part in parts]
    assert len(set(names)) == len(names)
    kinds = {kind: {len(net_name(part)) for part in parts if part.kind == kind} for kind in {p.kind for p in parts}}
    assert all(len(lengths) == 1 for lengths in kinds.values())
    assert net_name(find_part(parts, "double.01")) == "double_01"


def test_memory_grows_with_the_weights():
    assert 1 << 28 < compile_memory(0) < compile_memory(1_000_000) < compile_memory(100_000_000)
    assert compile_memory(100_000_000) > 4 * 100_000_000
