"""Formats: how a matrix is stored in groups of one row, codes and what they are scaled by, as files of others have it.

A format is a scheme of its own name. Each is packed by the module that it names: `pack(name, rows, weights, planes)`
fills arrays of bytes, `unpack(name, planes)` gives the numbers that are multiplied with. A file may have the groups in
one piece (codes and scales together) or in several, its planes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fluxkiln.errors import SchemeError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Format:
    """One format.

    Attributes:
        bits: of a code. group: input channels of a group.
        planes: bytes that a group takes in each of them.
        module: of this folder, which packs and unpacks it.
        weighted: codes may be chosen by how much each input channel counts.
    """

    name: str
    bits: int
    group: int
    planes: tuple[int, ...]
    module: str
    weighted: bool = False

    @property
    def bytes_per_weight(self) -> float:
        return sum(self.planes) / self.group

    def row_bytes(self, in_features: int) -> tuple[int, ...]:
        """Bytes of a row in each plane; SchemeError where groups do not divide it."""
        if in_features % self.group:
            raise SchemeError(
                f"{self.name} stores {self.group} input channels together, which does not divide {in_features}; use a "
                "format with smaller groups there"
            )
        return tuple(in_features // self.group * size for size in self.planes)

    def pack(
        self, weight_OI: NDArray[Any], weights: NDArray[np.float32] | None = None
    ) -> tuple[NDArray[np.uint8], ...]:
        """Rows of a matrix of any float, packed: an array [O, bytes of a row] for each plane.

        Args:
            weights: float32 [I], how much the error of each input channel counts; for formats that are `weighted`.
        """
        import numpy as np

        planes = tuple(np.empty((len(weight_OI), size), np.uint8) for size in self.row_bytes(weight_OI.shape[1]))
        _module(self.module).pack(self.name, weight_OI, weights, planes)
        return planes

    def unpack(self, planes: Sequence[NDArray[np.uint8]]) -> NDArray[np.float32]:
        """The numbers that packed rows stand for, float32 [O, I]."""
        unpacked: NDArray[np.float32] = _module(self.module).unpack(self.name, planes)
        return unpacked


@dataclass(frozen=True, slots=True)
class PackedPlanes:
    """A weight in a format of its own, as `quantize.pack.PackedWeight` is one in codes, scales and zero points."""

    form: Format
    planes: tuple[NDArray[np.uint8], ...]

    def dequantize(self) -> NDArray[np.float32]:
        """The matrix that x is multiplied with, float32 [O, I]."""
        return self.form.unpack(self.planes)


def _module(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}")


_ALL = (
    Format("Q8_0", 8, 32, (34,), "blocks"),
    Format("Q5_1", 5, 32, (24,), "blocks"),
    Format("Q5_0", 5, 32, (22,), "blocks"),
    Format("Q4_1", 4, 32, (20,), "blocks"),
    Format("Q4_0", 4, 32, (18,), "blocks"),
    Format("Q6_K", 6, 256, (210,), "superblocks", weighted=True),
    Format("Q5_K", 5, 256, (176,), "superblocks", weighted=True),
    Format("Q4_K", 4, 256, (144,), "superblocks", weighted=True),
    Format("MLX8", 8, 64, (64, 2, 2), "affine"),
    Format("MLX4", 4, 64, (32, 2, 2), "affine"),
)
FILE_FORMATS: Mapping[str, Format] = {one.name: one for one in _ALL}
