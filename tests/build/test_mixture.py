"""Slots of a kind: added up over its blocks, chosen together, and written as a scheme."""

from __future__ import annotations

import math

import pytest

from fluxkiln.build.mixture import add_up, choose_slots, predicted_errors, scheme_text
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.model import block_kinds
from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.recipes import Stacks
from fluxkiln.quantize.schemes import parse_schemes

NAN = float("nan")
STACKS = Stacks(block_kinds(MODEL), MODEL.kinds)


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
