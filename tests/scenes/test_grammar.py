from dataclasses import replace
from itertools import islice

import pytest

from fluxkiln.scenes.grammar import MOST_WORDS, Fact, Group, Scene, holds, scenes

KILN = Group("kiln", "red", 1, "small", "left", smoke=True)
POTS = Group("pot", "blue", 2, "", "right")
SCENE = Scene("night", "snow", (KILN, POTS), river=True, light_place="left", weather=True, birds=2, bird_place="left")


def test_every_fact_of_a_caption_holds_in_its_scene():
    for scene, prompt in islice(scenes(1), 2000):
        assert [fact for fact in prompt.facts if not holds(fact, scene)] == []
        assert len(prompt.text.split()) <= MOST_WORDS


def test_captions_have_many_words_and_seldom_repeat():
    texts = [prompt.text for _, prompt in islice(scenes(1), 20_000)]
    assert len({word for text in texts for word in text.replace(",", "").split()}) >= 60
    assert len(set(texts)) > 19_000


def test_the_same_seed_gives_the_same_scenes():
    assert list(islice(scenes(4), 50)) == list(islice(scenes(4), 50))
    assert list(islice(scenes(4), 50)) != list(islice(scenes(5), 50))


def test_held_out_combinations_are_never_trained_on():
    trained = {scene.combination for scene, _ in islice(scenes(1), 20_000)}
    kept = {scene.combination for scene, _ in islice(scenes(2, held_out=True), 500)}
    assert not trained & kept


@pytest.mark.parametrize(
    ("fact", "changed"),
    [
        (Fact("time", "night"), replace(SCENE, time="day")),
        (Fact("light", "moon"), replace(SCENE, light_place="")),
        (Fact("light_place", "left"), replace(SCENE, light_place="right")),
        (Fact("ground", "snow"), replace(SCENE, ground="sand")),
        (Fact("river", True), replace(SCENE, river=False)),
        (Fact("weather", True), replace(SCENE, weather=False)),
        (Fact("birds", 2), replace(SCENE, birds=3)),
        (Fact("birds above", True, "kiln"), replace(SCENE, bird_place="right")),
        (Fact("kinds", "kiln pot"), replace(SCENE, groups=(KILN, POTS, Group("tree", "green", 1, "large", "middle")))),
        (Fact("count", 2, "pot"), replace(SCENE, groups=(KILN, replace(POTS, count=3)))),
        (Fact("colour", "blue", "pot"), replace(SCENE, groups=(KILN, replace(POTS, colour="purple")))),
        (Fact("size", "small", "kiln"), replace(SCENE, groups=(replace(KILN, size="large"), POTS))),
        (Fact("place", "left", "kiln"), replace(SCENE, groups=(replace(KILN, place="middle"), POTS))),
        (Fact("smoke", True, "kiln"), replace(SCENE, groups=(replace(KILN, smoke=False), POTS))),
        (Fact("left of", "pot", "kiln"), replace(SCENE, groups=(KILN, replace(POTS, place="left")))),
        (Fact("colour", "red", "kiln"), replace(SCENE, groups=(POTS,))),
    ],
)  # fmt: skip
def test_a_fact_holds_until_what_it_says_changes(fact, changed):
    assert holds(fact, SCENE)
    assert not holds(fact, changed)
