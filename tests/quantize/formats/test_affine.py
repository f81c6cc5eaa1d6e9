"""MLX4 and MLX8 against the definition of `mlx.core.quantize`; MLX itself judges them in toolchains/mlx."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.formats import FILE_FORMATS

BITS = {"MLX4": 4, "MLX8": 8}


def sample():
    """Gaussian rows, and what is easily done wrong: zeros, one sign, two ends of one magnitude, tiny and large ones."""
    rows = np.random.default_rng(0).standard_normal((32, 512)).astype(np.float32) * np.float32(0.03)
    rows[0] = 0
    rows[1] = np.abs(rows[1])
    rows[2] = -np.abs(rows[2])
    rows[3, ::32], rows[3, 5::32] = 0.5, -0.5
    rows[4] *= np.float32(1e-30)
    rows[5], rows[6] = 0.25, -0.25
    rows[7, ::64] = 1e4
    return rows.astype(ml_dtypes.bfloat16)


def defined(weight, bits):
    """Codes, scales and biases, one number at a time."""
    groups, top = weight.astype(np.float32).reshape(-1, 64), np.float32((1 << bits) - 1)
    codes, scales, biases = np.empty(groups.shape, np.uint8), [], []
    for group, values in enumerate(groups):
        low, high = values.min(), values.max()
        scale = max((high - low) / top, np.float32(1e-7))
        scale, edge = (scale, low) if abs(low) > abs(high) else (-scale, high)
        steps = np.rint(edge / scale)
        scale, bias = (edge / steps, edge) if steps != 0 else (scale, np.float32(0))
        codes[group] = np.clip(np.rint((values - bias) / scale), 0, top)
        scales.append(scale)
        biases.append(bias)
    packed = codes if bits == 8 else codes[:, 0::2] | (codes[:, 1::2] << 4)
    return (packed, *(np.array(one, np.float32).astype(ml_dtypes.bfloat16) for one in (scales, biases)))


@pytest.mark.parametrize("name", BITS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bytes_are_as_defined(name, dtype):
    weight = sample().astype(getattr(ml_dtypes, dtype, dtype))
    planes = FILE_FORMATS[name].pack(weight)
    for plane, expected in zip(planes, defined(weight, BITS[name]), strict=True):
        np.testing.assert_array_equal(plane, expected.reshape(len(weight), -1).view(np.uint8))


@pytest.mark.parametrize(("name", "bound"), [("MLX4", 0.1), ("MLX8", 0.008)])
def test_error_of_gaussian_weights(name, bound):
    rows = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    found = FILE_FORMATS[name].unpack(FILE_FORMATS[name].pack(rows))
    assert np.linalg.norm(found - rows) / np.linalg.norm(rows) < bound


def test_widths_that_groups_do_not_divide_are_refused():
    with pytest.raises(SchemeError, match=r"MLX4 stores 64 input channels together, which does not divide 96"):
        FILE_FORMATS["MLX4"].pack(np.zeros((2, 96), np.float32))
