"""Moulds: what is learnt from one compile with random weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import coefficients as mould_module
from fluxkiln.compile.toolchains.tpu_mlir import moulds as moulds_module
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import (
    CoefficientMap,
    Placement,
    Probe,
    learn_map,
    probe_reader,
    probe_weight,
)
from fluxkiln.compile.toolchains.tpu_mlir.jobs import compile_parts
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould, mould_action, prove_cast
from fluxkiln.errors import CompileError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings
from fluxkiln.types import TensorSpec, find_part
from tests.builds import altered

SLOTS = (TensorSpec("a.weight__t", (64, 32)), TensorSpec("a.bias", (32,)), TensorSpec("norm.weight", (64,)))


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("spec", SLOTS, ids=lambda spec: spec.name)
def test_probe_weights_are_random_and_repeatable(spec):
    weight = probe_reader(SLOTS)(spec.name)
    assert weight.tobytes() == probe_reader(SLOTS[::-1])(spec.name).tobytes()
    assert weight.tobytes() != probe_reader(SLOTS, seed=1)(spec.name).tobytes()
    assert len(set(weight.reshape(-1)[:8].tolist())) > 4


def test_probe_weights_are_sized_like_weights():
    assert probe_weight(SLOTS[0]).shape == (32, 64)  # torch's layout
    assert float(probe_weight(SLOTS[0]).astype(np.float32).std()) == pytest.approx(1 / 8, rel=0.1)
    assert float(probe_weight(SLOTS[2]).astype(np.float32).mean()) == pytest.approx(1, abs=0.1)


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("scheme", ["W4BF16", "BF16"])
def test_map_covers_every_byte(small_build, cast_and_direct, scheme):
    build = small_build(scheme=scheme)
    mould, *_ = cast_and_direct(build, "single.02")
    text = build.cache.path(mould.result.outputs["map"]).read_text()
    found = CoefficientMap.from_json(json.loads(text))
    assert found.to_json() == CoefficientMap.from_json(json.loads(json.dumps(found.to_json()))).to_json()
    (net,) = read_bmodel(build.cache.path(mould.result.outputs["shell"])).nets
    assert sorted(placement.offset for placement in found.binary) == sorted(entry.start for entry in net.entries)
    template = make_template(*build, "single", "onnx17")
    assert {placement.form.slot for placement in found.binary} == {spec.name for spec in template.slots}
    names = {placement.form.name.split("_")[0] for placement in found.binary}
    assert ({"codes", "scale", "zero"} <= names) == (scheme == "W4BF16")


@pytest.mark.tpu_mlir
def test_weights_of_another_probe_match_nothing(compile_kind, tiny_template):
    bmodel = compile_kind("single", "W4BF16", 0)[0].bmodel
    slots = tiny_template("single", "onnx17").slots
    names = [spec.name for spec in slots]
    assert learn_map(bmodel, {}, names, probe_reader(slots), 64, 4).binary
    refused = r"single\w*: \d+ bytes at .* match no probe weight.*compiled one by one"
    with pytest.raises(CompileError, match=refused):
        learn_map(bmodel, {}, names, probe_reader(slots, seed=1), 64, 4)
    with pytest.raises(CompileError, match=refused):
        learn_map(bmodel, {}, names[1:], probe_reader(slots), 64, 4)
    with pytest.raises(CompileError, match="interpreter array stray of its weights match no probe weight"):
        learn_map(bmodel, {"stray": np.arange(99, dtype=np.float32)}, names, probe_reader(slots), 64, 4)


@pytest.fixture
def learn_head(compile_kind, tiny_template):
    """Learn the head's map: the frequencies of its time embedding are constants of the graph."""
    mould, weights = compile_kind("head", "BF16", 0)
    names = [spec.name for spec in tiny_template("head", "onnx17").slots]

    def learn(seed=1, without=(), read=weights, second=lambda read: read):
        other, other_weights = compile_kind("head", "BF16", seed)

        def again():
            with np.load(other.weights) as arrays:
                return Probe(other.bmodel, dict(arrays), second(other_weights))

        with np.load(mould.weights) as arrays:
            kept = [name for name in names if name not in without]
            return learn_map(mould.bmodel, arrays, kept, read, 0, 0, again)

    return learn


@pytest.mark.tpu_mlir
def test_constants_are_what_two_compiles_have_in_common(learn_head):
    found = learn_head()
    (frequencies,) = found.constants.values()
    expected = np.exp(-np.log(10000) * np.arange(128) / 128)
    np.testing.assert_allclose(np.frombuffer(frequencies, np.float32), expected, rtol=1e-6)
    places = [placement for placement in found.binary if placement.form.name == "constant"]
    assert len(places) == 2  # of the time and of the guidance
    assert {placement.form.slot for placement in places} == set(found.constants)
    assert set(found.shapes).isdisjoint(found.constants)
    assert CoefficientMap.from_json(json.loads(json.dumps(found.to_json()))) == found


@pytest.mark.tpu_mlir
def test_what_changes_with_the_weights_is_no_constant(learn_head, monkeypatch):
    with pytest.raises(CompileError, match="match no probe weight, but change with them, so nothing can be cast"):
        learn_head(without=["x_embedder.bias"])
    # compiled twice with the same weights, everything would look like one
    with pytest.raises(CompileError, match="compiled twice with the same probe weights; give them two seeds"):
        learn_head(seed=0, without=["x_embedder.bias"])
    monkeypatch.setattr(mould_module, "_MAX_CONSTANT_BYTES", 100)
    with pytest.raises(CompileError, match=r"\d+ bytes of its weights, compressed, are equal for all probe weights"):
        learn_head()


@pytest.mark.tpu_mlir
def test_map_is_verified_against_the_second_compile(learn_head):
    """A range that matches a slot by accident would give every cast wrong weights."""
    names = {"x_embedder.bias": "context_embedder.bias"}
    with pytest.raises(CompileError, match=r"match x_embedder\.bias in one compile and not in another"):
        learn_head(second=lambda read: lambda slot: read(names.get(slot, slot)))


@pytest.mark.tpu_mlir
def test_two_slots_with_one_weight_cannot_be_told_apart(compile_matmul):
    _, compiled, weight = compile_matmul()
    assert learn_map(compiled.bmodel, {}, ["one"], lambda slot: weight, 0, 0).binary
    with pytest.raises(CompileError, match=r"\d+ bytes at 0x0 of its weights match slots one and two; compile it with"):
        learn_map(compiled.bmodel, {}, ["one", "two"], lambda slot: weight, 0, 0)


@pytest.mark.tpu_mlir
def test_kind_without_a_map_is_compiled_one_by_one(small_build, monkeypatch):
    """No form of tables is known, say: the build goes on without a mould for them, and says why."""
    build = altered(small_build(), parts=(find_part(small_build().parts, "t5_embed"),))
    monkeypatch.setattr(mould_module, "candidates", lambda *_: iter(()))
    monkeypatch.setattr(moulds_module, "mould_action", fresh_action)
    progress = Notes()
    (made,), proofs = compile_parts(*build, Settings("bm1684x", jobs=2), progress)
    assert (made.made, "map" in made.blobs, proofs) == ("compiled", False, [])
    (note,) = progress.notes
    assert note.startswith("t5_embed: mould t5_embed_00: ")
    assert note.endswith("its parts are compiled one by one")
    # the reason is remembered: nothing is compiled to find it again
    again = make_mould(*build, make_template(*build, "t5_embed", "onnx17"))
    assert again.result.hit
    assert not again.castable


@pytest.mark.tpu_mlir
def test_coefficient_of_the_wrong_slot_is_not_proven(small_build, cast_and_direct, tmp_path):
    build = small_build()
    mould, cast, direct = cast_and_direct(build, "double.01")
    assert prove_cast(cast, direct, *build, mould).made == "cast, compiled: identical"
    found = CoefficientMap.from_json(json.loads(build.cache.path(mould.result.outputs["map"]).read_text()))
    wrong = swap_slot(found, "attn.to_q.weight", "attn.to_k.weight")
    template = make_template(*build, "double", "onnx17")
    reader = weight_reader(bind_part(direct.part, template.slots, build.checkpoint), build.checkpoint)
    target = tmp_path / "wrong.bmodel"
    shutil.copyfile(build.cache.path(cast.blobs["bmodel"]), target)
    (net,) = read_bmodel(target).nets
    code = cast_region(target, net.coefficients, wrong, reader)
    with pytest.raises(CompileError, match=r"double\.01: its weights differ from what the compiler makes of the same"):
        prove_cast(replace(cast, digest=f"sha256:{code.hex()}"), direct, *build, mould)
    shell = make_other_shell(build, cast, tmp_path)
    other = replace(cast, digest=f"sha256:{code.hex()}", blobs={**cast.blobs, "shell": shell})
    with pytest.raises(CompileError, match=r"double\.01: its weights and instructions differ"):
        prove_cast(other, direct, *build, mould)


def make_other_shell(small_build, cast, folder):
    """The part's shell with one bit of its instructions changed."""
    target = folder / "other.shell"
    shutil.copyfile(small_build.cache.path(cast.blobs["shell"]), target)
    data = bytearray(target.read_bytes())
    data[-5000] ^= 1
    target.write_bytes(data)
    return small_build.cache.store.add_file(target)


def fresh_action(checkpoint, plan, template):
    """A mould that no other test makes."""
    return replace(mould_action(checkpoint, plan, template), code_version="sha256:" + "0" * 64)


def swap_slot(found, slot, other):
    """The map with one entry of `slot` (its codes) filled from `other`."""
    placements = list(found.binary)
    index = next(
        i for i, placement in enumerate(placements)
        if placement.form.slot.startswith(slot) and placement.form.name == "codes"
    )  # fmt: skip
    form = placements[index].form
    placements[index] = Placement(replace(form, slot=form.slot.replace(slot, other)), placements[index].offset)
    return replace(found, binary=tuple(placements))
