"""A numpy model with the shape of FLUX.1's ladder: real arithmetic at every rung, small enough for milliseconds.

A block adds `tanh(x W1 + b) W2` to its input. Its rungs differ the way the real ones do: float32 in another order,
float32 with the matmuls split, 4-bit weights, bfloat16 everywhere, and bfloat16 in another order.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field

import numpy as np
import pytest

from fluxkiln.patches.flux1.kinds import KINDS
from tests.builds import chip_ladder

TOKENS, WIDTH, GROUP = 12, 64, 16
RUNGS = ("patched", "onnxruntime", "dequantized", "interpreter", "simulator")


def bf16(x):
    """`x` rounded to bfloat16, to nearest even, still stored as float32."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)).view(np.float32)


def quantize(weight_KN, scheme, doubled=None):
    """Weights as `scheme` stores them. `doubled`: (group, column) whose scale is stored twice too large."""
    if scheme == "W4BF16":
        groups = weight_KN.reshape(-1, GROUP, weight_KN.shape[1])
        low, high = groups.min(1, keepdims=True), groups.max(1, keepdims=True)
        scale = (high - low) / 15
        zero = np.clip(np.round(-low / scale), 0, 15)
        codes = np.clip(np.round(groups / scale) + zero, 0, 15)
        scale = bf16(scale)
        if doubled is not None:
            scale[doubled[0], 0, doubled[1]] *= 2
        return ((codes - zero) * scale).reshape(weight_KN.shape).astype(np.float32)
    return {"BF16": bf16, "F16": lambda w: w.astype(np.float16).astype(np.float32), "F32": np.array}[scheme](weight_KN)


@dataclass
class ToyPart:
    """One output of one part; `scheme` decides how its upper rungs compute."""

    name: str
    kind: str
    output: str
    scheme: str
    weights: tuple = field(init=False, repr=False)

    def __post_init__(self):
        rng = np.random.default_rng(zlib.crc32(f"{self.name} {self.output}".encode()))
        self.weights = (
            (rng.standard_normal((WIDTH, WIDTH)) / 8).astype(np.float32),
            (rng.standard_normal((WIDTH, WIDTH)) / 5).astype(np.float32),
            (rng.standard_normal(WIDTH) / 4).astype(np.float32),
        )

    @property
    def residual(self):
        return self.output in dict(KINDS[self.kind].residual)

    def base(self, step):
        rng = np.random.default_rng(zlib.crc32(f"input {self.name} {self.output} {step}".encode()))
        return bf16(rng.standard_normal((TOKENS, WIDTH)))

    def run(self, rung, step, doubled=None, forget_bias=False):
        """The output at `rung`, float32 [TOKENS, WIDTH]."""
        x, (w1, w2, bias) = self.base(step), self.weights
        if forget_bias:
            bias = 0 * bias
        if rung in ("dequantized", "interpreter", "simulator"):
            w1, w2 = quantize(w1, self.scheme), quantize(w2, self.scheme, doubled)
        dtype = np.float64 if rung == "reference" else np.float32
        split = {"onnxruntime": 16, "simulator": 32}.get(rung, WIDTH)
        low = rung in ("interpreter", "simulator") and self.scheme != "F32"
        narrow = (
            {"F16": lambda a: a.astype(np.float16).astype(np.float32)}.get(self.scheme, bf16) if low else np.asarray
        )

        def matmul(a, b):
            a, b = narrow(a).astype(dtype), narrow(b).astype(dtype)
            return sum(a[:, i : i + split] @ b[i : i + split] for i in range(0, WIDTH, split))

        added = matmul(np.tanh(matmul(x, w1) + narrow(bias)), w2)
        return narrow(x + added if self.residual else added).astype(np.float32)


def toy_parts(doubles=2, singles=3, encoders=2, scheme="W4BF16"):
    """Parts of a small FLUX.1 with the default schemes, one entry per output."""
    many = [(f"t5_block.{i:02d}", "t5_block", scheme) for i in range(encoders)]
    many += [(f"double.{i:02d}", "double", scheme) for i in range(doubles)]
    many += [(f"single.{i:02d}", "single", scheme) for i in range(singles)]
    once = [("clip", "F16"), ("t5_embed", "F16"), ("t5_final", "BF16"), ("head", "BF16"), ("tail", "BF16")]
    once += [("vae_decoder", "BF16")]
    named = [(name, name, scheme) for name, scheme in once] + many
    return [ToyPart(name, kind, output, scheme) for name, kind, scheme in named for output in KINDS[kind].outputs]


@dataclass
class Recording:
    """Outputs of all parts at all rungs: {(part, output, step): {rung: array}}. Tests spoil entries, then compare."""

    parts: list
    steps: int
    outputs: dict

    def compare(self):
        ladder = chip_ladder()
        for part in self.parts:
            for step in range(self.steps):
                arrays = self.outputs[part.name, part.output, step]
                base = part.base(step) if part.residual else None
                rungs = [(rung, arrays[rung]) for rung in RUNGS]
                kind, reference = KINDS[part.kind], arrays["reference"]
                ladder.compare(part.name, kind, part.output, step, reference, base, rungs, part.scheme)
        return ladder

    def part(self, name, output="hidden_states_out"):
        return next(part for part in self.parts if (part.name, part.output) == (name, output))


def record(parts, steps=2):
    outputs = {
        (part.name, part.output, step): {rung: part.run(rung, step) for rung in ("reference", *RUNGS)}
        for part in parts
        for step in range(steps)
    }
    return Recording(parts, steps, outputs)


@pytest.fixture
def recording():
    """A sound recording of a small pipeline, made anew for each test."""
    return record(toy_parts())


@pytest.fixture(scope="session")
def full_recording():
    """A sound recording with as many parts as FLUX.1 has, two steps. Not to be spoilt."""
    return record(toy_parts(doubles=19, singles=38, encoders=24))


@pytest.fixture(scope="session")
def pictures():
    """A reference picture and one a little off, uint8 [96, 96, 3]."""
    y, x = np.mgrid[0:96, 0:96] / 96
    picture = np.stack([0.5 + 0.4 * np.sin(9 * x + 5 * y), 0.2 + 0.7 * y, 0.5 + 0.4 * np.cos(11 * x * y)], axis=-1)
    noise = np.random.default_rng(1).standard_normal(picture.shape) * 0.02
    return tuple((np.clip(image, 0, 1) * 255).round().astype(np.uint8) for image in (picture, picture + noise))
