"""Faults planted in a template and in what is stored, and the operation that is named for each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.compile.rungs import check_stored, compare_template


@pytest.mark.parametrize("target", ["bm1684x", "cpu"])
def test_faults_of_the_export_are_found_against_the_modules(opened, target):
    part, made = opened("single.02", target=target)
    assert compare_template(part, made.checkpoint).culprit is None
    weight, bias = (
        next(slot for slot in part.weights if slot.startswith(f"attn.to_k.{what}")) for what in ("weight", "bias")
    )
    others = {"bias": next(slot for slot in part.weights if slot.startswith("attn.to_q.bias"))}
    spoilt = {
        weight: {**part.weights, weight: np.ascontiguousarray(part.weights[weight].T)},
        bias: {**part.weights, bias: part.weights[others["bias"]], others["bias"]: part.weights[bias]},
    }
    for slot, weights in spoilt.items():
        culprit = compare_template(replace(part, weights=weights), made.checkpoint).culprit
        assert culprit.rung == "onnxruntime"
        assert slot in culprit.slots or (slot == bias and others["bias"] in culprit.slots)


def test_weights_that_a_scheme_cannot_hold_are_named(opened):
    part, _ = opened("single.02")
    assert check_stored(part).culprit is None
    slot = next(name for name in part.stored if name.startswith("attn.to_v.weight"))
    coarse = {**part.stored, slot: np.sign(part.stored[slot]) * np.abs(part.stored[slot]).mean()}
    culprit = check_stored(replace(part, stored=coarse)).culprit
    assert slot in culprit.slots
    assert "too coarsely" in culprit.remedy.cause


@pytest.mark.parametrize("target", ["cpu", "bm1684x"])
def test_weights_that_are_left_out_are_looked_at_as_they_are(opened, target):
    """Those of a linked graph as the checkpoint has them, those of a bmodel in the scheme's arithmetic: BF16 too."""
    part, _ = opened("single.02", "W4BF16,single.attn.to_q=BF16", target)
    for name, kept in (("attn.to_q.weight", True), ("attn.to_k.weight", False)):
        slots = [slot for slot in part.weights if slot.startswith(name)]
        assert slots
        for slot in slots:
            same = np.array_equal(np.float32(part.stored[slot]), np.float32(part.weights[slot]))
            assert same == kept
