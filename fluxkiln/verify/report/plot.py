"""What the charts are drawn with: a logarithmic plot, a mark per rung, and a few shapes of SVG.

Colours are CSS classes, so that light and dark mode share one drawing. Variable text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from fluxkiln.verify.gates import Rung

FLOOR = 1e-9


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten that hold all finite `values`, at least two of them apart by one; below FLOOR counts as it."""
    shown = [max(value, FLOOR) for value in values if math.isfinite(value)]
    low = math.floor(math.log10(min(shown, default=FLOOR)))
    return low, max(math.ceil(math.log10(max(shown, default=FLOOR)) - 1e-9), low + 1)


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a line, and what is said when a pointer rests on it."""

    value: float
    passed: bool
    title: str


@dataclass(frozen=True, slots=True)
class Plot:
    """Geometry of a chart: decades low..high upwards, columns to the right. Lengths in pixels."""

    low: int
    high: int
    columns: int
    right: int = 96
    width: int = 860
    left: int = 64
    top: int = 24
    bottom: int = 44

    @property
    def height(self) -> int:
        """Taller where there are more decades."""
        return self.top + self.bottom + min(max(34 * (self.high - self.low), 136), 272)

    def x(self, column: float) -> float:
        """The middle of a column."""
        return self.left + (column + 0.5) * (self.width - self.left - self.right) / self.columns

    def y(self, value: float) -> float:
        """Where a value stands; what is beyond the decades at their edge, NaN and infinity at the upper one."""
        exponent = math.log10(max(value, FLOOR)) if math.isfinite(value) else self.high
        share = (min(max(exponent, self.low), self.high) - self.low) / (self.high - self.low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def axes(self, across: str, upwards: str = "relative L2 error") -> str:
        """A line per decade, and what both axes are."""
        out = ""
        for exponent in range(self.low, self.high + 1):
            y = self.y(10.0**exponent)
            name = "0" if 10.0**exponent <= FLOOR else f"1e{exponent}" if exponent else "1"
            out += f'<path class="grid" d="M{self.left} {y:.1f}H{self.width - self.right}"/>'
            out += svg_text(self.left - 8, y + 3.5, name, "tick", "end")
        middle = (self.top + self.height - self.bottom) / 2
        turned = f'<text class="axis" transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        out += f"{turned}{escape(upwards)}</text>"
        return out + svg_text(self.x(self.columns / 2 - 0.5), self.height - 8, across, "axis", "middle")

    def tick(self, column: int, name: str) -> str:
        """The name of a column below the plot."""
        return svg_text(self.x(column), self.height - self.bottom + 16, name, "tick", "middle")

    def line(self, series: int, points: Sequence[Point | None]) -> str:
        """A rung's line with a mark at every point, broken where there is none."""
        path, marks, pen = "", "", "M"
        for column, point in enumerate(points):
            if point is None:
                pen = "M"
                continue
            x, y = self.x(column), self.y(point.value)
            path += f"{pen}{x:.1f} {y:.1f}"
            pen = "L"
            mark = marker(series, x, y) if point.passed else cross(x, y, 5)
            marks += f"<g><title>{escape(point.title)}</title>{mark}</g>"
        return f'<g class="series s{series}"><path class="run" d="{path}"/>{marks}</g>'

    def path(self, values: Sequence[float | None]) -> str:
        """The path through all values that there are."""
        drawn = (
            f"{self.x(column):.1f} {self.y(value):.1f}" for column, value in enumerate(values) if value is not None
        )
        return "M" + "L".join(drawn)

    def bound(self, value: float, name: str, shown: Sequence[float]) -> str:
        """A dashed line, its name on the side where the nearest of the values `shown` is further away."""
        y = self.y(value)
        above = min((y - self.y(one) for one in shown if one > value), default=math.inf)
        below = min((self.y(one) - y for one in shown if one <= value), default=math.inf)
        line = f'<path class="bound" d="M{self.left} {y:.1f}H{self.width - self.right}"/>'
        return line + svg_text(self.left + 6, y - 6 if above >= below else y + 14, name, "bound-name", "start")

    def names(self, ends: Mapping[Rung, float]) -> str:
        """Rung names at the right ends of their lines, pushed apart where lines meet."""
        placed: list[tuple[float, Rung]] = []
        for rung, value in sorted(ends.items(), key=lambda end: (self.y(end[1]), -end[0].order)):
            y = self.y(value) + 4
            placed.append((max(y, placed[-1][0] + 15) if placed else y, rung))
        overflow = max(0.0, placed[-1][0] - (self.height - self.bottom + 6)) if placed else 0.0
        x = self.width - self.right + 6
        return "".join(
            f'<g class="series s{rung.series}">{marker(rung.series, x + 4, y - overflow - 4)}'
            f"{svg_text(x + 14, y - overflow, rung.name, 'name', 'start')}</g>"
            for y, rung in placed
        )


def marker(series: int, x: float, y: float) -> str:
    """A shape per rung (`Rung.series`), so that lines stay apart without colour."""
    if series % 5 == 1:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>'
    if series % 5 == 2:
        return f'<rect x="{x - 2.4:.1f}" y="{y - 2.4:.1f}" width="4.8" height="4.8"/>'
    size = 3.4
    shapes = {
        3: f"M{x:.1f} {y - size:.1f}l{size} {size * 1.8:.1f}h{-2 * size}z",
        4: f"M{x:.1f} {y - size:.1f}l{size} {size}l{-size} {size}l{-size} {-size}z",
        0: f"M{x:.1f} {y + size:.1f}l{size} {-size * 1.8:.1f}h{-2 * size}z",
    }
    return f'<path d="{shapes[series % 5]}"/>'


def cross(x: float, y: float, size: float) -> str:
    """The mark of a missed gate."""
    d = f"M{x - size:g} {y - size:.1f}l{2 * size:g} {2 * size:g}m0 {-2 * size:g}l{-2 * size:g} {2 * size:g}"
    return f'<path class="cross" d="{d}"/>'


def svg_text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    """A line of text; `anchor` is the side of it that stands at x."""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def svg(width: float, height: float, label: str, body: Iterable[str], css: str) -> str:
    """A drawing and what a reader that cannot see it is told."""
    return (
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )
