"""What a target is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fluxkiln.artifacts.types import GraphFormat
from fluxkiln.errors import SchemeError
from fluxkiln.quantize.schemes import Scheme, parse_scheme


@dataclass(frozen=True, slots=True)
class Target:
    """A chip and how to build for it.

    Attributes:
        toolchain: the adapter that compiles for it.
        chip: what the toolchain calls it.
        graph_format: the templates the toolchain reads.
        schemes: legal block schemes, the default first.
        cast_kinds: kinds that repeat: compiled once into a mould, cast for every part.
        narrow_inputs, narrow_outputs: kinds whose activations come or go in 16 bits: what passes between blocks.
        device_bytes: memory that a device gives to models.
    """

    name: str
    toolchain: Literal["tpu_mlir", "onnxruntime"]
    chip: str
    graph_format: GraphFormat
    schemes: tuple[str, ...]
    cast_kinds: tuple[str, ...] = ()
    narrow_inputs: tuple[str, ...] = ()
    narrow_outputs: tuple[str, ...] = ()
    device_bytes: int = 0

    def scheme(self, name: str | None) -> Scheme:
        """The block scheme called `name`, or the default; SchemeError when the target has none such."""
        scheme = parse_scheme(name or self.schemes[0])
        if scheme.name.split("-")[0] not in self.schemes:
            raise SchemeError(f"target {self.name} cannot store {scheme.name}; it has {', '.join(self.schemes)}")
        return scheme
