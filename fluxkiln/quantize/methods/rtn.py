"""`rtn`: as TPU-MLIR rounds, code for code; see `fluxkiln.quantize.pack`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxkiln.quantize.methods import Method

if TYPE_CHECKING:
    from fluxkiln.quantize.calibration import Statistics
    from fluxkiln.quantize.pack import Rounder


def rounder(statistics: Statistics | None, symmetric: bool) -> Rounder:
    from fluxkiln.quantize.pack import pack_into

    return pack_into


METHOD = Method(rounder, as_compiler=True)
