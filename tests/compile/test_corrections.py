"""Methods that need more than codes, and weights that get none, in a bmodel: against the dequantized graph, the
compiler itself, and with what stands beside the codes spoilt.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.compile.plan import BundleFile, Made
from fluxkiln.compile.rungs import dequantized_rung
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir import cast as own_cast
from fluxkiln.compile.toolchains.tpu_mlir.cast import CAST_MEMORY, compare_stored
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
from fluxkiln.compile.toolchains.tpu_mlir.forms import Form, FormMaker, SlotRows
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould, prove_cast, prove_mould
from fluxkiln.compile.toolchains.tpu_mlir.rungs import check_binary, open_stored
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import TOOLCHAIN
from fluxkiln.compile.weights import part_packers, part_rounders, part_weights
from fluxkiln.errors import CompileError, SchemeError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.quantize.methods import svd
from fluxkiln.quantize.side_tensors import DOWN, RECIPROCALS, ROLES, UP, side_slot, split_slot
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes
from fluxkiln.verify.gates import first_bad_rung
from fluxkiln.verify.metrics import compare
from tests.builds import chip_ladder, opened_rungs
from tests.calibrated import NAME, one_part

SLOT = "attn.to_q.weight__t"
KEPT = "W4BF16,single.proj_*=BF16"
SHAPES = Shapes(height=32, width=32, tokens=16)


def template_of(small_build):
    return make_template(*small_build, small_build.parts[0].kind, "onnx17")


@pytest.mark.parametrize("scheme", ["W4BF16-svd-r8", "W4BF16-awq"])
def test_weights_are_packed_row_by_row_as_they_are_whole(small_build, calibrated, scheme):
    made = one_part(small_build, scheme)
    (part,) = made.parts
    template = template_of(made)
    weights = part_weights(*made, part, template)
    plain = weight_reader(bind_part(part, template.slots, made.checkpoint), made.checkpoint)
    for slot in (SLOT, "proj_out.weight__s1.256.768__t"):
        found = part_packers(*made, part)(slot, None)(plain(slot))
        whole = weights(slot)
        pieces = [weights.read_rows(slot, start, start + 32) for start in range(0, len(whole), 32)]
        assert np.concatenate(pieces).tobytes() == whole.tobytes()
        # the codes of a cast are those that the method was measured with
        maker = FormMaker(64, 4, part_rounders(*made, part))
        codes = maker.make(
            Form(slot, "codes"), SlotRows(whole.shape, lambda a, b, slot=slot: weights.read_rows(slot, a, b))
        )
        assert codes.tobytes() == found.packed.codes_OI.tobytes()
        down, up, reciprocals, _ = (weights.beside.get(side_slot(slot, role)) for role in ROLES)
        if reciprocals is None:
            assert down.view(np.uint16).tobytes() == found.beside.down.tobytes()
            assert up.view(np.uint16).tobytes() == found.beside.up.tobytes()
        else:
            np.testing.assert_array_equal(1 / reciprocals.astype(np.float32), found.beside.divisors)
    assert weights("proj_out.bias").tobytes() == plain("proj_out.bias").tobytes()


def test_what_is_dequantized_has_the_branch_that_was_stored(small_build, calibrated, monkeypatch):
    """Also where the search would end in other bits now, as with another number of threads."""
    made = one_part(small_build, "W4BF16-svd-r8")
    weights = part_weights(*made, made.parts[0], template_of(made))
    plain = weights.plain(SLOT)
    directions = svd._directions

    def others(matrix, rank):
        left, right = directions(matrix, rank)
        return -left, -right * 1.01

    monkeypatch.setattr(svd, "_directions", others)
    packer_of = part_packers(*made, made.parts[0])
    slots = {split_slot(slot)[0] for slot in weights.beside}
    assert any("__s1." in slot for slot in slots)
    for slot in slots:  # a cast makes its codes of the same
        found = packer_of(slot, None)(weights.plain(slot))
        down, up = (weights.beside[side_slot(slot, role)].tobytes() for role in (DOWN, UP))
        assert (found.beside.up.tobytes(), found.beside.down.tobytes()) == (up, down)
    up = weights.beside[side_slot(SLOT, UP)]
    again = svd.find_branch(plain, None, 8)
    assert again.up.tobytes() != up.tobytes(), "the control: a search of its own ends elsewhere"


def test_it_is_searched_once(small_build, calibrated):
    made = one_part(small_build, "W4BF16-svd-r8")
    template = template_of(made)
    first, second = (part_weights(*made, made.parts[0], template) for _ in range(2))
    assert made.cache.counts["correct"][1] <= 1 <= made.cache.counts["correct"][0]
    assert {slot: array.tobytes() for slot, array in first.beside.items()} == {
        slot: array.tobytes() for slot, array in second.beside.items()
    }
    with pytest.raises(SchemeError, match=r"rank 300: a matrix of \d+ x 256 has 1 to 256"):
        part_weights(*one_part(small_build, "W4BF16-svd-r300"), made.parts[0], template)


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("scheme", ["W4BF16-svd-r8", "W4BF16-awq", KEPT])
def test_the_chip_computes_what_is_dequantized(
    small_build, cast_alone, calibrated, tiny_recording, tmp_path, monkeypatch, scheme
):
    made = one_part(small_build, scheme, target="bm1684x")
    plain = one_part(small_build, "W4BF16", target="bm1684x")
    mould, binary = make_mould(*made, template_of(made)), cast_alone(made, NAME)
    facts, all_codes = mould.result.facts, make_mould(*plain, template_of(plain)).result.facts
    # norm.linear, which the compiler cuts in three where no branch is added to it, q, k and v; then proj_mlp, proj_out
    assert facts["quantized_matmuls"] == {"W4BF16-svd-r8": 1 + 3 + 5, "W4BF16-awq": 3 + 3 + 5, KEPT: 3 + 3}[scheme]
    assert (facts["quantized_weights"] < all_codes["quantized_weights"]) == (scheme == KEPT)
    assert facts["weight_bytes"] > all_codes["weight_bytes"]
    recording = tiny_recording("tiny-dev", "kl", SHAPES)
    inputs = recording.inputs(NAME, 0)
    base = inputs["hidden_states"]
    files = (BundleFile("x.bmodel", binary.blobs["bmodel"], (NAME,)),)
    with opened_rungs(made, (binary,), files, tmp_path) as rungs:
        out = {rung: runner(NAME, inputs)["hidden_states_out"] for rung, runner in rungs.items()}
        other = dequantized_rung(*plain)(NAME, inputs)["hidden_states_out"]
        for rung in ("interpreter", "simulator"):
            assert compare(out[rung], out["dequantized"], base).delta_cosine >= 0.999
            assert compare(out[rung], other, base).delta_cosine < 0.999
        ladder = chip_ladder()
        TOOLCHAIN.read_back(ladder, *made, Made((binary,), files))
        assert first_bad_rung(ladder.rows) == {}
        file, opened = made.cache.path(binary.blobs["bmodel"]), open_stored(*made, made.parts[0], inputs)
        found = check_binary(opened, *made, binary, file)
        assert found.culprit is None
        assert any(finding.value for finding in found.findings)
        if scheme == KEPT:
            return
        # the control: what stands beside the codes is right in size and wrong in place
        sound = part_weights(*made, made.parts[0], template_of(made))
        spoilt = _Spoilt(sound)
        monkeypatch.setattr(own_cast, "part_weights", lambda *_: spoilt)
        rungs["interpreter"].close()
        wrong = rungs["interpreter"](NAME, inputs)["hidden_states_out"]
        assert compare(wrong, out["dequantized"], base).delta_cosine < 0.999
    # and the same looked for inside the part: what is wrong stands beside this weight's codes
    culprit = check_binary(opened, *made, binary, file).culprit
    assert culprit is not None
    assert {split_slot(slot)[1] for slot in culprit.slots} == {""}
    found = CoefficientMap.from_json(json.loads(made.cache.path(mould.result.outputs["map"]).read_text()))
    differing = compare_stored(file, binary.net, found, spoilt, part_rounders(*made, made.parts[0]))
    assert {split_slot(slot)[1] for slot, shares in differing.items() if shares.any()} == spoilt.roles


class _Spoilt:
    """Weights in codes as they are; `up` and `down` of square matrices swapped, reciprocals shuffled."""

    def __init__(self, sound):
        self.sound = sound
        self.roles = {split_slot(slot)[1] for slot in sound.beside}

    def __call__(self, slot):
        return self.read_rows(slot, 0, None)

    def read_rows(self, slot, start, stop):
        base, role = split_slot(slot)
        beside = self.sound.beside
        if role == RECIPROCALS:
            return np.random.default_rng(0).permutation(beside[slot])[start:stop]
        if role:
            down, up, *_ = (beside.get(side_slot(base, role)) for role in ROLES)
            swapped = up.T if role == DOWN else down.T
            return (swapped if swapped.shape == beside[slot].shape else beside[slot])[start:stop]
        return self.sound(slot)[start:stop]


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("scheme", ["W4BF16-svd-r8", "W4BF16-awq", "W4BF16-rtn,single.proj_*=BF16"])
def test_the_compiler_makes_the_same_of_it(small_build, cast_and_direct, calibrated, scheme):
    """The proof of a cast, with the part's own weights and with others."""
    made = one_part(small_build, scheme, target="bm1684x")
    mould, cast, direct = cast_and_direct(made, NAME)
    assert prove_cast(cast, direct, *made, mould).made == "cast, compiled: identical"
    with pytest.raises(CompileError, match="weights differ from what the compiler makes"):
        prove_cast(replace(cast, digest="sha256:" + "0" * 64), direct, *made, mould)
    if scheme == "W4BF16-svd-r8":
        prove_mould(*made, template_of(made), mould)
    # what it costs is in the plan: the compiler's estimate, and the memory of the search
    jobs = {job.stage: job for job in TOOLCHAIN.jobs(*made, Settings("bm1684x"))}
    assert jobs["mould"].estimate_ms == mould.result.facts["estimate_ms"] > 0
    assert (jobs["cast"].memory_bytes > CAST_MEMORY) == (not made.plan.scheme(made.parts[0]).codes_only)
