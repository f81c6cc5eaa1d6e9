"""Calibration and quantization of a whole synthetic checkpoint: what is recorded, chosen, written and refused."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from fluxkiln.build.calibration import calibrate, use_calibration
from fluxkiln.build.make import prepare
from fluxkiln.build.quantization import quantize_model
from fluxkiln.compile.tensors import quantizable
from fluxkiln.errors import IntegrityError, SchemeError, UsageError
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.model import block_kinds
from fluxkiln.quantize.pack import PackedWeight, bf16_to_float32, dequantize
from fluxkiln.quantize.recipes import Stacks, parse_rules
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings
from tests.quantize.weights import pack_matrix

CALIBRATED = ("text_encoder_2", "transformer")
STACKS = Stacks(block_kinds(MODEL), MODEL.kinds)
LAYER = "transformer_blocks.0.attn.to_q.weight"
PROMPTS = ("a red door",)


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantizing")
    components = ("text_encoder", "text_encoder_2", "transformer")
    return Settings("cpu", str(tiny_checkpoint().root), components=components, build_dir=folder, steps=2, seed=1000)


@pytest.fixture(scope="module")
def calibration(settings, tmp_path_factory):
    """A calibration in a file, made at blocks that do not divide every width."""
    return calibrate(settings, PROMPTS, tmp_path_factory.mktemp("out") / "c.safetensors", block=96)


def test_every_layer_of_the_blocks_is_calibrated(calibration, tiny_checkpoint):
    found = calibration.calibration
    assert set(found.components) == set(CALIBRATED)
    for component in CALIBRATED:
        for name, ref in tiny_checkpoint().tensors[component].items():
            if len(ref.shape) == 2 and ".block" in f".{name}" and "relative" not in name and "norm" not in name:
                known = found.statistics(component, name, ref.shape[1])
                assert known.count > 0
                assert (known.diagonal >= 0).all()
                assert known.diagonal.max() > 0
    transformer = found.matrices["transformer"]
    assert transformer[LAYER] == transformer[LAYER.replace("to_q", "to_k")]  # one input, three layers
    assert transformer[LAYER][0] != transformer[LAYER.replace("to_q", "add_q_proj")][0]
    tokens, image = 16, 4
    assert transformer[LAYER][1] == len(PROMPTS) * 2 * image
    assert transformer["single_transformer_blocks.0.attn.to_q.weight"][1] == len(PROMPTS) * 2 * (image + tokens)
    assert calibration.path is not None
    assert calibration.path.stat().st_size == calibration.size


def test_it_is_made_once_and_can_be_taken_elsewhere(settings, calibration, tmp_path):
    again = calibrate(settings, PROMPTS, block=96)
    assert again.hit
    assert again.calibration.digest == calibration.calibration.digest
    elsewhere = replace(settings, store=tmp_path / "store")
    assert use_calibration(elsewhere, calibration.path).calibration.digest == calibration.calibration.digest
    made = quantize_model(elsewhere, ["W4BF16-gptq"])
    assert made.calibrated
    use_calibration(settings, calibration.path)


def rewritten(path, target, change):
    """A calibration file with changed tensors or metadata."""
    with safe_open(path, framework="np") as file:
        metadata = {**file.metadata()}
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


def test_what_does_not_fit_is_refused(settings, calibration, tiny_checkpoint, tmp_path):
    other = replace(settings, model=str(tiny_checkpoint("tiny-schnell").root))
    with pytest.raises(SchemeError, match=r"was made with weights .* this checkpoint's are .*; run fluxkiln calibrate"):
        use_calibration(other, calibration.path)
    # the two have one T5, whose calibration serves both
    with pytest.raises(SchemeError, match="W4BF16-gptq needs calibration of transformer"):
        quantize_model(other, ["W4BF16-gptq"])
    key = f"transformer.{LAYER}"

    def spoil(tensors, _):
        tensors[f"{key}.peaks"][3] = np.nan

    def cut(tensors, _):
        tensors[f"{key}.peaks"] = tensors[f"{key}.peaks"][:-1]

    def shuffle(tensors, _):
        blocks = tensors[f"{key}.blocks"]
        order = np.random.default_rng(0).permutation(blocks.shape[1])
        tensors[f"{key}.blocks"] = np.ascontiguousarray(blocks[:, order][:, :, order])

    def drop(tensors, _):
        del tensors[f"{key}.peaks"]

    def date(_, metadata):
        metadata["calibration"] = json.dumps({**json.loads(metadata["calibration"]), "format": 99})

    def empty(_, metadata):
        metadata.clear()
        metadata["x"] = "y"

    for change, error, clue in (
        (spoil, SchemeError, "has NaN, infinite or negative moments"),
        (cut, SchemeError, "input channels, the weight has 256"),
        (shuffle, IntegrityError, "are not the ones that were recorded"),
        (drop, IntegrityError, r"has no .*\.peaks; run fluxkiln calibrate again"),
        (date, IntegrityError, "has format 99"),
        (empty, IntegrityError, "is no calibration"),
    ):
        path = rewritten(calibration.path, tmp_path / f"{change.__name__}.safetensors", change)
        with pytest.raises(error, match=clue):
            use_calibration(settings, path)
    with pytest.raises(UsageError, match="no component of vae is quantized"):
        calibrate(replace(settings, components=("vae",)), PROMPTS)
    with pytest.raises(UsageError, match="block 40: multiples of 32"):
        calibrate(settings, PROMPTS, block=40)


def test_formats_of_whole_files_are_not_written_layer_by_layer(settings, tmp_path):
    with pytest.raises(SchemeError, match=r"Q8_0 is a format of whole files, and .*; leave --out out, or build for"):
        quantize_model(settings, ["Q8_0"], out=tmp_path / "q")
    assert not (tmp_path / "q").exists()


def test_packed_file(settings, calibration, tiny_checkpoint, tmp_path):
    made = quantize_model(
        settings, ["W4BF16-gptq"], rules=parse_rules(["modulation=BF16", "*.ff.*=W8BF16"]), out=tmp_path / "q"
    )
    tensors = load_file(tmp_path / "q")
    for layer in made.layers:
        scheme, name = parse_scheme(made.chosen[layer.name].scheme), f"{layer.component}.{layer.name}"
        weight = read_tensor(layer.ref)
        if not scheme.weight_bits:
            assert np.array_equal(tensors[name].astype(np.float32), weight.astype(np.float32))
            continue
        known = calibration.calibration.statistics(layer.component, layer.name, weight.shape[1])
        codes, scales, zeros = (tensors[f"{name}.{suffix}"] for suffix in ("codes", "scales", "zeros"))
        packed = PackedWeight(codes, scales.view(np.uint16), zeros, scheme.weight_bits)
        expected = pack_matrix(weight, scheme, known)
        assert codes.tobytes() == expected.codes_OI.tobytes()
        np.testing.assert_array_equal(bf16_to_float32(packed.scales_OG), bf16_to_float32(expected.scales_OG))
        error = np.linalg.norm(dequantize(packed, 64) - weight.astype(np.float32)) / np.linalg.norm(
            weight.astype(np.float32)
        )
        assert error == pytest.approx(made.chosen[layer.name].weight_error, rel=1e-3)
    schemes = {made.chosen[layer.name].scheme for layer in made.layers}
    assert schemes == {"W4BF16-gptq", "BF16", "W8BF16"}
    assert "norm1.linear" in next(n for n, one in made.chosen.items() if one.scheme == "BF16")


def test_more_bytes_buy_less_error(settings, calibration):
    errors, sizes = [], []
    for budget in ("4.2bits", "4.6bits", "6bits", "16bits"):
        made = quantize_model(replace(settings, components=("transformer",)), ["W4BF16"], budget)
        sizes.append(sum(found.size for found in made.chosen.values()))
        errors.append(sum(found.error**2 for found in made.chosen.values()))
        assert sizes[-1] <= made.budget
        assert sizes[-1] > 0.9 * made.budget
    assert errors == sorted(errors, reverse=True)
    assert {found.scheme for found in made.chosen.values()} == {"BF16"}
    document = json.loads(json.dumps(made.to_json()))
    assert document["bits_per_weight"] == 16
    assert set(document["parts"]) >= {"transformer_blocks.0", "single_transformer_blocks.2"}
    with pytest.raises(SchemeError, match="cannot be met: the smallest scheme of every layer takes"):
        quantize_model(replace(settings, components=("transformer",)), ["W4BF16"], "4bits")
    with pytest.raises(SchemeError, match="no layer is called 'nothing'"):
        quantize_model(settings, rules=parse_rules(["nothing=BF16"]))


def test_calibrated_beats_plain_beats_the_compiler(settings, calibration):
    made = quantize_model(settings, ["W4BF16-gptq", "W4BF16"])
    for schemes in made.by_part().values():
        outputs = [schemes[name]["output_error"] for name in ("W4BF16-gptq", "W4BF16", "W4BF16-rtn")]
        assert outputs[0] < 0.7 * outputs[2]
        assert outputs[1] < outputs[2]
        assert schemes["W4BF16"]["weight_error"] < schemes["W4BF16-rtn"]["weight_error"]


def test_slots_are_chosen_for_all_blocks_of_a_kind(settings, calibration):
    """What is printed is a scheme of a build, whose kinds keep the very slots that were chosen, at the stated size."""
    alone = replace(settings, components=("transformer",), target="cpu")
    errors = []
    for budget in ("4.4bits", "7bits", "16bits"):
        made = quantize_model(alone, ["W4BF16-gptq"], budget, per_kind=True)
        assert sum(found.size for found in made.chosen.values()) <= made.budget
        errors.append(sum(found.error**2 for found in made.chosen.values()))
        assert made.to_json()["scheme"] == made.scheme
        by_slot = {}
        for layer, found in made.chosen.items():
            by_slot.setdefault(STACKS.slot_of(layer), set()).add(found.scheme)
        assert all(len(schemes) == 1 for schemes in by_slot.values())
        found = prepare(replace(alone, scheme=made.scheme))
        checkpoint, plan = found.checkpoint, found.plan
        for part in plan.parts:
            for name in (
                quantizable(checkpoint, plan, part) if plan.scheme(part).weight_bits or budget == "16bits" else ()
            ):
                layer = made.chosen.get(part.prefix + name)
                coded = plan.scheme(part).weight_bits and not plan.scheme(part).keeps(name)
                assert layer is None or layer.scheme == ("W4BF16-gptq" if coded else "BF16")
    assert errors == sorted(errors, reverse=True)
    assert made.scheme == "W4BF16-gptq,double.*=BF16,single.*=BF16"
    assert {plan.schemes[kind].name for kind in plan.kinds()} == {"BF16"}
    for schemes, budget, rules in ((["W4BF16"], "", ()), (["W4BF16", "BF16"], "7bits", ()), (["BF16"], "7bits", ())):
        with pytest.raises(SchemeError, match=r"slots are chosen per kind|BF16 does not quantize"):
            quantize_model(alone, schemes, budget, rules, per_kind=True)
    with pytest.raises(SchemeError, match="cannot be met"):
        quantize_model(alone, ["W4BF16"], "4bits", per_kind=True)
