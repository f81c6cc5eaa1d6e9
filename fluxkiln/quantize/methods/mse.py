"""`mse`: the range whose rounding leaves the least error; see `fluxkiln.quantize.search`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fluxkiln.quantize.methods import Method

if TYPE_CHECKING:
    from fluxkiln.quantize.calibration import Statistics
    from fluxkiln.quantize.pack import Rounder


def rounder(statistics: Statistics | None, symmetric: bool) -> Rounder:
    from fluxkiln.quantize.search import search_into

    return partial(search_into, refit=False, symmetric=symmetric)


METHOD = Method(rounder, symmetric=True)
