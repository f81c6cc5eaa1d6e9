"""The part list in both forms: order, names, prefixes, and what belongs to what."""

from __future__ import annotations

import pytest

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.kinds import MODULATION_CHUNKS, MODULATION_ROWS, list_parts, modulation_name
from fluxkiln.types import check_steps

CONFIGS = {"text_encoder_2": {"num_layers": 1}, "transformer": {"num_layers": 2, "num_single_layers": 1}}


def names(**options):
    return [part.name for part in list_parts(CONFIGS, **options)]


def test_inline_parts_run_in_the_models_order():
    assert names() == [
        "clip", "t5_embed", "t5_block.00", "t5_final", "head", "double.00", "double.01", "single.00", "tail",
        "vae_decoder",
    ]  # fmt: skip
    assert names(vae="tiny")[-1] == "tiny_vae_decoder"
    assert list_parts(CONFIGS) == list_parts(CONFIGS, modulation="inline")


def test_hoisted_parts_have_what_runs_once_first():
    assert names(modulation="hoisted") == [
        "clip", "t5_embed", "t5_block.00", "t5_final",
        "time_embed", "double_modulation.00", "double_modulation.01", "single_modulation.00", "tail_modulation",
        "token_embed", "double.00", "double.01", "single.00", "tail",
        "vae_decoder",
    ]  # fmt: skip
    each_step = [part.name for part in list_parts(CONFIGS, modulation="hoisted") if part.traits.each_step]
    assert each_step == ["token_embed", "double.00", "double.01", "single.00", "tail"]


def test_a_block_and_its_modulation_read_the_same_part_of_the_checkpoint():
    parts = {part.name: part for part in list_parts(CONFIGS, modulation="hoisted")}
    for inline in list_parts(CONFIGS):
        if inline.kind not in MODULATION_CHUNKS:
            continue
        block, modulation = parts[inline.name], parts[modulation_name(inline.name)]
        assert block.kind == f"{inline.kind}_modulated"
        assert modulation.kind == f"{inline.kind}_modulation"
        assert block.prefix == modulation.prefix == inline.prefix


def test_both_forms_are_the_same_but_for_the_transformer():
    others = [
        [part for part in list_parts(CONFIGS, modulation=form) if part.component != "transformer"]
        for form in ("inline", "hoisted")
    ]
    assert others[0] == others[1]


def test_unknown_form_is_refused():
    with pytest.raises(UsageError, match=r"'hosted'; there are inline, hoisted"):
        list_parts(CONFIGS, modulation="hosted")


def test_steps_beyond_the_rows_are_refused_where_there_are_rows():
    hoisted = list_parts(CONFIGS, modulation="hoisted")
    check_steps(hoisted, MODULATION_ROWS)
    check_steps(list_parts(CONFIGS), MODULATION_ROWS + 1)
    with pytest.raises(UsageError, match=rf"^{MODULATION_ROWS + 1} steps: .*at most {MODULATION_ROWS} steps, or the"):
        check_steps(hoisted, MODULATION_ROWS + 1)
