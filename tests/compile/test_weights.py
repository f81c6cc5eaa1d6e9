"""A scheme's method reaches the chip: it is in the cast, its key, the reference and the interpreter, not in a mould."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import pytest

from fluxkiln.build.calibration import calibrate
from fluxkiln.build.finish import build_action
from fluxkiln.build.make import prepare
from fluxkiln.compile.plan import BundleFile, Made
from fluxkiln.compile.rungs import dequantized_rung
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel
from fluxkiln.compile.toolchains.tpu_mlir.cast import compare_stored
from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
from fluxkiln.compile.toolchains.tpu_mlir.forms import FormMaker
from fluxkiln.compile.toolchains.tpu_mlir.moulds import make_mould, mould_action
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import TOOLCHAIN
from fluxkiln.compile.weights import (
    check_methods,
    find_calibration,
    part_rounders,
    rounding_key,
)
from fluxkiln.errors import CheckpointError, SchemeError
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.progress import Laps, Silent
from fluxkiln.quantize.calibration import Sums, open_calibration
from fluxkiln.quantize.rounders import as_compiler
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.quantize.sizes import count_sizes
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes
from fluxkiln.verify.gates import first_bad_rung
from fluxkiln.verify.metrics import compare
from tests.builds import chip_ladder, opened_rungs
from tests.calibrated import COMPONENT, NAME, one_part
from tests.quantize.weights import pack_matrix

SLOT = "attn.to_q.weight__t"


def packed_by(small_build, slot=SLOT):
    """The codes that a cast of the kiln's part makes of a slot."""
    (part,) = small_build.parts
    reader = weight_reader(
        bind_part(part, make_template(*small_build, part.kind, "onnx17").slots, small_build.checkpoint),
        small_build.checkpoint,
    )
    weight = reader(slot)
    from fluxkiln.compile.toolchains.tpu_mlir.forms import Form, SlotRows

    maker = FormMaker(64, 4, part_rounders(*small_build, part))
    return weight, maker.make(Form(slot, "codes"), SlotRows(weight.shape, lambda start, stop: weight[start:stop]))


def test_a_cast_rounds_as_the_scheme_says(small_build, calibrated):
    codes = {}
    for scheme in ("W4BF16-rtn", "W4BF16", "W4BF16-gptq"):
        weight, made = packed_by(one_part(small_build, scheme))
        codes[scheme] = made.tobytes()
    assert codes["W4BF16-rtn"] == pack_matrix(weight, parse_scheme("W4BF16-rtn")).codes_OI.tobytes()
    assert codes["W4BF16"] == pack_matrix(weight, parse_scheme("W4BF16-ls")).codes_OI.tobytes()
    name = "single_transformer_blocks.0.attn.to_q.weight"
    known = calibrated.statistics(COMPONENT, name, weight.shape[1])
    assert codes["W4BF16-gptq"] == pack_matrix(weight, parse_scheme("W4BF16-gptq"), known).codes_OI.tobytes()
    assert len(set(codes.values())) == 3


def test_another_calibration_is_another_build(tiny_checkpoint, tmp_path):
    """A build that is finished is not the one asked for once its checkpoint has been calibrated again."""
    settings = Settings("cpu", str(tiny_checkpoint().root), steps=1, components=(COMPONENT,), build_dir=tmp_path)
    keys = {}
    for prompt in ("", "a kiln", "a river"):
        if prompt:
            calibrate(settings, (prompt,))
        for scheme in ("W4BF16-gptq", "W4BF16"):
            keys[prompt, scheme] = build_action(prepare(replace(settings, scheme=scheme), Silent())).key
    assert len({key for (_, scheme), key in keys.items() if scheme == "W4BF16-gptq"}) == 3
    assert len({key for (_, scheme), key in keys.items() if scheme == "W4BF16"}) == 1


def test_slices_of_a_weight_get_the_statistics_of_their_channels(small_build, calibrated):
    """proj_out is used in slices along its input: the codes are those of the slice with its own channels' moments."""
    made = one_part(small_build, "W4BF16-gptq")
    slots = [s.name for s in make_template(*made, "single", "onnx17").slots if s.name.startswith("proj_out.weight")]
    assert len(slots) > 1
    full = calibrated.statistics(COMPONENT, "single_transformer_blocks.0.proj_out.weight", 1280)
    at = 0
    for slot in sorted(slots, key=lambda slot: _first_column(made, slot)):
        weight, codes = packed_by(made, slot)
        at = _first_column(made, slot)
        known = full.columns(at, at + weight.shape[1])
        assert codes.tobytes() == pack_matrix(weight, parse_scheme("W4BF16-gptq"), known).codes_OI.tobytes()


def _first_column(small_build, slot):
    (part,) = small_build.parts
    binding = bind_part(part, make_template(*small_build, part.kind, "onnx17").slots, small_build.checkpoint)
    (bound,) = (one for one in binding.slots if one.slot == slot)
    return sum(step.start for step in bound.transforms if step.op == "slice" and step.dim == 1)


def test_methods_are_in_the_key_of_a_cast_and_not_of_a_mould(small_build, calibrated):
    keys, moulds = {}, set()
    for scheme in ("W4BF16-rtn", "W4BF16", "W4BF16-mse", "W4BF16-mse-sym", "W4BF16-gptq"):
        made = one_part(small_build, scheme)
        keys[scheme] = json.dumps(rounding_key(*made, made.parts[0]), sort_keys=True)
        moulds.add(mould_action(made.checkpoint, made.plan, make_template(*made, "single", "onnx17")).key)
    assert len(set(keys.values())) == len(keys)
    assert len(moulds) == 1
    # what needs more than codes has a mould for each form of that, and the rank is one
    for scheme in ("W4BF16-awq", "W4BF16-svd", "W4BF16-svd-r8", "W4BF16,single.proj_out=BF16"):
        made = one_part(small_build, scheme)
        keys[scheme] = json.dumps(rounding_key(*made, made.parts[0]), sort_keys=True)
        moulds.add(mould_action(made.checkpoint, made.plan, make_template(*made, "single", "onnx17")).key)
    assert len(moulds) == 5
    assert len(set(keys.values())) == len(keys) - 1  # the last one rounds as W4BF16 does
    assert calibrated.digest in keys["W4BF16-gptq"]


def test_what_cannot_be_had_is_refused_before_anything_is_compiled(small_build, calibrated):
    def of_others(scheme):
        made = one_part(small_build, scheme)
        return replace(made, checkpoint=replace(made.checkpoint, digests={COMPONENT: {"x": "sha256:0"}}))

    check_methods(*one_part(small_build, "W4BF16-gptq"))
    with pytest.raises(SchemeError, match=r"needs calibration, and the store has none for the transformer"):
        check_methods(*of_others("W4BF16-gptq"))
    check_methods(*one_part(small_build, "W4BF16-awq"))
    with pytest.raises(SchemeError, match=r"stored as W4BF16-svd-r8, which needs calibration"):
        check_methods(*of_others("W4BF16-svd-r8"))
    with pytest.raises(SchemeError, match=r"was made with weights .* of transformer, this checkpoint's are"):
        calibrated.check_checkpoint(COMPONENT, "sha256:" + "0" * 64)
    made = one_part(small_build, "W4BF16-gptq")
    assert find_calibration(made.checkpoint, made.cache, COMPONENT) == calibrated


def test_sums_are_means_and_layers_share_inputs(tmp_path):
    import torch

    first, second = torch.randn(3, 5, 96), torch.randn(2, 96)
    with Sums(tmp_path / "c", 64, 3) as sums:
        sums.add("t", "q", first, first[..., :7])
        sums.add("t", "k", first, first[..., :8])  # the same tensor
        sums.add("t", "o", second, second)
        sums.add("t", "q", first * 2, -2 * first[..., :7])
        sums.finish({"components": {"t": "sha256:1"}, "facts": {}})
    found = open_calibration(tmp_path / "c", "sha256:2")
    assert found.matrices["t"] == {"q": ("t.q", 30), "k": ("t.q", 30), "o": ("t.o", 2)}
    rows = torch.cat([first.reshape(-1, 96), 2 * first.reshape(-1, 96)]).numpy()
    known = found.statistics("t", "k", 96)
    assert [len(block) for block in known.blocks] == [64, 32]
    np.testing.assert_allclose(known.diagonal, np.square(rows).mean(0), rtol=1e-4)
    np.testing.assert_allclose(known.blocks[1], (rows.T @ rows / 30)[64:, 64:], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(known.peaks, np.abs(rows).mean(0), rtol=1e-4)
    np.testing.assert_allclose(known.sizes, count_sizes(rows) / 30, rtol=1e-6)
    np.testing.assert_array_equal(found.outputs("t", "q"), np.abs(rows).max(0)[:7])
    with pytest.raises(SchemeError, match="says nothing of v of t"):
        found.statistics("t", "v", 96)
    with pytest.raises(SchemeError, match="is for 96 input channels, the weight has 64"):
        found.statistics("t", "q", 64)


def test_inputs_that_overflow_are_refused(tmp_path):
    import torch

    with Sums(tmp_path / "c", 0, 1) as sums:
        sums.add("t", "q", torch.tensor([[1.0, float("nan")]]), torch.ones(1, 1))
        with pytest.raises(CheckpointError, match=r"the inputs of t\.q are not finite"):
            sums.finish({})


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("scheme", ["W4BF16", "W4BF16-gptq"])
def test_the_chip_multiplies_with_these_codes(small_build, cast_alone, calibrated, tiny_recording, tmp_path, scheme):
    """Simulator against the dequantized graph: what is left is BF16 arithmetic. The control: the compiler's codes."""
    made = one_part(small_build, scheme, target="bm1684x")
    (part,) = made.parts
    template = make_template(*made, part.kind, "onnx17")
    mould, binary = make_mould(*made, template), cast_alone(made, NAME)
    assert mould.result.facts["quantized_matmuls"] > 0
    recording = tiny_recording("tiny-dev", "kl", Shapes(height=32, width=32, tokens=16))
    inputs, base = recording.inputs(NAME, 0), recording.inputs(NAME, 0)["hidden_states"]
    files = (BundleFile("x.bmodel", binary.blobs["bmodel"], (NAME,)),)
    with opened_rungs(made, (binary,), files, tmp_path) as rungs:
        out = {
            rung: rungs[rung](NAME, inputs)["hidden_states_out"] for rung in ("dequantized", "interpreter", "simulator")
        }
    rtn = one_part(small_build, "W4BF16-rtn", target="bm1684x")
    other = dequantized_rung(*rtn)(NAME, inputs)["hidden_states_out"]
    for rung in ("interpreter", "simulator"):
        assert compare(out[rung], out["dequantized"], base).delta_cosine >= 0.999
        assert compare(out[rung], other, base).delta_cosine < 0.999
    # and byte by byte: the codes are this method's, and not the compiler's
    reader = weight_reader(bind_part(part, template.slots, made.checkpoint), made.checkpoint)
    found = CoefficientMap.from_json(json.loads(made.cache.path(mould.result.outputs["map"]).read_text()))
    path = made.cache.path(binary.blobs["bmodel"])
    same = compare_stored(path, binary.net, found, reader, part_rounders(*made, part))
    assert not any(share.any() for share in same.values())
    wrong = compare_stored(path, binary.net, found, reader, as_compiler)
    assert wrong[SLOT].max() > 0.01


@pytest.mark.tpu_mlir
@pytest.mark.parametrize("what", ["nibbles", "zero point", "scales"])
def test_wrong_bytes_of_one_group_miss_the_stored_gate(small_build, cast_alone, tmp_path, what):
    made = one_part(small_build, "W4BF16", target="bm1684x")
    (part,) = made.parts
    mould, binary = make_mould(*made, make_template(*made, part.kind, "onnx17")), cast_alone(made, NAME)
    found = CoefficientMap.from_json(json.loads(made.cache.path(mould.result.outputs["map"]).read_text()))
    (net,) = read_bmodel(made.cache.path(binary.blobs["bmodel"])).nets
    wanted = {"nibbles": "codes", "zero point": "zero", "scales": "scale"}[what]
    place = next(p for p in found.binary if p.form.slot == SLOT and p.form.name.startswith(wanted))
    data = bytearray(made.cache.path(binary.blobs["bmodel"]).read_bytes())
    at = net.coefficients.start + place.offset
    if what == "nibbles":
        data[at : at + 32] = bytes((byte >> 4) | (byte & 15) << 4 for byte in data[at : at + 32])
    elif what == "zero point":
        data[at] ^= 1
    else:
        data[at : at + 4] = data[at + 2 : at + 4] + data[at : at + 2]
    spoilt = tmp_path / "spoilt.bmodel"
    spoilt.write_bytes(data)
    ladder = chip_ladder()
    files = (BundleFile("x.bmodel", made.cache.store.add_file(spoilt), (NAME,)),)
    TOOLCHAIN.read_back(ladder, *made, Made((binary,), files))
    assert first_bad_rung(ladder.rows) == {NAME: "stored"}
    assert SLOT in ladder.rows[0].output


@pytest.mark.parametrize("method", ["awq", "svd", "svd-r8", "gptq", "svd,single.proj_*=BF16"])
def test_onnx_runtime_runs_what_is_dequantized(small_build, calibrated, tiny_recording, tmp_path, method):
    """The bundle's graph against its reference: codes, channel scales and low-rank branches are in both."""
    made = one_part(small_build, f"W4BF16-{method}")
    recording = tiny_recording("tiny-dev", "kl", Shapes(height=32, width=32, tokens=16))
    inputs = recording.inputs(NAME, 0)
    toolchain = toolchain_of(made.target)
    linked = toolchain.make(*made, Settings("cpu", "tiny-dev"), Silent(), Laps())
    with toolchain.open_rungs(*made, linked, tmp_path, Silent()) as opened:
        rungs = opened.rungs
        out = {
            rung: rungs[rung](NAME, inputs)["hidden_states_out"] for rung in ("dequantized", "executed", "onnxruntime")
        }
    base = inputs["hidden_states"]
    graph = onnx.load(linked.own[NAME], load_external_data=False).graph
    # norm.linear, q, k, v; and where nothing is left out of the codes, both halves of proj_mlp and of proj_out
    assert sum(node.op_type == "MatMulNBits" for node in graph.node) == 4 + 5 * (not made.plan.schemes["single"].kept)
    assert compare(out["executed"], out["dequantized"], base).relative_l2 <= 2e-3
    assert compare(out["executed"], out["onnxruntime"], base).delta_cosine < 0.9999


def test_moments_of_other_inputs_are_worse_than_none(small_build, calibrated, tiny_recording):
    """Those of `calibrated` are not the model's: the dequantized rung shows it in the delta that it judges."""
    recording = tiny_recording("tiny-dev", "kl", Shapes(height=32, width=32, tokens=16))
    inputs, expected = recording.inputs(NAME, 0), recording.outputs(NAME, 0)["hidden_states_out"]
    off = {}
    for scheme in ("W4BF16", "W4BF16-gptq"):
        output = dequantized_rung(*one_part(small_build, scheme))(NAME, inputs)["hidden_states_out"]
        off[scheme] = compare(output, expected, inputs["hidden_states"]).delta_relative_l2
    assert off["W4BF16-gptq"] > 1.1 * off["W4BF16"]
