"""What stands beside the codes of a weight W [O, I], by role, for methods that need more than codes.

y = ((x * reciprocals) codes^T) gains + (x down^T) up^T, where the codes stand for the rest: W / reciprocals / gains -
up down.

- DOWN [r, I] and UP [O, r]: a low-rank branch beside the product;
- RECIPROCALS [I]: of what the weight's input channels are multiplied by. A product, not a quotient: a chip multiplies
  in one pass, and what it multiplies by is made so that this is exact;
- GAINS [O]: powers of two, which what multiplies the product anyway is multiplied by.

All are bfloat16. What is packed is in bfloat16 as well, as a compiler gets it, and is made row by row, so that a cast
makes the same of some rows as of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.formats import PackedPlanes
from fluxkiln.types import TRANSPOSED

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.quantize.integer import IntegerWeight
    from fluxkiln.quantize.pack import PackedWeight

DOWN, UP, RECIPROCALS, GAINS = "__down", "__up", "__reciprocals", "__gains"
ROLES = (DOWN, UP, RECIPROCALS, GAINS)
# of the rows of a weight in integers, in the rungs that compute with them
SCALES = "__scales"
_VECTORS = frozenset({RECIPROCALS, GAINS, SCALES})


def side_slot(slot: str, role: str) -> str:
    """What the slot beside a weight's is called; matrices are transposed, as a MatMul takes them."""
    return f"{slot}{role}{'' if role in _VECTORS else TRANSPOSED}"


def split_slot(slot: str) -> tuple[str, str]:
    """The weight that a slot stands beside, and its role there; its own name and "" otherwise."""
    base = slot.removesuffix(TRANSPOSED)
    return next(((base.removesuffix(role), role) for role in (*ROLES, SCALES) if base.endswith(role)), (slot, ""))


def side_shape(role: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Of what stands beside a weight of this shape, in torch's layout."""
    rows, columns = shape
    return {DOWN: (rank, columns), UP: (rows, rank), RECIPROCALS: (columns,)}[role]


def check_rank(rank: int, shape: tuple[int, ...], what: str = "a matrix") -> None:
    """Raise SchemeError when a matrix has fewer directions than are asked for."""
    if not 0 < rank <= min(shape):
        raise SchemeError(f"rank {rank}: {what} of {shape[0]} x {shape[1]} has 1 to {min(shape)}")


@dataclass(frozen=True, slots=True)
class SideTensors:
    """What stands beside the codes of one weight; None for what does not.

    Attributes:
        divisors: float32 [I], of the input before it meets the codes: 1 / reciprocals.
        up, down: [O, r] and [r, I] bfloat16 bits.
        gains: float32 [O].
    """

    divisors: NDArray[Any] | None = None
    up: NDArray[Any] | None = None
    down: NDArray[Any] | None = None
    gains: NDArray[Any] | None = None

    @staticmethod
    def of_slot(arrays: Mapping[str, NDArray[Any]], slot: str) -> SideTensors | None:
        """Those of a weight among the arrays that `arrays` makes; None where it has none."""
        import numpy as np

        down, up, reciprocals, gains = (arrays.get(side_slot(slot, role)) for role in ROLES)
        if down is None and reciprocals is None:
            return None
        return SideTensors(
            None if reciprocals is None else np.reciprocal(reciprocals.astype(np.float32)),
            None if up is None else up.view(np.uint16),
            None if down is None else down.view(np.uint16),
            None if gains is None else gains.astype(np.float32),
        )

    def arrays(self, slot: str) -> dict[str, NDArray[Any]]:
        """Slot beside the weight's -> what it is filled with: bfloat16 (ml_dtypes), in torch's layout."""
        import ml_dtypes
        import numpy as np

        found = {
            DOWN: None if self.down is None else self.down.view(ml_dtypes.bfloat16),
            UP: None if self.up is None else self.up.view(ml_dtypes.bfloat16),
            RECIPROCALS: None if self.divisors is None else np.reciprocal(self.divisors).astype(ml_dtypes.bfloat16),
            GAINS: None if self.gains is None else self.gains.astype(ml_dtypes.bfloat16),
        }
        return {side_slot(slot, role): array for role, array in found.items() if array is not None}

    def rest(self, rows_OI: NDArray[Any], start: int = 0) -> NDArray[Any]:
        """What is packed of the rows of a weight that begin at `start`: W * divisors / gains - up down, bfloat16."""
        import ml_dtypes
        import numpy as np

        from fluxkiln.quantize.pack import bf16_to_float32, subtract_product

        wide = np.array(rows_OI, np.float32, order="C")
        if self.divisors is not None:
            wide *= self.divisors
        if self.gains is not None:
            wide /= self.gains[start : start + len(wide), None]
        if self.up is not None and self.down is not None:
            subtract_product(wide, bf16_to_float32(self.up[start : start + len(wide)]), bf16_to_float32(self.down))
        return wide.astype(ml_dtypes.bfloat16)

    def pack(self, weight_OI: NDArray[Any], group_size: int, bits: int) -> PackedWeight:
        """The rest of a whole weight in codes."""
        from fluxkiln.quantize.pack import pack_by
        from fluxkiln.quantize.search import search_into

        return pack_by(search_into, self.rest(weight_OI), group_size, bits)


@dataclass(frozen=True, slots=True)
class SidedWeight:
    """A packed weight with what stands beside its codes, if anything does."""

    packed: PackedWeight | PackedPlanes | IntegerWeight
    beside: SideTensors = SideTensors()

    def dequantize(self, group_size: int) -> NDArray[Any]:
        """The matrix that x is multiplied with in all, float32 [O, I]."""
        from fluxkiln.quantize.pack import PackedWeight, bf16_to_float32, dequantize

        if isinstance(self.packed, PackedPlanes):
            return self.packed.dequantize()
        if isinstance(self.packed, PackedWeight):
            whole, beside = dequantize(self.packed, group_size), self.beside
        else:
            whole, beside = self.packed.dequantize(), self.beside
        if beside.divisors is not None:
            whole /= beside.divisors
        if beside.gains is not None:
            whole *= beside.gains[:, None]
        if beside.up is None or beside.down is None:
            return whole
        total: NDArray[Any] = whole + bf16_to_float32(beside.up) @ bf16_to_float32(beside.down)
        return total


# a slot, and the input channels of it that are packed if not all -> what packs its weight
PackerOf = Callable[[str, "tuple[int, int] | None"], Callable[["NDArray[Any]"], SidedWeight]]
