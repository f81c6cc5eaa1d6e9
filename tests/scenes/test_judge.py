"""The judge on drawings it never saw, and on pictures that do not show what was asked for."""

from itertools import islice

import numpy as np
import pytest

from fluxkiln.scenes.adherence import PROMPT_SEED, adherence, fixed_prompts
from fluxkiln.scenes.grammar import scenes
from fluxkiln.scenes.judge import distance, drawn, read_scenes


@pytest.fixture(scope="module")
def asked():
    return list(islice(scenes(PROMPT_SEED, held_out=True), 200))


@pytest.fixture(scope="module")
def pictures(asked):
    return drawn(asked)


def test_it_reads_drawings_of_the_fixed_prompts(asked, pictures):
    found = adherence(fixed_prompts(), read_scenes(pictures))
    # what the judge itself gets wrong counts against every model; a tenth of what models may miss
    assert found.facts >= 0.995
    assert found.prompts >= 0.97
    assert found.chance < 0.5


def test_pictures_of_other_prompts_are_found_out(asked, pictures):
    """Negative control: everything shifted by one."""
    found = adherence([prompt for _, prompt in asked], read_scenes([*pictures[1:], pictures[0]]))
    assert found.facts < 0.5
    assert found.prompts < 0.05
    assert found.wrong


def test_noise_shows_nothing(asked):
    noise = np.random.default_rng(0).integers(0, 256, (20, 128, 128, 3), dtype=np.uint8)
    assert adherence([prompt for _, prompt in asked[:20]], read_scenes(list(noise))).prompts < 0.1


def test_the_distance_grows_with_the_difference(pictures):
    picture = pictures[0]
    noise = np.random.default_rng(0).normal(0, 20, picture.shape)
    noisy = np.clip(picture + noise, 0, 255).astype(np.uint8)
    assert distance(picture, picture) == 0
    assert 0 < distance(picture, noisy) < distance(picture, pictures[1])


def test_larger_pictures_are_read_at_the_size_of_the_drawings(pictures):
    larger = [np.repeat(np.repeat(picture, 2, axis=0), 2, axis=1) for picture in pictures[:8]]
    assert read_scenes(larger) == read_scenes(pictures[:8])
