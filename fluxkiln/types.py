"""The frozen values that stages hand to one another.

This module and `fluxkiln.errors` import nothing else of the package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from numpy.typing import NDArray

GraphFormat = Literal["onnx17", "onnx23", "pt2", "torchscript"]

# Executes one part: its name and inputs by the kind's input names (float32, token ids int64) -> outputs by the kind's
# output names, float32. Guidance is left out where the model takes none.
PartRunner = Callable[[str, "Mapping[str, NDArray[Any]]"], "dict[str, NDArray[Any]]"]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, static shape and torch dtype name (`float32`, `int64`, ...) of a graph input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Where a checkpoint tensor lies: a byte range of a safetensors file, little-endian, row-major.

    `offset` counts from the start of the file, header included; `dtype` is safetensors' own code (`BF16`, `F32`, ...).
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Transform:
    """One step from checkpoint tensors to a slot.

    `transpose`: swap the two axes of a matrix. `slice`: keep `[start, stop)` of axis `dim`. `concat`: join all sources
    along `dim` (always first). `scale`: multiply by `factor`. `pad`: zeros behind, up to `stop` entries of axis `dim`.
    """

    op: Literal["transpose", "slice", "concat", "scale", "pad"]
    dim: int = 0
    start: int = 0
    stop: int = 0
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class SlotBinding:
    """How one slot of a template is filled: checkpoint tensor names, then transforms in order."""

    slot: str
    sources: tuple[str, ...]
    transforms: tuple[Transform, ...] = ()


@dataclass(frozen=True, slots=True)
class Binding:
    """How every slot of one part is filled from one component of a checkpoint."""

    part: str
    component: str
    slots: tuple[SlotBinding, ...]


@dataclass(frozen=True, slots=True)
class Template:
    """The graph of a kind for given shapes: activations and weights are both named inputs, no weight data inside.

    `slots` are the graph inputs that stand for weights, in graph order after `inputs`.
    """

    kind: str
    format: GraphFormat
    path: Path
    digest: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    slots: tuple[TensorSpec, ...]
