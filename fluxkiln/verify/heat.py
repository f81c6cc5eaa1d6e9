"""Error maps, token by channel, of the outputs to which a rung did most: where in a tensor an error sits.

One wrong scale is a column, one wrong token a row, rounding is even noise; the norms of a row cannot tell them apart.
"""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.verify.report.page import encode_picture

_Array = NDArray[np.generic]

# cells of a map at most; larger tensors are averaged
MAP_TOKENS, MAP_CHANNELS = 48, 96
# per rung, each of another part
MOST_MAPS = 3


@dataclass(frozen=True, slots=True)
class ErrorMap:
    """What a rung did to one output, relative to the root mean square of what the part adds (or of all of it).

    Attributes:
        shades: [rows, columns] uint8, a cell's share of the largest one in 1/255; a cell is the root mean square of
            the errors in it. NaN and infinity are 255.
        tokens, channels: of the output itself. peak: the largest cell, NaN where one is not finite.
        severity: sorts maps.
    """

    part: str
    output: str
    step: int
    rung: str
    shades: NDArray[np.uint8]
    tokens: int
    channels: int
    peak: float
    severity: float

    def to_json(self) -> dict[str, Any]:
        """As report.json holds it: `shades` as base64 of its bytes, row by row."""
        rows, columns = self.shades.shape
        plain = {name: getattr(self, name) for name in ("part", "output", "step", "rung", "tokens", "channels", "peak")}
        return {**plain, "rows": rows, "columns": columns, "shades": base64.b64encode(self.shades.tobytes()).decode()}


class WorstMaps:
    """The maps of the outputs that each rung did most to, MOST_MAPS a rung."""

    def __init__(self) -> None:
        self.by_rung: dict[str, list[ErrorMap]] = {}

    def offer(
        self, place: tuple[str, str, int, str], severity: float, actual: _Array, below: _Array, base: _Array | None
    ) -> None:
        """Keep the map of an output if it is among the worst; it is only made then.

        Args:
            place: part, output, step, rung. below: the same output at the rung before.
            base: the residual input that the output updates, if any.
        """
        part, _, _, rung = place
        kept = self.by_rung.setdefault(rung, [])
        known = next((index for index, one in enumerate(kept) if one.part == part), None)
        rival = kept[known] if known is not None else kept[-1] if len(kept) >= MOST_MAPS else None
        if severity <= 0.0 or (rival is not None and severity <= rival.severity):
            return
        made = error_map(place, severity, actual, below, base)
        if made is None:
            return
        if rival is not None:
            kept.remove(rival)
        kept.append(made)
        kept.sort(key=lambda one: -one.severity)

    def absorb(self, other: WorstMaps) -> None:
        """Take over the maps of another ladder, its parts beside these."""
        for rung, maps in other.by_rung.items():
            mine = self.by_rung.setdefault(rung, [])
            mine += maps
            mine.sort(key=lambda one: -one.severity)

    def to_json(self) -> list[dict[str, Any]]:
        """All maps, rung by rung, the worst first."""
        return [one.to_json() for maps in self.by_rung.values() for one in maps]


def error_map(
    place: tuple[str, str, int, str], severity: float, actual: _Array, below: _Array, base: _Array | None
) -> ErrorMap | None:
    """The map of one output; None for what has no two axes to speak of."""
    channels = actual.shape[-1] if actual.ndim else 1
    tokens = actual.size // max(channels, 1)
    if tokens < 2 or channels < 2:
        return None
    rows, columns = min(tokens, MAP_TOKENS), min(channels, MAP_CHANNELS)
    row_edges = np.linspace(0, tokens, rows + 1).astype(int)
    column_edges = np.linspace(0, channels, columns + 1).astype(int)[:-1]
    flat = [array.reshape(tokens, channels) for array in (actual, below, base) if array is not None]
    squares = np.empty((rows, columns))
    size = 0.0
    with np.errstate(all="ignore"):
        for row in range(rows):
            piece = slice(row_edges[row], row_edges[row + 1])
            a, e, *rest = (array[piece].astype(np.float64) for array in flat)
            b = rest[0] if rest else None
            error = np.square(a - e).sum(0)
            size += float(np.square(e if b is None else e - b).sum())
            squares[row] = np.add.reduceat(error, column_edges) / (piece.stop - piece.start)
        squares /= np.diff(np.append(column_edges, channels))
        relative = np.sqrt(squares / (size / actual.size)) if size else np.sqrt(squares)
        finite = np.isfinite(relative)
        peak = float(relative.max(where=finite, initial=0.0))
        shades = np.full(relative.shape, 255, np.uint8)
        shades[finite] = np.round(255.0 * relative[finite] / (peak or 1.0))
    peak = peak if finite.all() else math.nan
    return ErrorMap(*place, shades, tokens, channels, peak, severity)


def map_picture(entry: dict[str, Any]) -> str:
    """A map of report.json as the data URI of a PNG: black, its opacity the shade; a page gives it its colour.

    Source: opacity alone, so that one picture serves light and dark mode (CSS `mask-image`).
    """
    from PIL import Image

    shades = np.frombuffer(base64.b64decode(entry["shades"]), np.uint8).reshape(entry["rows"], entry["columns"])
    picture = Image.fromarray(np.stack([np.zeros_like(shades), shades], axis=-1), "LA")
    return encode_picture(picture, "png", optimize=True)
