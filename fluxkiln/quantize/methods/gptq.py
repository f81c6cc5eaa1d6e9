"""`gptq`: columns one by one, each making up for the errors before it; see `fluxkiln.quantize.columns`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fluxkiln.quantize.methods import Method

if TYPE_CHECKING:
    from fluxkiln.quantize.calibration import Statistics
    from fluxkiln.quantize.pack import Rounder


def rounder(statistics: Statistics | None, symmetric: bool) -> Rounder:
    from fluxkiln.quantize.columns import ColumnRounder

    assert statistics is not None
    return ColumnRounder(statistics)


METHOD = Method(rounder, calibrated=True)
