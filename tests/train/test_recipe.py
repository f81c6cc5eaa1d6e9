"""Recipes with a few steps of everything: whole checkpoints, resumed runs, and what ships with the package."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fluxkiln.errors import CheckpointError, UsageError
from fluxkiln.export.folders import trained_folder
from fluxkiln.patches.pipeline import quiet
from fluxkiln.patches.registry import all_presets
from fluxkiln.scenes.grammar import scenes
from fluxkiln.train.losses import BUILT_IN_GUIDANCE, NOISY, Learner, noised
from fluxkiln.train.recipe import recipe_digest, train_recipe, untrained_components
from fluxkiln.train.recipes import RECIPES, Amounts
from fluxkiln.types import Shapes

FEW = Amounts(
    vae=2, vae_colour=1, vae_tiny=1, words=1, base=2, finer=1, guidance=1, steps=1, pictures=8, vae_pictures=4,
    batch=2, vae_batch=1, words_batch=2, substeps=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    told = []
    train_recipe(
        replace(RECIPES["scenes-dev"], amounts=FEW), folder / "made", folder / "work", lambda *a: told.append(a)
    )
    return folder, told


def test_a_recipe_writes_a_whole_checkpoint(dev):
    folder, told = dev
    from diffusers import FluxPipeline

    with quiet():
        pipe = FluxPipeline.from_pretrained(folder / "made", dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red kiln", height=128, width=128, num_inference_steps=1, max_sequence_length=24, output_type="np")
    assert image.images[0].shape == (128, 128, 3)
    assert list(dict.fromkeys(stage for stage, *_ in told)) == [
        "vae",
        "vae_colour",
        "latents",
        "words",
        "base",
        "finer",
        "guidance",
        "vae_tiny",
    ]
    assert json.loads((folder / "made" / "recipe.json").read_text())["digest"].startswith("sha256:")
    assert "Apache License" in (folder / "made" / "LICENSE").read_text()


def test_it_goes_on_from_what_is_there_to_the_same_bytes(dev, tmp_path):
    folder, _ = dev
    recipe, told = replace(RECIPES["scenes-dev"], amounts=FEW), []
    train_recipe(recipe, tmp_path / "again", folder / "work", lambda stage, *_: told.append(stage))
    assert told == []
    for file in sorted((folder / "made").rglob("*.safetensors")):
        assert (tmp_path / "again" / file.relative_to(folder / "made")).read_bytes() == file.read_bytes()


def test_training_begins_with_the_noise_as_the_velocity():
    model, preset = all_presets()["scenes-dev"]
    made = untrained_components(model, preset.configs, seed=1)
    learner = Learner(model, made, Shapes(128, 128, 24))
    chance = torch.Generator().manual_seed(0)
    pooled, sequence = torch.randn(2, 96, generator=chance), torch.randn(2, 24, 128, generator=chance)
    told = {"pooled_prompt_embeds": pooled, "prompt_embeds": sequence}
    noise = torch.randn(2, 64, 64, generator=chance)
    with torch.no_grad():
        found = learner.predict(made["transformer"], noise, torch.ones(2), told)
    # the last norm gives each token the size that a token of noise has: the root of 64, less the mean over the width
    torch.testing.assert_close(found.norm(dim=-1), torch.full((2, 64), 8.0), rtol=0.05, atol=0)
    # but for the mean over the width, which the last norm takes away
    assert torch.nn.functional.cosine_similarity(found, noise, dim=-1).min() > 0.99


def test_half_of_the_lessons_are_noisy():
    latents, chance = torch.randn(4000, 1, 1), torch.Generator().manual_seed(0)
    _, sigma, velocity = noised(latents, chance)
    assert (sigma[::2] >= NOISY).all()
    # logit-normal around 0.47: P(z > ln 3 - 0.47) of the other half; four standard deviations of a share of 2000
    assert abs((sigma[1::2] >= NOISY).float().mean().item() - 0.265) < 0.04
    assert velocity.shape == latents.shape


def test_the_student_begins_as_the_teacher_with_its_guidance_built_in():
    made = {}
    for name in ("scenes-dev", "scenes-schnell"):
        model, preset = all_presets()[name]
        made[name] = untrained_components(model, preset.configs, seed=1)
    teacher, student = (made[name]["transformer"] for name in made)
    for parameter in teacher.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model.build_in_guidance(teacher, student, BUILT_IN_GUIDANCE)
    learner = Learner(model, made["scenes-dev"], Shapes(128, 128, 24))
    chance = torch.Generator().manual_seed(0)
    pooled, sequence = torch.randn(2, 96, generator=chance), torch.randn(2, 24, 128, generator=chance)
    told = {"pooled_prompt_embeds": pooled, "prompt_embeds": sequence}
    latents, sigma = torch.randn(2, 64, 64, generator=chance), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        expected = learner.predict(teacher, latents, sigma, told, torch.full((2,), BUILT_IN_GUIDANCE))
        found = learner.predict(student, latents, sigma, told)
        other = learner.predict(teacher, latents, sigma, told, 1.0)
    # one sum of three vectors in another order
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - other).abs().max() > 1e-3


def test_the_digest_follows_what_is_made():
    recipe = RECIPES["scenes-dev"]
    digests = {
        recipe_digest(recipe),
        recipe_digest(replace(recipe, seed=1)),
        recipe_digest(replace(recipe, amounts=FEW)),
    }
    assert len(digests) == 3


def test_the_four_step_model_learns_from_the_other(dev, tmp_path):
    folder, _ = dev
    recipe, told = replace(RECIPES["scenes-schnell"], amounts=FEW), []
    made = train_recipe(recipe, tmp_path / "four", tmp_path, lambda stage, *_: told.append(stage), folder / "made")
    assert list(dict.fromkeys(told)) == ["latents", "steps"]
    assert json.loads((made / "transformer" / "config.json").read_text())["guidance_embeds"] is False
    for name in ("vae", "text_encoder_2"):
        file = next((made / name).glob("*.safetensors"))
        assert file.read_bytes() == (folder / "made" / name / file.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "teacher", "words"),
    [
        ("scenes-schnell", None, "learns from scenes-dev.*--teacher DIR"),
        ("scenes-dev", Path("x"), "leave the teacher out"),
    ],
)
def test_a_teacher_is_for_the_recipe_that_has_one(name, teacher, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        train_recipe(RECIPES[name], tmp_path / "made", tmp_path / "work", teacher=teacher)
    assert not any(tmp_path.iterdir())


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError):
        train_recipe(RECIPES["scenes-dev"], tmp_path, tmp_path / "work")


def test_a_trained_preset_that_is_not_there_is_named():
    _, preset = all_presets()["scenes-dev"]
    with pytest.raises(CheckpointError, match="fluxkiln train recipe scenes-dev"):
        trained_folder(replace(preset, trained=Path("/nowhere")))


@pytest.mark.parametrize(
    "name", [name for name, (_, preset) in all_presets().items() if preset.trained and preset.trained.is_dir()]
)
def test_what_ships_was_made_by_the_recipe_of_today(name):
    folder = trained_folder(all_presets()[name][1])
    made = json.loads((folder / "recipe.json").read_text())
    assert made["digest"] == recipe_digest(RECIPES[name])


def test_captions_of_the_recipe_are_of_no_held_out_combination():
    from itertools import islice

    assert not any(scene.held_out for scene, _ in islice(scenes(1), 5000))
