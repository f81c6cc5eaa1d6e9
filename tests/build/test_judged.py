"""Builds of a checkpoint that paints scenes say what its pictures show."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

from fluxkiln.build import samples
from fluxkiln.build.make import prepare
from fluxkiln.build.samples import RECIPE, judge_scenes
from fluxkiln.patches.registry import all_presets
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings

COUNT, STEPS = 3, 2


@pytest.fixture(scope="module")
def prepared(tiny_checkpoint, tmp_path_factory):
    """Random weights in a folder that says that they were trained to paint scenes."""
    root = tmp_path_factory.mktemp("scenes")
    shutil.copytree(tiny_checkpoint().root, root / "tiny-dev")
    (root / "tiny-dev" / RECIPE).write_text("{}")
    given = {"size": ((64, 64),), "tokens": (24,), "scheme": "F32", "build_dir": root / "build"}
    return prepare(Settings("cpu", str(root / "tiny-dev"), **given))


@pytest.fixture(scope="module")
def judged(prepared):
    return judge_scenes(prepared, prepared.plan, Silent(), COUNT, STEPS)


def test_the_weights_of_the_build_paint_what_diffusers_paints(judged):
    assert (judged["images"], judged["steps"], len(judged["entries"])) == (COUNT, STEPS, COUNT)
    # float32 on both sides, sums in another order: a pixel in a hundred rounds to its neighbour
    assert judged["reference"]["psnr"] > 50
    assert judged["facts"] == judged["diffusers"]
    assert judged["stated"] > 10


def test_other_weights_paint_something_else(prepared, judged, monkeypatch):
    """Negative control: one block adds twice what it should."""
    rung, runner = samples.stored_weights(prepared.checkpoint, prepared.plan, prepared.cache, 20)

    def spoilt(name, inputs):
        made = runner(name, inputs)
        if name == "double.00":
            before = inputs["hidden_states"]
            made["hidden_states_out"] = before + np.float32(2) * (made["hidden_states_out"] - before)
        return made

    monkeypatch.setattr(samples, "stored_weights", lambda *_, **__: (rung, spoilt))
    found = judge_scenes(prepared, prepared.plan, Silent(), COUNT, STEPS)
    assert found["reference"]["psnr"] < judged["reference"]["psnr"] - 10
    assert found["reference"]["distance"] > judged["reference"]["distance"]


def test_a_checkpoint_that_paints_nothing_is_not_judged(tiny_checkpoint, tmp_path):
    prepared = prepare(Settings("cpu", str(tiny_checkpoint().root), build_dir=tmp_path))
    assert judge_scenes(prepared, prepared.plan, Silent()) is None


def test_parts_that_are_cut_over_cores_are_not_judged(prepared):
    cut = prepare(replace(prepared.settings, target="trn1", scheme="BF16"))
    assert cut.plan.layout is not None
    assert judge_scenes(cut, cut.plan, Silent()) is None


def test_the_reference_run_takes_as_many_steps_as_its_picture_needs(prepared):
    assert prepared.steps == 2
    assert replace(prepared, settings=replace(prepared.settings, steps=3)).steps == 3
    trained = replace(prepared, checkpoint=replace(prepared.checkpoint, name="scenes-dev"))
    assert trained.steps == all_presets()["scenes-dev"][1].steps == 4
