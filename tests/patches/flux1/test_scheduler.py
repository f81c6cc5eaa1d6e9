"""The schedule and its step equal diffusers' own to the bit, with the configs of dev and of schnell."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fluxkiln.errors import CheckpointError
from fluxkiln.patches.flux1.presets import PRESETS
from fluxkiln.patches.flux1.scheduler import noise_levels, take_step, timesteps_of
from fluxkiln.patches.flux1.schemas import OTHER_SCHEDULES, check_configs

# scheduler_config.json of black-forest-labs' repositories
DEV = {
    "_class_name": "FlowMatchEulerDiscreteScheduler", "base_image_seq_len": 256, "base_shift": 0.5,
    "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": 1000, "shift": 3.0,
    "use_dynamic_shifting": True,
}  # fmt: skip
SCHNELL = {**DEV, "shift": 1.0, "use_dynamic_shifting": False}
CONFIGS = {
    "dev": DEV, "schnell": SCHNELL, "linear": {**DEV, "time_shift_type": "linear"},
    "shifted": {**SCHNELL, "shift": 3.0}, "bare": {"_class_name": DEV["_class_name"]},
}  # fmt: skip
STEPS = (1, 2, 4, 7, 20, 28, 50, 64)
TOKENS = (4, 16, 256, 1024, 4096)


def scheduler_of(config):
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_config(config)


def set_steps(scheduler, steps, tokens):
    """As `FluxPipeline.__call__` does it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

    known = scheduler.config
    mu = calculate_shift(tokens, known.base_image_seq_len, known.max_image_seq_len, known.base_shift, known.max_shift)
    retrieve_timesteps(scheduler, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("steps", STEPS)
def test_levels_and_times_are_diffusers(name, steps):
    config = CONFIGS[name]
    scheduler = scheduler_of(config)
    for tokens in TOKENS:
        set_steps(scheduler, steps, tokens)
        sigmas = noise_levels(config, steps, tokens)
        assert sigmas.dtype == np.float32
        np.testing.assert_array_equal(sigmas, scheduler.sigmas.numpy())
        np.testing.assert_array_equal(timesteps_of(config, sigmas), (scheduler.timesteps / 1000).numpy())


@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_steps_are_diffusers(name):
    config = CONFIGS[name]
    scheduler = scheduler_of(config)
    set_steps(scheduler, 28, 1024)
    sigmas = noise_levels(config, 28, 1024)
    random = np.random.default_rng(0)
    latents = random.standard_normal((1, 1024, 64)).astype(np.float32)
    theirs = torch.from_numpy(latents)
    for step, time in enumerate(scheduler.timesteps):
        velocity = random.standard_normal(latents.shape).astype(np.float32)
        latents = take_step(latents, velocity, sigmas, step)
        theirs = scheduler.step(torch.from_numpy(velocity), time, theirs, return_dict=False)[0]
        np.testing.assert_array_equal(latents, theirs.numpy())


def test_the_comparison_can_fail():
    """One rounding more, in the shift alone, is seen."""
    scheduler = scheduler_of(DEV)
    set_steps(scheduler, 28, 1024)
    exact = np.linspace(1.0, 1 / 28, 28)
    shift = math.exp(0.5 + (1024 - 256) * 0.65 / 3840)
    assert (np.float32(shift / (shift + 1 / exact - 1)) != scheduler.sigmas[:-1].numpy()).any()


def test_presets_have_the_published_schedules():
    for preset in PRESETS.values():
        published = DEV if preset.variant == "dev" else SCHNELL
        mine = preset.configs["scheduler"]
        np.testing.assert_array_equal(noise_levels(mine, 28, 4096), noise_levels(published, 28, 4096))


@pytest.mark.parametrize("key", OTHER_SCHEDULES)
def test_other_schedules_are_refused(key):
    with pytest.raises(CheckpointError, match=f"asks for {key}, which no FLUX.1 does"):
        check_configs({"scheduler": {**DEV, key: 0.1 if key == "shift_terminal" else True}}, "here")
    check_configs({"scheduler": {**DEV, key: None if key == "shift_terminal" else False}}, "here")
