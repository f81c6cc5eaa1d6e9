from dataclasses import replace

import numpy as np

from fluxkiln.scenes.drawing import SIDE, draw
from fluxkiln.scenes.grammar import Group, Scene

SCENE = Scene("day", "grass", (Group("kiln", "red", 1, "large", "left"),))


def pixels(scene, seed=0):
    return np.asarray(draw(scene, seed)).astype(int)


def test_a_picture_has_its_size_and_is_the_same_for_the_same_seed():
    assert pixels(SCENE).shape == (SIDE, SIDE, 3)
    assert (pixels(SCENE) == pixels(SCENE)).all()
    assert (pixels(SCENE) != pixels(SCENE, 1)).any()


def test_the_thing_stands_where_and_in_the_colour_that_the_scene_says():
    red = (pixels(SCENE) * [1, -1, -1]).sum(axis=2) > 60
    assert red[:, : SIDE // 3].sum() > 200
    assert red[:, SIDE // 3 :].sum() == 0


def test_each_property_shows():
    plain = pixels(SCENE)
    for change in ({"time": "night"}, {"ground": "snow"}, {"river": True}, {"weather": True}, {"birds": 2}):
        assert (pixels(replace(SCENE, **change)) != plain).sum() > 100, change
