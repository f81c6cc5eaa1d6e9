"""A checkpoint's model is found by the class of its pipeline, a stranger's as well as our own."""

from __future__ import annotations

import json
import shutil

import pytest

from fluxkiln.errors import CheckpointError, IntegrityError, UsageError
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.patches import registry
from fluxkiln.patches.flux1.model import MODEL
from tests.distributions import install

KETTLE = """
from dataclasses import replace
from fluxkiln.patches.flux1.model import Flux1
class Kettle(Flux1):
    name, title, pipeline_class = "kettle", "Kettle", "KettlePipeline"
    classes = {**Flux1.classes, "transformer": "KettleTransformer"}
    presets = {"tiny-kettle": replace(Flux1.presets["tiny-dev"], name="tiny-kettle")}
MODEL = Kettle()
"""


@pytest.fixture
def kettle(tmp_path, monkeypatch):
    """Another distribution's model beside our own."""
    install(tmp_path, "kettle", registry.GROUP, {"kettle": "kettle_model:MODEL"}, {"kettle_model": KETTLE})
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.all_models.cache_clear()
    yield
    registry.all_models.cache_clear()


def relabelled(root, folder, pipeline_class, transformer):
    """A copy of a checkpoint whose pipeline and transformer are of other classes."""
    copy = shutil.copytree(root, folder)
    index = json.loads((copy / "model_index.json").read_text())
    index |= {"_class_name": pipeline_class, "transformer": ["kettle_model", transformer]}
    (copy / "model_index.json").write_text(json.dumps(index))
    return copy


def test_a_checkpoint_is_of_the_model_that_its_pipeline_says(kettle, tiny_checkpoint, tmp_path):
    ours = tiny_checkpoint()
    assert open_checkpoint(ours.root).model is MODEL
    theirs = open_checkpoint(relabelled(ours.root, tmp_path / "theirs", "KettlePipeline", "KettleTransformer"))
    assert theirs.model.title == "Kettle"
    assert theirs.tensors.keys() == ours.tensors.keys()
    assert registry.model_named("kettle", {"transformer": {"_class_name": "KettleTransformer"}}).name == "kettle"
    assert set(registry.all_presets()) == {*MODEL.presets, "tiny-kettle"}
    assert registry.component_of("double") == "transformer"
    assert registry.component_of("triple") == ""


def test_a_class_that_nobody_knows_is_told_with_those_that_there_are(tiny_checkpoint, tmp_path):
    copy = relabelled(tiny_checkpoint().root, tmp_path / "copy", "KettlePipeline", "KettleTransformer")
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(copy)
    told = str(caught.value)
    assert (
        f"{copy / 'model_index.json'} is for 'KettlePipeline', fluxkiln compiles FluxPipeline (FLUX.1); give a" in told
    )
    with pytest.raises(UsageError, match=r"the bundle's model is 'kettle'; this fluxkiln knows flux1: install what"):
        registry.model_named("kettle", {})
    with pytest.raises(IntegrityError, match=r"transformer is a 'Kettle', FLUX.1 has FluxTransformer2DModel; build"):
        registry.model_named("flux1", {"transformer": {"_class_name": "Kettle"}})


def test_all_models_there_are_are_listed(kettle):
    with pytest.raises(CheckpointError, match=r"compiles FluxPipeline \(FLUX.1\), KettlePipeline \(Kettle\); give"):
        registry.model_for("TeapotPipeline", "here")


def test_a_components_class_is_the_models(kettle, tiny_checkpoint, tmp_path):
    copy = relabelled(tiny_checkpoint().root, tmp_path / "copy", "KettlePipeline", "FluxTransformer2DModel")
    with pytest.raises(CheckpointError, match=r"as transformer, Kettle has KettleTransformer; give"):
        open_checkpoint(copy)
