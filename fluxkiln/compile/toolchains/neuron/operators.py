"""Torch operators given to torchax in place of its own, because of what its own put into the graph.

Its group norm is a loop of one turn, its sums multiply by one, its squares are powers, its embedding has a branch for
ids out of range; and norms, softmax, attention and activations work in bfloat16 throughout, where torch's own
kernels work in float32 and round once. Functions here take and return jax arrays and follow torch's signatures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax

_Array = Any  # jax.Array
_WIDE = jnp.dtype("float32")
_EPSILON = 2.0**-23


def replacements() -> Mapping[Any, Callable[..., Any]]:
    """Torch functions and operators, each with what computes it."""
    aten, functional = torch.ops.aten, torch.nn.functional
    functions: dict[Callable[..., Any], list[Any]] = {
        linear: [functional.linear],
        conv2d: [functional.conv2d],
        attention: [functional.scaled_dot_product_attention, aten.scaled_dot_product_attention],
        layer_norm: [functional.layer_norm],
        rms_norm: [functional.rms_norm],
        group_norm: [functional.group_norm],
        embedding: [functional.embedding],
        gelu: [functional.gelu, aten.gelu],
        silu: [functional.silu, aten.silu, aten.silu.default],
        softmax: [functional.softmax, torch.softmax, torch.Tensor.softmax, aten.softmax, aten.softmax.int],
        lambda x, dim, _half_to_float: softmax(x, dim): [aten._softmax],
        power: [aten.pow],
        add: [aten.add.Tensor, aten.add.Scalar],
        subtract: [aten.sub.Tensor, aten.sub.Scalar],
    }
    return {operator: function for function, operators in functions.items() for operator in operators}


def linear(input: _Array, weight: _Array, bias: _Array | None = None) -> _Array:
    """[..., in] times weight [out, in]; a bias is added before the one rounding, as torch's own kernels do."""
    contract = (((input.ndim - 1,), (1,)), ((), ()))
    if bias is None:
        return lax.dot_general(input, weight, contract)
    return _affine(lax.dot_general(input, weight, contract, preferred_element_type=_WIDE), None, bias, input.dtype)


def conv2d(
    input: _Array,
    weight: _Array,
    bias: _Array | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> _Array:
    """[batch, in, height, width] with weight [out, in / groups, height, width]; bias as in `linear`."""
    if isinstance(padding, str):
        raise NotImplementedError(f"conv2d with padding {padding!r}")
    y = lax.conv_general_dilated(
        input,
        weight,
        _pair(stride),
        [(size, size) for size in _pair(padding)],
        rhs_dilation=_pair(dilation),
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=groups,
        preferred_element_type=input.dtype if bias is None else _WIDE,
    )
    return _affine(y, None, None if bias is None else bias.reshape(1, -1, 1, 1), input.dtype)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def attention(
    query: _Array,
    key: _Array,
    value: _Array,
    attn_mask: _Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> _Array:
    """softmax(Q K^T * scale + mask) V over [..., tokens, head_dim]; scores, softmax and sums in float32.

    The division by the softmax's sum comes last, where it is on [tokens, head_dim] instead of [tokens, tokens].
    """
    if dropout_p or enable_gqa:
        raise NotImplementedError("attention with dropout or grouped queries")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    batch = tuple(range(query.ndim - 2))
    last, tokens = query.ndim - 1, query.ndim - 2
    scores = factor * lax.dot_general(query, key, (((last,), (last,)), (batch, batch)), preferred_element_type=_WIDE)
    if is_causal:
        rows, columns = (lax.broadcasted_iota(jnp.int32, scores.shape[-2:], axis) for axis in (0, 1))
        attn_mask = rows >= columns
    if attn_mask is not None:
        masked = attn_mask.dtype == jnp.bool_
        scores = jnp.where(attn_mask, scores, -jnp.inf) if masked else scores + attn_mask.astype(scores.dtype)
    powers = jnp.exp(scores - jnp.max(scores, -1, keepdims=True))
    weighted = lax.dot_general(
        powers.astype(value.dtype), value, (((last,), (tokens,)), (batch, batch)), preferred_element_type=_WIDE
    )
    return (weighted / jnp.sum(powers, -1, keepdims=True)).astype(value.dtype)


def layer_norm(
    input: _Array,
    normalized_shape: Sequence[int],
    weight: _Array | None = None,
    bias: _Array | None = None,
    eps: float = 1e-5,
) -> _Array:
    axes = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    return _affine(_standardised(input, axes, eps), weight, bias, input.dtype)


def rms_norm(
    input: _Array, normalized_shape: Sequence[int], weight: _Array | None = None, eps: float | None = None
) -> _Array:
    axes = tuple(range(input.ndim - len(normalized_shape), input.ndim))
    wide = input.astype(_WIDE)
    mean = jnp.mean(wide * wide, axes, keepdims=True)
    return _affine(wide * lax.rsqrt(mean + (_EPSILON if eps is None else eps)), weight, None, input.dtype)


def group_norm(
    input: _Array, num_groups: int, weight: _Array | None = None, bias: _Array | None = None, eps: float = 1e-5
) -> _Array:
    """Over [batch, channels, ...]."""
    grouped = input.reshape(input.shape[0], num_groups, -1)
    normal = _standardised(grouped, (2,), eps).reshape(input.shape)
    per_channel = (1, input.shape[1], *(1 for _ in input.shape[2:]))
    weight = None if weight is None else weight.reshape(per_channel)
    bias = None if bias is None else bias.reshape(per_channel)
    return _affine(normal, weight, bias, input.dtype)


def _standardised(input: _Array, axes: tuple[int, ...], eps: float) -> _Array:
    """Mean zero and variance one over `axes`, float32."""
    wide = input.astype(_WIDE)
    centred = wide - jnp.mean(wide, axes, keepdims=True)
    variance = jnp.mean(centred * centred, axes, keepdims=True)
    return centred * lax.rsqrt(variance + eps)


def _affine(input: _Array, weight: _Array | None, bias: _Array | None, dtype: Any) -> _Array:
    if weight is not None:
        input = input * weight.astype(input.dtype)
    if bias is not None:
        input = input + bias.astype(input.dtype)
    return input.astype(dtype)


def embedding(input: _Array, weight: _Array, padding_idx: int | None = None, *_: Any, **__: Any) -> _Array:
    """Rows of `weight`; ids out of range, which torch refuses, take the nearest row."""
    return jnp.take(weight, input, axis=0, mode="clip")


def gelu(input: _Array, approximate: str = "none") -> _Array:
    return jax.nn.gelu(input.astype(_WIDE), approximate == "tanh").astype(input.dtype)


def silu(input: _Array, inplace: bool = False) -> _Array:
    wide = input.astype(_WIDE)
    return (wide * lax.logistic(wide)).astype(input.dtype)


def softmax(input: _Array, dim: int, _stacklevel: int = 3, dtype: Any = None) -> _Array:
    """In float32; the result has `dtype`, or that of `input`."""
    result = input.dtype if dtype is None else str(dtype).removeprefix("torch.")
    return jax.nn.softmax(input.astype(_WIDE), dim).astype(result)


def power(x: Any, y: Any) -> _Array:
    if isinstance(y, int | float) and y == int(y) and 0 <= y <= 4:
        return lax.integer_pow(x, int(y))
    return jnp.power(x, y)


def add(x: Any, y: Any, alpha: Any = 1) -> _Array:
    return jnp.add(x, y if alpha == 1 else y * alpha)


def subtract(x: Any, y: Any, alpha: Any = 1) -> _Array:
    return jnp.subtract(x, y if alpha == 1 else y * alpha)
