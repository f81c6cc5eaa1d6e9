"""A part of a finished build debugged from end to end, its bundle's own bytes included."""

from __future__ import annotations

from dataclasses import replace

import pytest

from fluxkiln.build.make import build, prepare
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.errors import UsageError
from fluxkiln.settings import Settings
from fluxkiln.verify.debug import debug_part


@pytest.fixture(scope="module")
def prepared(small_build, tiny_checkpoint):
    """A finished build of T5, without verification, in the store that the tests share."""
    made = small_build()
    root = made.cache.store.root
    settings = Settings(
        "bm1684x", str(tiny_checkpoint().root), scheme="W4BF16", components=("text_encoder_2",), verify=False,
        build_dir=root.parent / "debugged", store=root,
    )  # fmt: skip
    build(settings)
    return prepare(settings)


@pytest.fixture(scope="module")
def sound(prepared):
    return debug_part(prepared, "t5_block.01")


@pytest.mark.tpu_mlir
def test_a_sound_part_at_every_rung(sound):
    assert sound.culprit is None
    assert [rung.rung for rung in sound.rungs] == ["onnxruntime", "dequantized", "interpreter", "stored"]
    assert all(len(rung.findings) > 5 for rung in sound.rungs)
    assert sound.to_json()["culprit"] is None
    assert (sound.step, sound.facts["shapes"]) == (-1, "32x32, 16 tokens")


@pytest.mark.tpu_mlir
def test_bytes_of_the_bundle_that_are_not_the_checkpoint_s(prepared, sound, tmp_path):
    (file,) = prepared.plan.bundle.glob("*.bmodel")
    spoilt = tmp_path / "bundle"
    spoilt.mkdir()
    data = bytearray(file.read_bytes())
    net = next(net for net in read_bmodel(file).nets if "block_01" in net.name)
    place = net.coefficients.start + net.coefficients.size // 2
    data[place] ^= 0x10
    (spoilt / file.name).write_bytes(data)
    (spoilt / "manifest.json").write_bytes((prepared.plan.bundle / "manifest.json").read_bytes())
    culprit = debug_part(replace(prepared, plan=replace(prepared.plan, folder=tmp_path)), "t5_block.01").culprit
    assert culprit.rung == "stored"
    assert len(culprit.slots) == 1
    assert culprit.slots[0] in culprit.remedy.cause
    assert 0 < culprit.finding.own < 1e-3
    assert debug_part(replace(prepared, plan=replace(prepared.plan, folder=tmp_path)), "t5_block.00").culprit is None


@pytest.mark.tpu_mlir
def test_the_lowest_bad_rung_has_the_culprit(sound):
    bottom, *between, top = sound.rungs
    low, high = object(), object()
    both = (replace(bottom, culprit=low), *between, replace(top, culprit=high))
    assert replace(sound, rungs=both).culprit is low
    assert replace(sound, rungs=(bottom, *between, both[-1])).culprit is high


@pytest.mark.tpu_mlir
def test_what_cannot_be_debugged_is_said(prepared):
    with pytest.raises(UsageError, match="no part is called 'clip'; this model has t5_embed"):
        debug_part(prepared, "clip")
