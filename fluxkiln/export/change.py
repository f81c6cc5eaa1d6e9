"""What LoRAs do to a tensor, done to its rows while they are read: nothing is written, and only the reader knows of it.

W' = W + strength * alpha / rank * delta in float32, rounded once to the dtype that is stored. A row of a delta takes a
row of one factor and the whole of the other; so whoever asks for some rows of a tensor gets them for that price.

Shapes: O = out features, I = in features, R = rank, N = rows.
Source: peft 0.21.2, `tuners/lora/dora.py`, `tuners/loha/layer.py`, `tuners/lokr/layer.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import CheckpointError
from fluxkiln.export.checkpoint import read_tensor
from fluxkiln.files import FileState, file_state
from fluxkiln.types import TensorRef

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Values = NDArray[np.float32]
    Rows = NDArray[np.intp]

# Raise when other bytes come of the same input: digests of changed tensors are made of it.
_FORMAT = 1
_BLOCK_ITEMS = 1 << 17
# Factors in memory: those of the matrices that are being read.
_FACTORS = 8


@dataclass(frozen=True, slots=True)
class LoraTensor:
    """A tensor of a LoRA's file, read when it is needed; CheckpointError where the file is not what it was."""

    ref: TensorRef
    state: FileState

    @property
    def shape(self) -> tuple[int, ...]:
        return self.ref.shape

    def __call__(self) -> Values:
        return _read_factor(self)

    def rows(self, rows: Rows) -> Values:
        return self()[rows]


@lru_cache(maxsize=_FACTORS)
def _read_factor(factor: LoraTensor) -> Values:
    import numpy as np

    file = factor.ref.file
    try:
        values = read_tensor(factor.ref).astype(np.float32)
        same = file_state(file).is_same_file(factor.state)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; put the LoRA back and start again") from error
    if not same:
        raise CheckpointError(f"{file} was written to meanwhile; start again when nothing writes to it")
    return values


@dataclass(frozen=True, slots=True)
class LowRank:
    """up_OR @ down_RI."""

    up: LoraTensor
    down: LoraTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.up.shape[0], self.down.shape[1]

    def add(self, values_NI: Values, rows: Rows, scale: np.float32) -> None:
        from fluxkiln.export.low_rank import add_product

        add_product(values_NI, self.up.rows(rows), self.down(), scale)

    def rows(self, rows: Rows) -> Values:
        import numpy as np

        values = np.zeros((len(rows), self.shape[1]), np.float32)
        self.add(values, rows, np.float32(1))
        return values


@dataclass(frozen=True, slots=True)
class Hadamard:
    """LoHa: the product of two low-rank matrices, number by number."""

    first: LowRank
    second: LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        return self.first.shape

    def add(self, values_NI: Values, rows: Rows, scale: np.float32) -> None:
        values_NI += scale * (self.first.rows(rows) * self.second.rows(rows))


@dataclass(frozen=True, slots=True)
class Kronecker:
    """LoKr: every number of one matrix times the whole other one."""

    first: LoraTensor | LowRank
    second: LoraTensor | LowRank

    @property
    def shape(self) -> tuple[int, ...]:
        (height, width), (other_height, other_width) = self.first.shape, self.second.shape
        return height * other_height, width * other_width

    def add(self, values_NI: Values, rows: Rows, scale: np.float32) -> None:
        height = self.second.shape[0]
        products = self.first.rows(rows // height)[:, :, None] * self.second.rows(rows % height)[:, None, :]
        values_NI += scale * products.reshape(values_NI.shape)


@dataclass(frozen=True, slots=True)
class Column:
    """Of a bias, or of a norm's weight: a tensor that counts as [O, 1]."""

    values: LoraTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return math.prod(self.values.shape), 1

    def add(self, values_NI: Values, rows: Rows, scale: np.float32) -> None:
        values_NI += scale * self.values().reshape(-1, 1)[rows]


Delta = LowRank | Hadamard | Kronecker | Column


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """What a LoRA does to one tensor.

    Attributes:
        delta: what is added, [its own rows, I]. rows: for each row of the tensor, which of these it gets.
        scale: alpha / rank. replaces: the delta is put in the tensor's place instead, whatever the strength.
        magnitude: DoRA: the length that each row of the sum is given, by the delta's rows.
    """

    component: str
    tensor: str
    delta: Delta
    rows: Rows
    scale: float = 1.0
    replaces: bool = False
    magnitude: LoraTensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), self.delta.shape[1]

    def apply(self, values_NI: Values, first: int, strength: float) -> None:
        """Change rows of the tensor from `first` on, in place."""
        import numpy as np

        from fluxkiln.export.low_rank import scale_rows

        rows, scale = self.rows[first : first + len(values_NI)], strength * self.scale
        if self.replaces:
            values_NI[:], scale = 0, 1.0
        self.delta.add(values_NI, rows, np.float32(scale))
        if self.magnitude is not None:
            scale_rows(values_NI, self.magnitude().reshape(-1)[rows])


@dataclass(frozen=True, slots=True)
class Change:
    """All that LoRAs do to one tensor, in their order. `loras`: sha256 of the file and strength, of each of them."""

    loras: tuple[tuple[str, float], ...]
    pieces: tuple[Piece, ...] = field(compare=False, repr=False)

    def digest(self, stored: str) -> str:
        """The digest of the changed tensor, from that of the stored one; no weight is read for it."""
        return hashlib.sha256(json.dumps([_FORMAT, stored, self.loras]).encode()).hexdigest()

    def apply(self, ref: TensorRef, stored: NDArray[Any], first: int) -> NDArray[Any]:
        """Change rows from `first` on, as they are stored, in place; CheckpointError for a NaN or Inf in the result.

        The bits of a row depend on the row alone, not on how many are asked for at once.
        """
        import numpy as np

        from fluxkiln.export.low_rank import round_bits, widen_bits

        flat = stored.reshape(len(stored), -1) if stored.ndim else stored.reshape(1, 1)
        step = max(1, _BLOCK_ITEMS // flat.shape[1])
        values = np.empty((min(step, len(flat)), flat.shape[1]), np.float32)
        for start in range(0, len(flat), step):
            block = flat[start : start + step]
            wide = values[: len(block)]
            bits = (block.reshape(-1).view(np.uint16), wide.reshape(-1).view(np.uint32)) if ref.dtype == "BF16" else ()
            if bits:
                widen_bits(*bits)
            else:
                wide[:] = block
            with np.errstate(over="ignore", invalid="ignore"):
                for piece, (_, strength) in zip(self.pieces, self.loras, strict=True):
                    piece.apply(wide, first + start, strength)
                if bits:
                    finite = round_bits(*reversed(bits))
                else:
                    block[:] = wide
                    finite = bool(np.isfinite(block).all())
            if not finite:
                raise CheckpointError(
                    f"{ref.name} has a NaN or Inf in {ref.dtype} with the LoRAs in it; use a smaller strength"
                )
        return stored
