"""The noise that a seed stands for: what `torch.randn` gives on a CPU, to the bit, by numpy and on any machine.

A word of the Mersenne Twister makes each uniform number, Box-Muller two normal ones of two, in groups of eight. The
logarithm, sine and cosine are Cephes' single-precision polynomials; a multiplication with the addition behind it is
rounded once, as the instruction for both does it.

Source: ATen's native/cpu/DistributionTemplates.h (normal_fill) and avx_mathfun.h, as torch 2.13 is compiled for AVX2.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Single = NDArray[np.float32]

_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1,
    2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_LN2_LOW, _LN2_HIGH = np.float32(-2.12194440e-4), np.float32(0.693359375)
_SINE = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COSINE = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
# -pi / 4 in three pieces
_EIGHTH = (-0.78515625, -2.4187564849853515625e-4, -3.77489497744594108e-8)


def normal_noise(shape: tuple[int, ...], seed: int) -> Single:
    """Standard normal numbers [shape] float32: `torch.randn(shape, generator=torch.Generator().manual_seed(seed))`.

    Args:
        shape: of a multiple of 16 elements, at least 16.
        seed: of it the lower 32 bits count, as torch has it.
    """
    size = int(np.prod(shape))
    words = np.frombuffer(np.random.RandomState(seed & 0xFFFFFFFF).bytes(4 * size), "<u4")
    uniform = (words & 0xFFFFFF).astype(np.float32) * np.float32(2.0**-24)
    first, second = uniform.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius = np.sqrt(np.float32(-2) * _log(np.float32(1) - first))
    sine, cosine = _sine_and_cosine(np.float32(2 * np.pi) * second)
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(shape)


def _fused(a: Any, b: Any, c: Any) -> Single:
    """a * b + c in float32, rounded once: the product of two floats fits a double."""
    exact: Single = (np.multiply(a, b, dtype=np.float64) + c).astype(np.float32)
    return exact


def _polynomial(x: Single, coefficients: tuple[float, ...]) -> Single:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = _fused(value, x, np.float32(coefficient))
    return value


def _log(x: Single) -> Single:
    fraction, exponent = np.frexp(x)
    small = fraction < np.float32(0.707106781186547524)
    x = fraction - np.float32(1) + np.where(small, fraction, np.float32(0))
    powers, square = (exponent - small).astype(np.float32), x * x
    value = _fused(_polynomial(x, _LOG) * x, square, powers * _LN2_LOW)
    return _fused(powers, _LN2_HIGH, x + _fused(square, np.float32(-0.5), value))


def _sine_and_cosine(x: Single) -> tuple[Single, Single]:
    octant = ((x * np.float32(4 / np.pi)).astype(np.int32) + 1) & ~1
    for piece in _EIGHTH:
        x = _fused(octant.astype(np.float32), np.float32(piece), x)
    square = x * x
    sine = _fused(_polynomial(square, _SINE) * square, x, x)
    cosine = _polynomial(square, _COSINE) * square
    cosine = _fused(cosine, square, square * np.float32(-0.5)) + np.float32(1)
    turned = (octant & 2) != 0
    return (
        np.where(turned, cosine, sine) * np.where(octant & 4, np.float32(-1), np.float32(1)),
        np.where(turned, sine, cosine) * np.where((octant - 2) & 4, np.float32(1), np.float32(-1)),
    )
