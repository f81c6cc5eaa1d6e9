"""diffusers' FlowMatchEulerDiscreteScheduler (checked with 0.42.1) as FluxPipeline uses it, in numpy, equal to the bit.

Source: its `set_timesteps` and `step`, and `calculate_shift` of diffusers' pipeline_flux.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TRAINED_STEPS = 1000


def noise_levels(config: Mapping[str, Any], steps: int, image_tokens: int) -> NDArray[np.float32]:
    """The share of noise before each step, and 0 after the last: [steps + 1] float32.

    Args:
        config: `scheduler_config.json`; where a key is missing diffusers' default counts.
    """
    import numpy as np

    sigmas: Any = np.linspace(1.0, 1 / steps, steps).astype(np.float32)
    if config.get("use_dynamic_shifting", False):
        shift = shift_for(config, image_tokens)
        if config.get("time_shift_type", "exponential") == "exponential":
            shift = math.exp(shift)
        sigmas = shift / (shift + (1 / sigmas - 1))
    else:
        shift = config.get("shift", 1.0)
        sigmas = shift * sigmas / (1 + (shift - 1) * sigmas)
    return np.append(sigmas, np.float32(0))


def timesteps_of(config: Mapping[str, Any], sigmas: NDArray[np.float32]) -> NDArray[np.float32]:
    """The times [steps] that the transformer is told, in 0..1, of the levels before each step."""
    times: NDArray[np.float32] = sigmas[:-1] * config.get("num_train_timesteps", TRAINED_STEPS) / TRAINED_STEPS
    return times


def take_step(latents: NDArray[np.float32], velocity: Any, sigmas: NDArray[np.float32], step: int) -> Any:
    """Latents after `step`, counted from 0: along the velocity from one level of noise to the next."""
    return latents + (sigmas[step + 1] - sigmas[step]) * velocity


def shift_for(config: Mapping[str, Any], image_tokens: int) -> float:
    """How far the schedule is shifted for an image of this many tokens; mu in diffusers."""
    base, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    slope = (high - low) / (most - base)
    return float(image_tokens * slope + (low - slope * base))
