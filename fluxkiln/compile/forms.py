"""The forms in which TPU-MLIR stores a weight, and how each is made from the weight as the checkpoint has it.

A weight matrix is given as [O, I] (torch's linear layout). `chunk` selects one of `chunks` equal slices of the output
axis: the compiler cuts wide AdaLN projections that way. Every form is row-major and little-endian.

Source: found by matching the compiler's output byte for byte (`fluxkiln.compile.mould`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fluxkiln.quantize.pack import PackedWeight, pack_int4, pack_int8, to_bf16_bits

# lanes of a BM1684X: scales and zero points are dealt out to them row by row
LANES = 64
# how many equal slices of the output axis the compiler has been seen to cut a projection into
CHUNKS = (1, 2, 3, 4, 6)

FormName = Literal[
    "codes", "scale", "zero", "scale_lanes", "zero_lanes", "bf16", "bf16_t", "f16", "f16_t", "f32", "f32_t"
]


@dataclass(frozen=True, slots=True)
class Form:
    """One stored form of one slot."""

    slot: str
    name: FormName
    chunk: int = 0
    chunks: int = 1


class SlotForms:
    """All forms of one slot; what several forms share is computed once.

    Args:
        weight: [O, I] or [O], float32 or bfloat16.
        group_size, bits: of the scheme's codes; 0 when it does not quantize.
    """

    def __init__(self, weight: NDArray[Any], group_size: int, bits: int) -> None:
        self.weight = weight
        self.group_size = group_size
        self.bits = bits
        self._packed: PackedWeight | None = None

    @property
    def packed(self) -> PackedWeight:
        if self._packed is None:
            self._packed = (pack_int4 if self.bits == 4 else pack_int8)(self.weight, self.group_size)
        return self._packed

    def names(self) -> Iterator[FormName]:
        """The forms this slot can have."""
        if self.weight.ndim == 2:
            if self.group_size and self.weight.shape[1] % self.group_size == 0:
                yield from ("codes", "scale", "zero", "scale_lanes", "zero_lanes")
            yield from ("bf16_t", "f16_t", "f32_t")
        yield from ("bf16", "f16", "f32")

    def candidates(self, slot: str) -> Iterator[Form]:
        """Every form and every slicing of it."""
        for name in self.names():
            for chunks in CHUNKS if self.weight.ndim <= 2 else (1,):
                if self.weight.shape[0] % chunks == 0:
                    for chunk in range(chunks):
                        yield Form(slot, name, chunk, chunks)

    def make(self, form: Form) -> NDArray[Any]:
        """The form's bytes as a contiguous array.

        Raises:
            ValueError: the rows do not divide into the chunks or lanes.
        """
        rows = self.weight.shape[0] // form.chunks
        span = slice(form.chunk * rows, (form.chunk + 1) * rows)
        if form.name == "codes":
            return self.packed.codes_OI[span]
        if form.name in ("scale", "scale_lanes"):
            return _order(self.packed.scales_OG[span], form.name)
        if form.name in ("zero", "zero_lanes"):
            return _order(self.packed.zeros_OG[span], form.name)
        part = self.weight[span]
        kind = form.name.split("_")[0]
        if kind == "bf16":
            stored: NDArray[Any] = to_bf16_bits(part)
        else:
            stored = part.astype(np.float16 if kind == "f16" else np.float32)
        return np.ascontiguousarray(stored.T if form.name.endswith("_t") else stored)


def _order(rows_OG: NDArray[Any], name: str) -> NDArray[Any]:
    """Deal rows out to the lanes: row r of lane l is row r * 64 + l."""
    if not name.endswith("_lanes"):
        return np.ascontiguousarray(rows_OG)
    return np.ascontiguousarray(rows_OG.reshape(-1, LANES, rows_OG.shape[1]).transpose(1, 0, 2))
