"""The table of cuts covers every weight once, and shares an axis so that nothing is lost or held twice."""

from __future__ import annotations

import pytest

from fluxkiln.errors import PatchError, UsageError
from fluxkiln.patches.cut import columns_of, find_cut, local_shape, share_of
from fluxkiln.patches.flux1.kinds import CUTS, Cut, head_count
from fluxkiln.patches.flux1.presets import PRESETS

HEADS = Cut("", "column", heads=True)


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16, 24, 32])
def test_heads_are_shared_whole_and_padded_behind(ranks):
    """24 heads of 128."""
    shares = [share_of(HEADS, "q", (3072, 3072), 24, ranks, rank) for rank in range(ranks)]
    assert {share.size for share in shares} == {-(-24 // ranks) * 128}
    assert all(share.start % 128 == 0 and share.stop % 128 == 0 for share in shares)
    held = [entry for share in shares for entry in range(share.start, share.stop)]
    assert held == list(range(3072))


def test_what_does_not_count_heads_must_divide():
    column = Cut("", "column")
    assert share_of(column, "up", (12288, 3072), 24, 32, 31) == share_of(column, "up", (12288, 1), 1, 32, 31)
    with pytest.raises(UsageError, match=r"axis 0 of up has 12288 entries, which 5 ranks cannot share evenly"):
        share_of(column, "up", (12288, 3072), 24, 5, 0)
    with pytest.raises(UsageError, match=r"axis 1 of down"):
        share_of(Cut("", "row"), "down", (3072, 12288), 24, 5, 0)
    assert share_of(Cut("", "whole"), "norm", (3,), 24, 5, 0) is None


def test_row_biases_are_whole_and_column_biases_are_cut():
    assert local_shape(CUTS["double"], "attn.to_out.0.bias", (3072,), 24, 8) == (3072,)
    assert local_shape(CUTS["double"], "ff.net.2.bias", (3072,), 24, 8) == (3072,)
    assert local_shape(CUTS["double"], "attn.to_q.bias", (3072,), 24, 8) == (384,)
    assert local_shape(CUTS["double"], "attn.to_q.bias", (3072,), 24, 16) == (256,)
    assert local_shape(CUTS["head"], "norm_out.linear.weight", (6144, 3072), 24, 8) == (768, 3072)


def test_the_single_blocks_projection_is_two_halves():
    attention, mlp = (find_cut(CUTS["single"], f"proj_out.weight_{half}") for half in ("attention", "mlp"))
    assert columns_of(attention, (3072, 15360)) == (0, 3072)
    assert columns_of(mlp, (3072, 15360)) == (3072, 15360)
    assert columns_of(find_cut(CUTS["single"], "proj_mlp.weight"), (12288, 3072)) == (0, 3072)
    assert attention.source == mlp.source == "proj_out.weight"
    assert attention.heads
    assert not mlp.heads


def test_a_weight_without_a_rule_is_refused():
    """A new weight of upstream must be decided on, not copied to every rank."""
    with pytest.raises(PatchError, match=r"0 rules say how weight attn.to_gate.weight"):
        find_cut(CUTS["double"], "attn.to_gate.weight")


def test_two_rules_for_a_weight_are_refused(monkeypatch):
    monkeypatch.setitem(CUTS, "tail", (*CUTS["tail"], Cut("proj_out.bias", "column")))
    with pytest.raises(PatchError, match="2 rules"):
        find_cut(CUTS["tail"], "proj_out.bias")


def test_heads_are_the_components_own():
    configs = PRESETS["full-dev"].configs
    assert [head_count(kind, configs) for kind in ("t5", "double", "single", "clip")] == [64, 24, 24, 1]
