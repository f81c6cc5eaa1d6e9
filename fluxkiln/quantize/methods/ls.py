"""`ls`: the codes that leave the least error with their own least-squares scale; see `fluxkiln.quantize.search`."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fluxkiln.quantize.methods import Method

if TYPE_CHECKING:
    from fluxkiln.quantize.calibration import Statistics
    from fluxkiln.quantize.pack import Rounder


def rounder(statistics: Statistics | None, symmetric: bool) -> Rounder:
    from fluxkiln.quantize.search import search_into

    return partial(search_into, refit=True, symmetric=symmetric)


METHOD = Method(rounder, symmetric=True)
