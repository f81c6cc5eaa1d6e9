"""Weights of several distributions for tests: what 4 bits find easy and what they do not."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from fluxkiln.quantize.calibration import Statistics
from fluxkiln.quantize.integer import pack_integer
from fluxkiln.quantize.pack import dequantize, pack_by, pack_into
from fluxkiln.quantize.rounders import make_rounder, stored_weight
from fluxkiln.quantize.schemes import parse_scheme


def gather(inputs_NI, block):
    """Statistics of inputs that are all in memory; `block` channels in each block, 0 for all of them in one."""
    count, width = inputs_NI.shape
    side = block or width
    blocks = []
    for start in range(0, width, side):
        some = inputs_NI[:, start : start + side]
        blocks.append((some.T @ some / np.float32(count)).astype(np.float32))
    return Statistics(tuple(blocks), np.abs(inputs_NI).mean(0, dtype=np.float64).astype(np.float32), count)


def pack_int4(weight, group_size):
    return pack_by(pack_into, weight, group_size, 4)


def pack_int8(weight, group_size):
    return pack_by(pack_into, weight, group_size, 8)


def pack_matrix(weight, scheme, statistics=None):
    return pack_by(make_rounder(scheme, statistics), weight, scheme.group_size, scheme.weight_bits)


def stored_as(scheme, weight, quantized=True):
    """The numbers that are multiplied with where a weight is stored under `scheme`, as a matmul's or any other."""
    if not (quantized and scheme.weight_bits):
        return stored_weight(weight, scheme)
    if scheme.integer:
        return pack_integer(weight).dequantize()
    return dequantize(pack_matrix(weight, scheme), scheme.group_size)


def make_weight(kind, shape, seed=0):
    """bfloat16: `gaussian`, `uniform`, `student` (5 degrees of freedom), `cauchy` (2), `channels`."""
    rng = np.random.default_rng(seed)
    if kind == "uniform":
        values = rng.uniform(-1, 1, shape)
    elif kind in ("student", "cauchy"):
        values = rng.standard_t({"student": 5, "cauchy": 2}[kind], shape)
    else:
        values = rng.standard_normal(shape)
    if kind == "channels":
        values[:, rng.choice(shape[1], shape[1] // 64, replace=False)] *= 8
    return (values * 0.02).astype(ml_dtypes.bfloat16)


def make_inputs(count, width, seed):
    """Correlated inputs with outlier channels; the same correlations for every seed."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    mixing = fixed.standard_normal((width // 4, width)) / np.sqrt(width // 4)
    channels = np.exp(0.5 * fixed.standard_normal(width))
    channels[fixed.choice(width, width // 64, replace=False)] *= 8
    rows = rng.standard_normal((count, width // 4)) @ mixing + 0.5 * rng.standard_normal((count, width))
    return (rows * channels).astype(np.float32)


def relative_error(weight, name, statistics=None, inputs=None):
    """Of the weight packed as scheme `name` says, or of its outputs where inputs are given."""
    scheme = parse_scheme(name)
    stored = dequantize(pack_matrix(weight, scheme, statistics), scheme.group_size)
    return relative(stored, weight, inputs)


def relative(stored, weight, inputs=None):
    exact = weight.astype(np.float32)
    if inputs is None:
        return np.linalg.norm(stored - exact) / np.linalg.norm(exact)
    return np.linalg.norm(inputs @ (stored - exact).T) / np.linalg.norm(inputs @ exact.T)
