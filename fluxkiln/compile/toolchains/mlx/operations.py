"""ONNX's operations, those that graphs of models have, as MLX computes them.

Source: onnx.ai/onnx/operators, opset 23; ml-explore.github.io/mlx, mlx 0.32.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fluxkiln.errors import CompileError

# attributes, arrays -> an array, or some
Compute = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix [O, I] in MLX's codes; `turned`: it stands for its transpose."""

    planes: tuple[Any, Any, Any]
    bits: int
    group: int
    turned: bool = False

    def multiply(self, mx: Any, x: Any, turned: bool) -> Any:
        """x times the matrix as it stands, or times its transpose for `turned`."""
        return mx.quantized_matmul(
            x, *self.planes, transpose=self.turned != turned, group_size=self.group, bits=self.bits
        )

    def cut(self, axis: int, start: int, stop: int) -> Codes:
        """Rows or columns of it; of columns, whole groups."""
        if self.turned:
            axis = 1 - axis
        groups = self.planes[1].shape[1] * self.group
        if axis and (start % self.group or min(stop, groups) % self.group):
            raise CompileError(f"columns {start} to {stop} are no whole groups of {self.group}; build for cpu")
        planes = []
        for plane in self.planes:
            first, last = ((end * plane.shape[1] // groups if axis else end) for end in (start, min(stop, groups)))
            planes.append(plane[:, first:last] if axis else plane[start:stop])
        return replace(self, planes=tuple(planes))


def known_operations(mx: Any) -> Mapping[str, Compute]:
    """What runs each type of operation. Whole numbers come as lists, or as one where they are one."""

    def matmul(how: Any, x: Any, w: Any) -> Any:
        return w.multiply(mx, x, False) if isinstance(w, Codes) else x @ w

    def gemm(how: Any, x: Any, w: Any, bias: Any = None) -> Any:
        if how.get("transA") or how.get("alpha", 1.0) != 1.0 or how.get("beta", 1.0) != 1.0:
            raise CompileError(f"a product with {how} is none that MLX is given here; build for cpu")
        turned = bool(how.get("transB"))
        made = w.multiply(mx, x, turned) if isinstance(w, Codes) else x @ (w.T if turned else w)
        return made if bias is None else made + bias

    def transpose(how: Any, x: Any) -> Any:
        return replace(x, turned=not x.turned) if isinstance(x, Codes) else x.transpose(*how["perm"])

    def cut(how: Any, x: Any, starts: Any, ends: Any, axes: Any, steps: Any = None) -> Any:
        if isinstance(x, Codes):
            (axis,), (start,), (stop,) = axes, starts, ends
            return x.cut(axis, start, stop)
        places = [slice(None)] * x.ndim
        for start, end, axis, step in zip(starts, ends, axes, steps or [1] * len(axes), strict=True):
            places[axis] = slice(start, min(end, x.shape[axis]), step)
        return x[tuple(places)]

    def convolve(how: Any, x: Any, kernel: Any, bias: Any = None) -> Any:
        top, left, *ends = how["pads"]
        if ends != [top, left] or how.get("group", 1) != 1:
            raise CompileError(f"a convolution with {how} is none that MLX is given here; build for cpu")
        made = mx.conv2d(
            x.transpose(0, 2, 3, 1), kernel.transpose(0, 2, 3, 1), how["strides"], (top, left), how["dilations"]
        )
        return (made if bias is None else made + bias).transpose(0, 3, 1, 2)

    def normalize_groups(how: Any, x: Any, scale: Any, bias: Any) -> Any:
        groups = x.astype(mx.float32).reshape(x.shape[0], how["num_groups"], -1)
        mean, spread = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
        made = ((groups - mean) * mx.rsqrt(spread + how["epsilon"])).reshape(x.shape).astype(x.dtype)
        per_channel = (1, -1, *[1] * (x.ndim - 2))
        return made * scale.reshape(per_channel) + bias.reshape(per_channel)

    def attend(how: Any, q: Any, k: Any, v: Any) -> Any:
        scale = how.get("scale", 1 / math.sqrt(q.shape[-1]))
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale)

    def enlarge(how: Any, x: Any, _: Any, scales: Any) -> Any:
        for axis, scale in enumerate(scales.tolist()):
            x = mx.repeat(x, int(scale), axis) if scale != 1 else x
        return x

    def gelu(how: Any, x: Any) -> Any:
        if how.get("approximate") == "tanh":
            return 0.5 * x * (1 + mx.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        return 0.5 * x * (1 + mx.erf(x / math.sqrt(2)))

    return {
        "Add": lambda how, x, y: x + y,
        "Sub": lambda how, x, y: x - y,
        "Mul": lambda how, x, y: x * y,
        "Div": lambda how, x, y: x / y,
        "Pow": lambda how, x, y: x**y,
        "Neg": lambda how, x: -x,
        "Sqrt": lambda how, x: mx.sqrt(x),
        "Reciprocal": lambda how, x: 1 / x,
        "Round": lambda how, x: mx.round(x),
        "Sin": lambda how, x: mx.sin(x),
        "Cos": lambda how, x: mx.cos(x),
        "Tanh": lambda how, x: mx.tanh(x),
        "Relu": lambda how, x: mx.maximum(x, 0),
        "Sigmoid": lambda how, x: mx.sigmoid(x),
        "Gelu": gelu,
        "Cast": lambda how, x: x.astype({1: mx.float32, 7: mx.int64, 10: mx.float16, 16: mx.bfloat16}[how["to"]]),
        "Transpose": transpose,
        "Reshape": lambda how, x, shape: x.reshape(shape),
        "Unsqueeze": lambda how, x, axes: mx.expand_dims(x, axes),
        "Squeeze": lambda how, x, axes: mx.squeeze(x, axes),
        "Slice": cut,
        "Split": lambda how, x: mx.split(x, how["num_outputs"], how["axis"]),
        "Concat": lambda how, *xs: mx.concatenate(xs, how["axis"]),
        "Gather": lambda how, x, rows: mx.take(x, rows, how.get("axis", 0)),
        "MatMul": matmul,
        "Gemm": gemm,
        "Conv": convolve,
        "Attention": attend,
        "Softmax": lambda how, x: mx.softmax(x, how.get("axis", -1), precise=True),
        "ReduceMean": lambda how, x, axes: mx.mean(x, axes, keepdims=bool(how.get("keepdims", 1))),
        "LayerNormalization": lambda how, x, scale, bias=None: mx.fast.layer_norm(x, scale, bias, how["epsilon"]),
        "RMSNormalization": lambda how, x, scale: mx.fast.rms_norm(x, scale, how["epsilon"]),
        "GroupNormalization": normalize_groups,
        "Resize": enlarge,
    }
