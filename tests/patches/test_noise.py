"""A seed's noise is torch's, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fluxkiln.patches.noise import normal_noise


def torch_noise(shape, seed):
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)).numpy()


@pytest.mark.parametrize(
    ("shape", "seed"),
    [((1, 16, 2, 2), 0), ((1, 16, 8, 12), 1), ((1, 16, 128, 128), 7), ((1, 16, 2, 2), 2**32 + 5), ((16,), 2**63 - 1)],
)
def test_it_is_torchs(shape, seed):
    made, theirs = normal_noise(shape, seed), torch_noise(shape, seed)
    assert made.dtype == np.float32
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        np.testing.assert_array_equal(made.view(np.uint32), theirs.view(np.uint32))
    # four units in the last place of numbers up to 4
    np.testing.assert_allclose(made, theirs, rtol=0, atol=1e-6)


def test_a_fused_rounding_is_seen():
    """Without it one number in a hundred differs, so equality to the bit is no accident."""
    import fluxkiln.patches.noise as module

    shape = (1, 16, 32, 32)
    exact, fused = normal_noise(shape, 3), module._fused
    module._fused = lambda a, b, c: a * b + c
    try:
        assert 0 < (normal_noise(shape, 3) != exact).mean() < 0.05
    finally:
        module._fused = fused


def test_seeds_differ():
    assert np.abs(normal_noise((64,), 1) - normal_noise((64,), 2)).max() > 0.1
