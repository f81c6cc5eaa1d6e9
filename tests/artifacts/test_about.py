"""Whose weights a parity is about, by the licence that came with them."""

from __future__ import annotations

import pytest

from fluxkiln.artifacts.about import DRAWN, RANDOM, describe_weights, read_about
from fluxkiln.export.synth import _LICENSE as SYNTHETIC
from fluxkiln.train.recipe import _LICENSE as TRAINED


@pytest.mark.parametrize(
    ("licence", "word"),
    [(RANDOM, "random (synthetic)"), (DRAWN, "trained on drawn scenes"), (b"", "of the checkpoint kiln")],
)
def test_weights_are_told_by_their_licence(licence, word):
    assert describe_weights(licence, "kiln").startswith(word)


def test_the_words_are_those_that_are_written():
    assert SYNTHETIC.encode().startswith(RANDOM)
    assert TRAINED.encode().startswith(DRAWN)
    assert not TRAINED.encode().startswith(RANDOM)


def test_what_anybody_wrote_is_read_with_care():
    about = {"speed": "s", "ran": "r", "weights": "w", "size": 3, "other": "o"}
    assert list(read_about({"about": about}).items()) == [("weights", "w"), ("ran", "r"), ("speed", "s")]
    assert read_about({}) == read_about({"about": []}) == read_about({"about": {"weights": None}}) == {}
