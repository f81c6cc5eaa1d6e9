"""What single weights' codes do to their blocks, that a budget is spent by it, and how slots are chosen together."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxkiln.build.make import prepare
from fluxkiln.build.quantization import quantize_model
from fluxkiln.build.slots import (
    add_up,
    block_errors,
    choose_slots,
    open_trials,
    predicted_errors,
    scheme_text,
    slot_errors,
)
from fluxkiln.cli.main import main
from fluxkiln.compile.rungs import dequantized_rung
from fluxkiln.errors import ParityError, SchemeError
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.model import block_kinds
from fluxkiln.progress import Silent
from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.recipes import Stacks
from fluxkiln.quantize.schemes import parse_scheme, parse_schemes
from fluxkiln.settings import Settings
from fluxkiln.verify.metrics import compare

NAN = float("nan")
STACKS = Stacks(block_kinds(MODEL), MODEL.kinds)
CODED = parse_scheme("W4BF16")
# of tiny-dev's slots, one of a residual branch and the modulation of the same block
SOME = tuple(
    f"{stack}.{number}.{slot}.weight"
    for stack, slots in (
        ("transformer_blocks", ("attn.to_out.0", "norm1.linear")),
        ("single_transformer_blocks", ("proj_out", "norm.linear")),
    )
    for number in range(2)
    for slot in slots
)


@pytest.fixture(scope="module")
def settings(tiny_checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sensitivity")
    return Settings("cpu", str(tiny_checkpoint().root), components=("transformer",), build_dir=folder)


@pytest.fixture(scope="module")
def trials(settings):
    return open_trials(prepare(settings), SOME, STACKS, Silent())


def test_the_first_and_the_last_block_of_each_kind_are_tried(trials):
    assert {kind: [part.name for part in parts] for kind, parts in trials.blocks.items()} == {
        "double": ["double.00", "double.01"],
        "single": ["single.00", "single.02"],
    }
    assert trials.slots == {"double": ("attn.to_out.0", "norm1.linear"), "single": ("proj_out", "norm.linear")}


def test_an_error_is_that_of_a_build_that_keeps_all_others(trials):
    """The same by another way: a scheme whose exceptions name all other weights, against BF16."""
    found = slot_errors(trials, CODED, Silent())
    assert set(found) == {"double.attn.to_out.0", "double.norm1.linear", "single.proj_out", "single.norm.linear"}
    assert all(0.002 < error < 0.12 for error in found.values())
    others = ("proj_mlp", "norm.linear", "attn.to_?")
    squares = []
    for part in trials.blocks["single"]:
        plans = [
            replace(trials.plan, schemes={**trials.plan.schemes, "single": scheme})
            for scheme in (replace(CODED, kept=others), parse_scheme("BF16"))
        ]
        for step in range(2):
            inputs = trials.recording.inputs(part.name, step)
            made, expected = (
                dequantized_rung(trials.checkpoint, plan, trials.cache)(part.name, inputs)["hidden_states_out"]
                for plan in plans
            )
            squares.append(compare(made, expected, inputs["hidden_states"]).delta_relative_l2 ** 2)
    assert found["single.proj_out"] == pytest.approx(np.sqrt(np.mean(squares)), rel=1e-4)


def test_blocks_with_nothing_in_codes_have_no_error(trials):
    assert block_errors(trials, CODED, {}, Silent()) == {"double": 0.0, "single": 0.0}
    one = slot_errors(trials, CODED, Silent())
    both = block_errors(trials, CODED, trials.slots, Silent())
    for kind, slots in trials.slots.items():
        assert both[kind] > max(one[f"{kind}.{slot}"] for slot in slots)
    # a kept pattern of the scheme itself does not count: what is in codes is said
    kept = replace(CODED, kept=("proj_out",))
    assert block_errors(trials, kept, {"single": ["proj_out"]}, Silent())["single"] == pytest.approx(
        one["single.proj_out"]
    )


def test_what_is_not_finite_is_refused(trials):
    class Spoilt:
        calls = trials.recording.calls

        def inputs(self, part, step):
            return {name: np.full_like(array, np.nan) for name, array in trials.recording.inputs(part, step).items()}

    with pytest.raises(ParityError, match=r"double\.00 with attn\.to_out\.0 in codes makes values that are not finite"):
        slot_errors(replace(trials, recording=Spoilt()), CODED, Silent())


def planted(root, target):
    """A checkpoint in whose double blocks the feed-forward's output is most of what is added."""
    shutil.copytree(root, target)
    found = 0
    for file in (target / "transformer").glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.startswith("transformer_blocks.") and name.endswith("net.2.weight"):
                tensors[name] = (tensor.float() * 16).to(torch.bfloat16)
                found += 1
        save_file(tensors, file, {"format": "pt"})
    assert found == 4
    return target


@pytest.fixture(scope="module")
def planted_choice(settings, tiny_checkpoint, tmp_path_factory):
    root = planted(tiny_checkpoint().root, tmp_path_factory.mktemp("planted") / "tiny-dev")
    chosen = replace(settings, model=str(root))
    return chosen, quantize_model(chosen, ["W4BF16"], "7bits", per_kind=True)


def test_what_matters_to_the_block_is_kept(planted_choice):
    """Layers' own relative errors are all alike, so that small ones are kept; the block does not notice."""
    chosen, made = planted_choice
    figures = {name: found for name, found in made.figures.items() if name.startswith("transformer_blocks.")}
    budget = sum(found["W4BF16"].weights for found in figures.values()) * 7 // 8
    known = {f"{one.kind}.{one.slot}": one.error for one in made.mix.slots}
    trials = open_trials(prepare(chosen), figures, STACKS, Silent())
    assert set(trials.blocks) == {"double"}
    kept, errors = [], []
    for by_block in (known, None):
        _, _, slots = choose_slots(figures, "W4BF16", "BF16", budget, STACKS, by_block)
        assert 0.9 * budget < sum(one.plain if one.kept else one.coded for one in slots) <= budget
        kept.append({one.slot for one in slots if one.kept})
        # the control: both choices run
        coded = {"double": [one.slot for one in slots if not one.kept]}
        errors.append(block_errors(trials, CODED, coded, Silent())["double"])
    assert kept[0] >= {"ff.net.2"}
    assert "attn.to_out.0" not in kept[0]
    assert kept[1] >= {"attn.to_q", "attn.to_out.0"}
    assert not any("ff" in slot for slot in kept[1])
    assert errors[0] < 0.8 * errors[1]


def test_the_sum_of_squares_foretells_the_block(planted_choice):
    mix = planted_choice[1].mix
    for kind, error in predicted_errors(mix.slots).items():
        assert error == pytest.approx(mix.measured[kind], rel=0.1)
    # a control: without one slot it does not
    worst = max(mix.slots, key=lambda one: 0.0 if one.kept else one.error)
    without = tuple(one for one in mix.slots if one is not worst)
    assert predicted_errors(without)[worst.kind] < 0.9 * mix.measured[worst.kind]
    everything = predicted_errors(mix.slots, all_coded=True)
    assert all(everything[kind] > error for kind, error in predicted_errors(mix.slots).items())


def test_the_table_is_printed_and_in_json(planted_choice, capsys):
    chosen, made = planted_choice
    command = [
        "quantize", chosen.model, "--scheme", "W4BF16", "--budget", "7bits", "--per-kind", "--components",
        "transformer", "--size", "32x32", "--tokens", "16", "--build-dir", str(chosen.build_dir),
    ]  # fmt: skip
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    mix = found["mix"]
    assert found["scheme"] == made.scheme
    assert len(mix["slots"]) == len(made.mix.slots) == 20
    for row, one in zip(mix["slots"], made.mix.slots, strict=True):
        assert (row["kind"], row["slot"], row["chosen"]) == (one.kind, one.slot, "BF16" if one.kept else "W4BF16")
        assert row["bits"] == (16.0 if one.kept else 4.375)
        assert row["bytes_kept"] == one.weights * (16 - 4.375) / 8
        assert row["sensitivity"] == pytest.approx(one.error)
    assert sum(row["size"] for row in mix["slots"]) == found["size"] <= found["budget"]
    for row in mix["kinds"]:
        assert 0 < row["predicted_error"] < row["predicted_error_all_in_codes"]
        assert row["measured_error"] == pytest.approx(made.mix.measured[row["kind"]])
    assert main(command) == 0
    text = capsys.readouterr().out
    for word in ("kept costs", "foretold", "ff_context.net.2", "single.00, single.02", f"--scheme '{made.scheme}'"):
        assert word in text
    assert main(["quantize", chosen.model, "--scheme", "W4BF16", "--budget", "7bits", "--components", "transformer",
                 "--size", "32x32", "--tokens", "16", "--build-dir", str(chosen.build_dir), "--json"]) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["mix"] is None


def test_a_budget_that_cannot_be_met_is_said_before_a_block_is_run(settings, monkeypatch):
    def never(*_):
        raise AssertionError("a block was run")

    monkeypatch.setattr("fluxkiln.build.quantization.open_trials", never)
    with pytest.raises(SchemeError, match=r"a budget of \d+ bytes cannot be met"):
        quantize_model(settings, ["W4BF16"], "4bits", per_kind=True)
    with pytest.raises(AssertionError, match="a block was run"):
        quantize_model(settings, ["W4BF16"], "6bits", per_kind=True)


def test_squared_errors_add_up():
    made = add_up([Figures("s", 0.3, NAN, 10, 20, 1.0), Figures("s", 0.4, NAN, 30, 40, 2.0, 1, 2)])
    assert made.error == pytest.approx(0.5)
    assert (made.size, made.weights, made.seconds, made.one_signed, made.empty) == (40, 60, 3.0, 1, 2)
    known = add_up([Figures("s", 0.3, 0.6, 1, 1, 0.0), Figures("s", 0.4, 0.8, 1, 1, 0.0)])
    assert known.error == pytest.approx(1.0)


def layer(error, size=40):
    return {"W4BF16": Figures("W4BF16", error, NAN, size, 80, 0.0), "BF16": Figures("BF16", 0.0, NAN, 160, 80, 0.0)}


def test_a_slot_is_kept_where_all_its_blocks_gain_most():
    """`a` is worst in one block; `b` costs more over both. The control: with one block alone it is the other way."""
    figures = {
        "transformer_blocks.0.a.weight": layer(0.10), "transformer_blocks.1.a.weight": layer(0.01),
        "transformer_blocks.0.b.weight": layer(0.09), "transformer_blocks.1.b.weight": layer(0.09),
    }  # fmt: skip
    chosen, text, slots = choose_slots(figures, "W4BF16", "BF16", 400, STACKS)
    assert [(one.slot, one.kept, one.coded, one.plain) for one in slots] == [
        ("a", False, 80, 320),
        ("b", True, 80, 320),
    ]
    assert text == "W4BF16,double.b=BF16"
    assert [chosen[name].scheme for name in figures] == ["W4BF16", "W4BF16", "BF16", "BF16"]
    assert math.isclose(sum(one.size for one in chosen.values()), 400)
    first = {name: found for name, found in figures.items() if ".0." in name}
    assert choose_slots(first, "W4BF16", "BF16", 200, STACKS)[1] == "W4BF16,double.a=BF16"


def test_what_was_measured_decides():
    """`b` has the larger errors of its own; its block does not notice. The control is the test above."""
    figures = {
        f"transformer_blocks.{n}.{slot}.weight": layer(e) for n in range(2) for slot, e in (("a", 0.1), ("b", 0.2))
    }
    for errors, kept in (({"double.a": 0.03, "double.b": 0.001}, "a"), ({"double.a": 0.001, "double.b": 0.002}, "b")):
        _, text, slots = choose_slots(figures, "W4BF16", "BF16", 400, STACKS, errors)
        assert text == f"W4BF16,double.{kept}=BF16"
        assert {f"double.{one.slot}": one.error for one in slots} == pytest.approx(errors)
        (left,) = (error for name, error in errors.items() if not name.endswith(kept))
        assert predicted_errors(slots) == pytest.approx({"double": left})
        assert predicted_errors(slots, all_coded=True)["double"] == pytest.approx(math.hypot(*errors.values()))


def test_the_text_is_a_scheme():
    chosen = {"single.proj_out": "BF16", "single.attn.to_q": "W4BF16-gptq", "double.a": "BF16", "t5_block.b": "x"}
    text = scheme_text(chosen, "W4BF16-gptq", "BF16")
    assert text == "W4BF16-gptq,single.proj_out=BF16,double.*=BF16"
    _, schemes = parse_schemes(text, "BF16", MODEL.kinds)
    assert schemes["single_modulated"].keeps("proj_out.weight__s1.0.256__t")
    assert schemes["double_modulation"].keeps("norm1.linear.weight")
    assert not schemes["t5_block"].kept
