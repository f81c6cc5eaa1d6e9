"""What a target is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fluxkiln.artifacts.types import GraphFormat
from fluxkiln.errors import SchemeError
from fluxkiln.quantize.schemes import Scheme, parse_schemes


@dataclass(frozen=True, slots=True)
class Target:
    """A chip and how to build for it.

    Attributes:
        toolchain: the adapter that compiles for it.
        chip: what the toolchain calls it.
        graph_format: the templates the toolchain reads.
        schemes: legal block schemes, the default first.
        narrow_inputs, narrow_outputs: kinds whose activations come or go in 16 bits: what passes between blocks.
        device_bytes: memory that a device gives to models.
    """

    name: str
    toolchain: Literal["tpu_mlir", "onnxruntime"]
    chip: str
    graph_format: GraphFormat
    schemes: tuple[str, ...]
    narrow_inputs: tuple[str, ...] = ()
    narrow_outputs: tuple[str, ...] = ()
    device_bytes: int = 0

    def parse_schemes(self, text: str | None) -> tuple[Scheme, dict[str, Scheme]]:
        """The block scheme and every kind's scheme (see `quantize.schemes.parse_schemes`).

        Raises:
            SchemeError: one does not exist, or this target cannot store it.
        """
        blocks, schemes = parse_schemes(text, self.schemes[0])
        for scheme in (blocks, *schemes.values()):
            if scheme.name.split("-")[0] not in self.schemes:
                raise SchemeError(f"target {self.name} cannot store {scheme.name}; it has {', '.join(self.schemes)}")
        return blocks, schemes
