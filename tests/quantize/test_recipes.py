"""Rules for single layers, budgets, and the choice within one against trying every combination."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.patches.flux1.model import MODEL
from fluxkiln.patches.model import block_kinds
from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.recipes import Stacks, assign_rules, choose, choose_exactly, parse_budget, parse_rules

STACKS = Stacks(block_kinds(MODEL), MODEL.kinds)
NAMES = [
    *(f"transformer_blocks.{i}.{name}.weight" for i in range(2) for name in ("norm1.linear", "attn.to_q")),
    "single_transformer_blocks.0.norm.linear.weight",
]


def test_later_rules_override_and_groups_have_names():
    rules = parse_rules(["*=W4BF16-g32", "modulation=BF16", "transformer_blocks.1.*=W8BF16"])
    found = assign_rules(NAMES, rules, STACKS)
    assert [found[name].name for name in NAMES] == ["BF16", "W4BF16-g32", "W8BF16", "W8BF16", "BF16"]
    assert assign_rules(NAMES, (), STACKS) == {}


def test_slots():
    assert STACKS.slot_of("single_transformer_blocks.12.attn.to_q.weight") == ("single", "attn.to_q")
    assert STACKS.slot_of("transformer_blocks.0.norm1.linear.weight") == ("double", "norm1.linear")
    assert STACKS.slot_of("encoder.block.3.layer.1.wi_0.weight") == (
        "t5_block",
        "layer.1.wi_0",
    )


@pytest.mark.parametrize(
    ("place", "blocks"),
    [("single", (4,)), ("double_modulation", (0, 2)), ("double_modulated", (1, 3)), ("modulation", (0, 2, 4)),
     ("first_blocks", (0, 1, 4)), ("double", (0, 1, 2, 3)), ("double.attn.to_q", (1, 3)), ("double.norm1.*", (0, 2)),
     ("*.attn.to_q", (1, 3)), ("transformer_blocks.0.attn.to_q", (1,))],
)  # fmt: skip
def test_places_of_a_build_are_places_of_layers(place, blocks):
    assert list(assign_rules(NAMES, parse_rules([f"{place}=BF16"]), STACKS)) == [NAMES[index] for index in blocks]


def test_last_blocks_are_those_of_the_model_at_hand():
    """Of each stack, by number and not by the order of letters; the control: one block more."""
    names = [f"{stack}.{i}.a.weight" for stack in ("transformer_blocks", "encoder.block") for i in (0, 2, 10, 9)]
    found = assign_rules(names, parse_rules(["last_blocks=BF16"]), STACKS)
    assert sorted(found) == ["encoder.block.10.a.weight", "transformer_blocks.10.a.weight"]
    names += ["transformer_blocks.11.a.weight", "single_transformer_blocks.0.b.weight"]
    assert set(assign_rules(names, parse_rules(["last_blocks=BF16"]), STACKS)) == {names[6], *names[8:]}
    with pytest.raises(SchemeError, match="no layer is called 'last_blocks'"):
        assign_rules(["time_text_embed.weight"], parse_rules(["last_blocks=BF16"]), STACKS)


@pytest.mark.parametrize("pattern", ["transformer_blocks.7.*", "attn.to_q", "embedders"])
def test_a_rule_that_matches_nothing_is_refused(pattern):
    with pytest.raises(SchemeError, match=r"no layer is called .*; there are transformer_blocks\.\*\.norm1"):
        assign_rules(NAMES, parse_rules([f"{pattern}=BF16"]), STACKS)


@pytest.mark.parametrize("text", ["BF16", "=BF16", "modulation:BF16"])
def test_what_is_no_rule_is_refused(text):
    with pytest.raises(SchemeError, match="is not PLACE=SCHEME"):
        parse_rules([text])
    with pytest.raises(SchemeError, match="no scheme is called"):
        parse_rules(["modulation=W5BF16"])


@pytest.mark.parametrize(
    ("text", "size"),
    [("6.5GB", 6_500_000_000), ("1000", 1000), ("2 kib", 2048), ("4.5bits", 450), ("4 bit", 400)],
)
def test_budgets(text, size):
    assert parse_budget(text, 800) == size


@pytest.mark.parametrize("text", ["", "much", "-5GB", "5 parsecs", "4.5.6bits"])
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(SchemeError, match="neither bytes"):
        parse_budget(text, 800)


def layers(seed, count=4):
    """Schemes that are larger and better, one after the other, but for one that is worth nothing."""
    rng = np.random.default_rng(seed)
    found = {}
    for index in range(count):
        weights = int(rng.integers(1, 5)) * 1000
        errors = np.sort(rng.random(4))[::-1]
        sizes = [int(weights * bits / 8) for bits in (4.2, 4.4, 4.8, 16)]
        found[f"layer{index}"] = [
            Figures(f"s{i}", float(error), float("nan"), size, weights, 0.0)
            for i, (error, size) in enumerate(zip(errors, sizes, strict=True))
        ]
        found[f"layer{index}"].append(Figures("worse", 2.0, float("nan"), sizes[2], weights, 0.0))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_next_to_the_best_of_all(seed):
    options = layers(seed)
    least, most = (sum(size(one.size for one in found) for found in options.values()) for size in (min, max))
    for share in (0.0, 0.1, 0.3, 0.7, 1.0):
        budget = int(least + share * (most - least))
        chosen = choose(options, budget)
        assert sum(one.size for one in chosen.values()) <= budget
        assert all(one.scheme != "worse" for one in chosen.values())
        error = sum(one.error**2 for one in chosen.values())
        best = min(
            sum(one.error**2 for one in some)
            for some in itertools.product(*options.values())
            if sum(one.size for one in some) <= budget
        )
        start = sum(min(found, key=lambda one: (one.size, one.error)).error ** 2 for found in options.values())
        # a step that is too large for what is left of the budget is all that can be lost
        assert error <= best + 0.5 * (start - best) + 1e-12
        if share == 1.0:
            assert error == pytest.approx(best)
        exact = choose_exactly(options, budget)
        assert list(exact) == list(options)
        assert sum(one.size for one in exact.values()) <= budget
        assert sum(one.error**2 for one in exact.values()) == pytest.approx(best)


def test_small_steps_do_not_take_the_room_of_a_large_one():
    """The control: by error a byte one of them comes first."""
    options = {
        name: [Figures("codes", error, float("nan"), 1, 1, 0.0), Figures("plain", 0.0, float("nan"), size, 1, 0.0)]
        for name, error, size in (("small", 0.3, 2), ("tiny", 0.25, 2), ("large", 0.6, 6))
    }
    for find, kept in ((choose, {"small", "tiny"}), (choose_exactly, {"large"})):
        assert {name for name, one in find(options, 8).items() if one.scheme == "plain"} == kept


def test_what_cannot_be_met_is_refused():
    options = layers(0)
    least = sum(min(one.size for one in found) for found in options.values())
    assert choose(options, least)
    with pytest.raises(SchemeError, match=f"a budget of {least - 1} bytes cannot be met: .* takes {least}"):
        choose(options, least - 1)
    assert sum(one.size for one in choose_exactly(options, least).values()) == least
    with pytest.raises(SchemeError, match=f"a budget of {least - 1} bytes cannot be met"):
        choose_exactly(options, least - 1)
