"""The ladder of compiled parts, and what it must catch: each corruption at the rung it enters."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from fluxkiln.compile.plan import BundleFile, Made
from fluxkiln.compile.rungs import onnxruntime_rung
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould, prove_cast
from fluxkiln.compile.toolchains.tpu_mlir.rungs import read_back
from fluxkiln.compile.toolchains.tpu_mlir.shell import write_check_code
from fluxkiln.errors import CompileError, IntegrityError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.types import Shapes, find_part
from fluxkiln.verify.gates import first_bad_rung
from tests.builds import altered, chip_ladder, opened_rungs
from tests.compile.bmodels import check_codes

pytestmark = pytest.mark.tpu_mlir

NAME = "single.00"
OUTPUT = "hidden_states_out"


@pytest.fixture(scope="module")
def compared(small_build, cast_and_direct, cast_alone, tiny_checkpoint, tiny_recording, tmp_path_factory):
    """One block at every rung, and on the simulator in every spoilt form."""
    build = small_build()
    build = altered(build, parts=tuple(find_part(build.parts, name) for name in (NAME, "single.01")))
    folder = tmp_path_factory.mktemp("parity")
    recording = tiny_recording("tiny-dev", "kl", Shapes(height=32, width=32, tokens=16))
    template = make_template(*build, "single", "onnx17")
    mould, sound, direct = cast_and_direct(build, NAME)
    casts = (sound, cast_alone(build, "single.01"))
    inputs = recording.inputs(NAME, 0)
    spoilt = {
        "scale": double_one_scale(build, casts[0], mould, "proj_out"),
        "slot": cast_from_wrong_slot(build, casts[0], mould, template),
        "swapped": casts[1],
    }
    stale = folder / "stale.bmodel"
    data = bytearray(build.cache.path(spoilt["scale"].blobs["bmodel"]).read_bytes())
    span = read_bmodel(build.cache.path(casts[0].blobs["bmodel"])).nets[0].check_code
    data[span.start : span.stop] = build.cache.path(casts[0].blobs["bmodel"]).read_bytes()[span.start : span.stop]
    stale.write_bytes(data)
    caught = {}
    attempts = {
        "check_codes": lambda: check_codes(stale),
        "prove_cast": lambda: prove_cast(spoilt["scale"], direct, *build, mould),
    }
    for what, attempt in attempts.items():
        try:
            attempt()
        except (CompileError, IntegrityError) as error:
            caught[what] = type(error)
    made = {}
    for what, cast in {"sound": casts[0], **spoilt}.items():
        files = (BundleFile(f"{what}.bmodel", cast.blobs["bmodel"], (NAME,)),)
        only = altered(build, parts=build.parts[:1])
        binary = replace(
            cast, part=build.parts[0], net=read_bmodel(build.cache.path(cast.blobs["bmodel"])).nets[0].name
        )
        with opened_rungs(only, (binary,), files, folder / what) as rungs:
            names = rungs if what == "sound" else ("simulator",)
            made[what] = {rung: rungs[rung](NAME, inputs)[OUTPUT] for rung in names}
    other = altered(build, parts=(replace(build.parts[1], name=NAME),))  # called after the one, weights of the other
    made["onnxruntime swapped"] = {"onnxruntime": onnxruntime_rung(*other)(NAME, inputs)[OUTPUT]}
    return recording, made, caught


@pytest.mark.parametrize(("what", "slot"), [("sound", None), ("scale", "proj_out"), ("slot", ""), ("swapped", "")])
def test_stored_weights_are_the_checkpoints(small_build, cast_alone, what, slot):
    """One scale of one group doubled changes one byte or two: no output shows it, the bytes do."""
    base = small_build()
    part = find_part(base.parts, NAME)
    only = altered(base, parts=(part,))
    template = make_template(*only, "single", "onnx17")
    mould = make_mould(*only, template)
    sound = cast_alone(only, NAME)
    spoilt = {
        "sound": lambda: sound,
        "scale": lambda: double_one_scale(only, sound, mould, "proj_out"),
        "slot": lambda: cast_from_wrong_slot(only, sound, mould, template),
        "swapped": lambda: replace(
            cast_alone(altered(base, parts=(replace(find_part(base.parts, "single.01"), name=NAME),)), NAME), part=part
        ),
    }[what]()
    ladder = chip_ladder()
    read_back(ladder, *only, Made((spoilt,), (BundleFile("x.bmodel", spoilt.blobs["bmodel"], (NAME,)),)))
    if what == "sound":
        assert ladder.rows
        assert all(row.passed for row in ladder.rows)
    else:
        assert first_bad_rung(ladder.rows) == {NAME: "stored"}
        assert slot in ladder.rows[0].output


def compare(compared, **instead):
    """The ladder of the sound block, with some rungs replaced."""
    recording, made, _ = compared
    rungs = [(rung, instead.get(rung, array)) for rung, array in made["sound"].items()]
    ladder = chip_ladder()
    reference, base = recording.outputs(NAME, 0)[OUTPUT], recording.inputs(NAME, 0)["hidden_states"]
    shaped = [(rung, array.reshape(reference.shape)) for rung, array in rungs]
    ladder.compare(NAME, KINDS["single"], OUTPUT, 0, reference, base, shaped, "W4BF16")
    return ladder


def double_one_scale(small_build, cast, mould, slot):
    """The scale of one group of one row, in the bmodel; its check code is made right, so that only numbers differ."""
    found = CoefficientMap.from_json(json.loads(small_build.cache.path(mould.result.outputs["map"]).read_text()))
    place = next(p for p in found.binary if p.form.slot.startswith(slot) and p.form.name.startswith("scale"))
    data = bytearray(small_build.cache.path(cast.blobs["bmodel"]).read_bytes())
    (net,) = read_bmodel(small_build.cache.path(cast.blobs["bmodel"])).nets
    position = net.coefficients.start + place.offset
    bits = int.from_bytes(data[position : position + 2], "little")
    data[position : position + 2] = (bits + 0x80).to_bytes(2, "little")  # bfloat16: one more in the exponent
    code = hashlib.sha256(data[net.coefficients.start : net.coefficients.stop])
    data[net.check_code.start : net.check_code.stop] = code.digest()
    digest = f"sha256:{code.hexdigest()}"
    return replace(cast, blobs={**cast.blobs, "bmodel": small_build.cache.store.add_bytes(bytes(data))}, digest=digest)


def cast_from_wrong_slot(small_build, cast, mould, template):
    found = CoefficientMap.from_json(json.loads(small_build.cache.path(mould.result.outputs["map"]).read_text()))
    placements = list(found.binary)
    index = next(
        i for i, p in enumerate(placements) if p.form.slot.startswith("attn.to_v.weight") and p.form.name == "codes"
    )
    form = placements[index].form
    placements[index] = replace(placements[index], form=replace(form, slot=form.slot.replace("to_v", "to_k")))
    reader = weight_reader(bind_part(cast.part, template.slots, small_build.checkpoint), small_build.checkpoint)
    target = small_build.cache.store.root / "wrong.bmodel"
    small_build.cache.store.export(cast.blobs["bmodel"].digest, target)
    (net,) = read_bmodel(target).nets
    code = cast_region(target, net.coefficients, replace(found, binary=tuple(placements)), reader)
    write_check_code(target, net.name, code)
    return replace(cast, blobs={**cast.blobs, "bmodel": small_build.cache.store.add_file(target, move=True)})


def test_a_sound_block_passes_every_rung(compared):
    ladder = compare(compared)
    assert [row.rung for row in ladder.rows] == ["patched", "onnxruntime", "dequantized", "interpreter", "simulator"]
    assert first_bad_rung(ladder.rows) == {}
    quantization = next(row for row in ladder.rows if row.rung == "dequantized").vs_reference
    assert 0.01 < quantization.delta_relative_l2 < 0.15


def test_swapped_weights_fail_at_onnxruntime(compared):
    _, made, _ = compared
    ladder = compare(compared, onnxruntime=made["onnxruntime swapped"]["onnxruntime"])
    assert first_bad_rung(ladder.rows) == {NAME: "onnxruntime"}


@pytest.mark.parametrize("what", ["swapped", "slot"])
def test_a_corrupted_binary_fails_at_the_simulator(compared, what):
    _, made, _ = compared
    ladder = compare(compared, simulator=made[what]["simulator"])
    assert first_bad_rung(ladder.rows) == {NAME: "simulator"}


def test_one_doubled_scale_is_refused_by_proof_and_codes(compared):
    """One scale of one group is 1 of 20 of one channel's inputs: it shows in the worst channel, twice its noise, but a
    bound that low would not hold for every sound block. Bytes are what it is caught by."""
    _, made, caught = compared
    sound, spoilt = (
        compare(compared, simulator=made[what]["simulator"]).rows[-1].vs_previous for what in ("sound", "scale")
    )
    assert spoilt.worst_channel > 1.5 * sound.worst_channel
    assert caught == {"check_codes": IntegrityError, "prove_cast": CompileError}
