"""A part of a finished build debugged from end to end, its bundle's own bytes included."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from fluxkiln.build.make import build, prepare
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import hash_span, read_bmodel
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import digest_file
from fluxkiln.settings import Settings
from fluxkiln.verify.debug import debug_part
from tests.hostile.forged import forge


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
    spoilt = Path(shutil.copytree(prepared.plan.bundle, tmp_path / "bundle"))
    (file,) = spoilt.glob("*.bmodel")
    net = next(net for net in read_bmodel(file).nets if "block_01" in net.name)
    place = net.coefficients.start + net.coefficients.size // 2
    data = bytearray(file.read_bytes())
    data[place] ^= 0x10
    file.unlink()  # a link to the store's
    file.write_bytes(data)
    elsewhere = replace(prepared, plan=replace(prepared.plan, folder=tmp_path))
    with pytest.raises(IntegrityError, match=rf"{file.name}: sha256:"):
        debug_part(elsewhere, "t5_block.01")
    # and all that tells of these bytes changed with them
    digest = hash_span(file, net.coefficients)
    data[net.check_code.start : net.check_code.stop] = digest
    file.write_bytes(data)

    def change(document):
        next(part for part in document["parts"] if part["net"] == net.name)["digest"] = f"sha256:{digest.hex()}"
        entry = next(entry for entry in document["files"] if entry["path"] == file.name)
        entry["sha256"] = digest_file(file)[0].removeprefix("sha256:")

    forge(spoilt, change)
    culprit = debug_part(elsewhere, "t5_block.01").culprit
    assert culprit.rung == "stored"
    assert len(culprit.slots) == 1
    assert culprit.slots[0] in culprit.remedy.cause
    assert 0 < culprit.finding.own < 1e-3
    assert debug_part(elsewhere, "t5_block.00").culprit is None


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
