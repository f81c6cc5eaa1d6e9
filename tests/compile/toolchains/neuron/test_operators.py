"""Operators of ours against torch's own kernels: float32 to rounding, bfloat16 to one step of it."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
jax = pytest.importorskip("jax")

from torch.nn import functional  # noqa: E402

from fluxkiln.compile.toolchains.neuron import operators  # noqa: E402


def tensor(*shape, seed=0, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


X, WEIGHT, BIAS = tensor(2, 6, 32), tensor(8, 32, seed=1, scale=0.2), tensor(8, seed=2)
SCALE, SHIFT = tensor(32, seed=3), tensor(32, seed=4)
IMAGE, KERNEL, CHANNELS = tensor(1, 8, 6, 7), tensor(4, 8, 3, 3, seed=5, scale=0.1), tensor(8, seed=6)
HEADS = [tensor(1, 2, 6, 16, seed=seed) for seed in (7, 8, 9)]

CASES = {
    "linear": (functional.linear, operators.linear, (X, WEIGHT, BIAS), {}),
    "linear without bias": (functional.linear, operators.linear, (X, WEIGHT), {}),
    "conv2d": (functional.conv2d, operators.conv2d, (IMAGE, KERNEL, BIAS[:4]), {"padding": 1, "stride": (2, 1)}),
    "conv2d in groups": (functional.conv2d, operators.conv2d, (IMAGE, KERNEL[:, :4]), {"groups": 2, "dilation": 2}),
    "attention": (functional.scaled_dot_product_attention, operators.attention, tuple(HEADS), {}),
    "attention, scaled": (functional.scaled_dot_product_attention, operators.attention, tuple(HEADS), {"scale": 0.7}),
    "attention, causal": (
        functional.scaled_dot_product_attention, operators.attention, tuple(HEADS), {"is_causal": True},
    ),
    "attention, bias": (
        functional.scaled_dot_product_attention, operators.attention, (*HEADS, tensor(6, 6, seed=10)), {},
    ),
    "layer norm": (functional.layer_norm, operators.layer_norm, (X, (32,), SCALE, SHIFT, 1e-6), {}),
    "layer norm, bare": (functional.layer_norm, operators.layer_norm, (X + 3, (6, 32)), {}),
    "rms norm": (functional.rms_norm, operators.rms_norm, (X, (32,), SCALE, 1e-6), {}),
    "rms norm, bare": (functional.rms_norm, operators.rms_norm, (X, (32,)), {}),
    "group norm": (functional.group_norm, operators.group_norm, (IMAGE + 2, 4, CHANNELS, CHANNELS + 1), {}),
    "group norm, bare": (functional.group_norm, operators.group_norm, (X, 3), {}),
    "gelu tanh": (functional.gelu, operators.gelu, (X,), {"approximate": "tanh"}),
    "gelu": (functional.gelu, operators.gelu, (X,), {}),
    "silu": (functional.silu, operators.silu, (X,), {}),
    "softmax": (functional.softmax, operators.softmax, (X, 1), {}),
    "softmax to float32": (functional.softmax, operators.softmax, (X, -1), {"dtype": torch.float32}),
    "square": (torch.pow, operators.power, (X, 2), {}),
    "root": (torch.pow, operators.power, (X.abs(), 0.5), {}),
    "add": (torch.add, operators.add, (X, SCALE), {"alpha": 2}),
    "subtract": (torch.sub, operators.subtract, (X, 0.5), {}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_equals_torch(case, dtype):
    reference, ours, arguments, options = CASES[case]
    cast = [a.to(getattr(torch, dtype)) if isinstance(a, torch.Tensor) else a for a in arguments]
    expected = reference(*cast, **options)
    with jax.default_matmul_precision("highest"):
        found = ours(*(as_jax(a) for a in cast), **options)
    assert str(found.dtype) == str(expected.dtype).removeprefix("torch.")
    difference = np.abs(np.asarray(found, np.float64) - expected.double().numpy())
    step = {"float32": 2**-20, "bfloat16": 2**-7}[dtype]
    bound = step * np.maximum(np.abs(expected.double().numpy()), 0.25 if dtype == "bfloat16" else 1)
    assert (difference <= bound).all(), f"{(difference / bound).max():.2f} of the bound"


def as_jax(value):
    if not isinstance(value, torch.Tensor):
        return value
    return jax.numpy.asarray(value.float().numpy()).astype(str(value.dtype).removeprefix("torch."))


def test_masks_of_booleans_and_rows_of_a_table():
    mask = tensor(6, 6, seed=11) > -1
    expected = functional.scaled_dot_product_attention(*HEADS, mask)
    found = operators.attention(*map(as_jax, HEADS), jax.numpy.asarray(mask.numpy()))
    np.testing.assert_allclose(np.asarray(found), expected.numpy(), atol=1e-6)
    ids = torch.tensor([[3, 0, 7]], dtype=torch.int32)
    rows = operators.embedding(jax.numpy.asarray(ids.numpy()), as_jax(WEIGHT), -1, None, 2.0, False, False)
    np.testing.assert_array_equal(np.asarray(rows), functional.embedding(ids, WEIGHT).numpy())


def test_sums_and_norms_work_in_float32():
    """In bfloat16 the weights of 300 equal values do not sum to one, and what is large is not centred."""
    ones = jax.numpy.ones((1, 300, 16), "bfloat16")
    assert (np.asarray(operators.attention(ones, ones, ones), np.float32) == 1).all()
    large = (tensor(1, 512) + 100).to(torch.bfloat16)
    expected = functional.layer_norm(large.float(), (512,)).numpy()
    found = np.asarray(operators.layer_norm(as_jax(large), (512,)), np.float32)
    assert np.abs(found - expected).max() <= 0.02


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: operators.attention(x, x, x, dropout_p=0.1), "dropout"),
        (lambda x: operators.attention(x, x, x, enable_gqa=True), "grouped"),
        (lambda x: operators.conv2d(x, x, padding="same"), "padding 'same'"),
    ],
)
def test_what_is_not_covered_is_named(call, message):
    with pytest.raises(NotImplementedError, match=message):
        call(as_jax(HEADS[0]))
