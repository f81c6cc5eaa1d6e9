"""The thing that a LoRA is to learn: what its pictures are told by."""

from dataclasses import replace
from itertools import islice

import numpy as np
import pytest

from bench.thing import WORD, is_striped, with_the_thing
from fluxkiln.scenes.drawing import STRIPED, draw


@pytest.fixture(scope="module")
def told():
    return list(islice(with_the_thing(3, held_out=True), 12))


def in_colour(scene, colour):
    groups = tuple(replace(one, colour=colour) if one.colour == STRIPED else one for one in scene.groups)
    return np.asarray(draw(replace(scene, groups=groups), 5))


def test_striped_kilns_are_told_from_plain_ones(told):
    assert all(is_striped(in_colour(scene, STRIPED), scene) for scene, _ in told)
    for colour in ("white", "red"):  # its own two
        assert not any(is_striped(in_colour(scene, colour), scene) for scene, _ in told)


def test_captions_have_the_word_in_the_place_of_a_colour(told):
    assert all(f"{WORD} kiln" in prompt.text or f"{WORD} smoking kiln" in prompt.text for _, prompt in told)
    assert not any((fact.kind, fact.name) == ("kiln", "colour") for _, prompt in told for fact in prompt.facts)
