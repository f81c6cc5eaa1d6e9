"""`rtn0`: `rtn` with every group's range extended to 0, so that no zero point has to be clipped."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fluxkiln.quantize.methods import Method

if TYPE_CHECKING:
    from fluxkiln.quantize.calibration import Statistics
    from fluxkiln.quantize.pack import Rounder


def rounder(statistics: Statistics | None, symmetric: bool) -> Rounder:
    from fluxkiln.quantize.pack import pack_into

    return partial(pack_into, through_zero=True)


METHOD = Method(rounder)
