"""The report's charts as inline SVG. Colours are CSS classes, so that light and dark mode share one drawing.

Every function takes rows as `report.json` holds them (see `ladder.row_to_dict`) and returns markup whose variable
text is escaped. What a chart shows stands in the report's table as well; the charts carry a one-line description.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from fluxkiln.verify.gates import RUNG_ORDER

Measure = Literal["delta", "whole", "added"]
ReportRow = Mapping[str, Any]

BINS = 17  # half decades from 1e-8: the first bin holds everything below, the last everything from 1 up
COLUMNS = 24  # a panel wraps after this many parts, so that it still fits a telephone
LABEL_WIDTH, CELL, ROW_HEIGHT = 82, 13, 20
NUMBERED_CELL = 56
# rungs that compare bytes: they have no place on a logarithmic axis
EXACT_RUNGS = frozenset({"stored"})
# a colour and a mark per rung; rungs of different targets share one
SERIES: Mapping[str, int] = {
    "reference": 0, "patched": 1, "onnxruntime": 2, "dequantized": 3, "split": 3, "executed": 4, "unsplit": 4,
    "interpreter": 4, "replicas": 5, "simulator": 5, "stored": 1,
}  # fmt: skip
FLOOR = 1e-9


@dataclass(frozen=True, slots=True)
class Cell:
    """The worst value of one part at one rung, over outputs and steps."""

    value: float
    passed: bool
    where: str


def value_of(row: ReportRow, measure: Measure) -> float:
    """Relative L2 of `row`: of the delta where there is one, of the whole output, or against the rung before."""
    metrics = row["vs_previous" if measure == "added" else "vs_reference"]
    name = "delta_relative_l2" if measure != "whole" and "delta_relative_l2" in metrics else "relative_l2"
    return float(metrics[name])


def split_name(part: str) -> tuple[str, str]:
    """A part's name and the shapes it was executed at, where these are others: `double.06 at 1024x1024`."""
    name, _, shapes = part.partition(" at ")
    return name, shapes


def at_build_shapes(rows: Iterable[ReportRow]) -> list[ReportRow]:
    """Rows of parts that ran where the others did; the compiled forms of a large model ran at larger shapes."""
    return [row for row in rows if not split_name(row["part"])[1]]


def ladder_panels(rows: Sequence[ReportRow], measure: Measure) -> list[tuple[str, str]]:
    """Heat maps rung x part, one (title, svg) per kind.

    Kinds that exist once share the first panel; parts executed at other shapes than the rest share one with numbers.
    """
    cells = _worst_cells(rows, measure)
    panels: list[tuple[str, str]] = []
    kinds: dict[tuple[str, bool], list[str]] = {}
    elsewhere: dict[str, list[str]] = {}
    for row in rows:
        shapes = split_name(row["part"])[1]
        # the pipeline stands apart from the numbered runs of it
        group = row["kind"], "." in row["part"]
        parts = elsewhere.setdefault(shapes, []) if shapes else kinds.setdefault(group, [])
        if row["part"] not in parts:
            parts.append(row["part"])
    rungs = _rungs_of(cells, [part for parts in kinds.values() for part in parts])
    single = [parts[0] for parts in kinds.values() if len(parts) == 1]
    if single:
        panels.append(("parts that exist once", _numbered_panel(single, rungs, cells)))
    for shapes, parts in elsewhere.items():
        panels.append((f"compiled form at {shapes}", _numbered_panel(parts, _rungs_of(cells, parts), cells)))
    for (kind, _), parts in kinds.items():
        if len(parts) == 1:
            continue
        pieces = math.ceil(len(parts) / COLUMNS)
        size = math.ceil(len(parts) / pieces)
        for start in range(0, len(parts), size):
            piece = parts[start : start + size]
            name = f"{kind} {_index(piece[0])}–{_index(piece[-1])}"
            panels.append((name, _dense_panel(name, piece, _rungs_of(cells, parts), cells)))
    return panels


def _rungs_of(cells: Mapping[tuple[str, str], Cell], parts: Sequence[str]) -> list[str]:
    """The rungs that any of `parts` climbed, the highest first."""
    known = set(parts)
    return sorted({rung for part, rung in cells if part in known}, key=RUNG_ORDER.__getitem__, reverse=True)


def depth_chart(rows: Sequence[ReportRow], kinds: Sequence[str], measure: Measure) -> str:
    """Error over depth: a line per rung, a point per block, logarithmic; empty when there are no such rows.

    A dashed line marks the delta cosine bound as the error it allows when only the direction is wrong,
    sqrt(2 (1 - cosine)).
    """
    chosen = [row for row in at_build_shapes(rows) if row["kind"] in kinds and row["rung"] not in EXACT_RUNGS]
    if not chosen:
        return ""
    cells = _worst_cells(chosen, measure)
    parts = list(dict.fromkeys(row["part"] for kind in kinds for row in chosen if row["kind"] == kind))
    rungs = sorted({row["rung"] for row in chosen}, key=RUNG_ORDER.__getitem__)
    shown = [max(cell.value, FLOOR) for cell in cells.values() if math.isfinite(cell.value)]
    low = math.floor(math.log10(min(shown, default=FLOOR)))
    high = max(math.ceil(math.log10(max(shown, default=1.0)) + 1e-9), low + 1, -1)
    plot = _Plot(low, high, len(parts))
    out = [plot.axes(), plot.sections(parts, {row["part"]: row["kind"] for row in chosen})]
    out += [plot.bound(bound, names, shown) for bound, names in _delta_bounds(chosen, measure).items()]
    out += [plot.line(rung, [cells.get((part, rung)) for part in parts], parts) for rung in rungs]
    ends = {rung: cells[(part, rung)].value for rung in rungs for part in parts if (part, rung) in cells}
    out.append(plot.names(ends))
    what = "what each rung adds to the error" if measure == "added" else "error against the reference"
    label = f"{what}, {len(parts)} {' and '.join(kinds)} parts, relative L2 on a logarithmic axis"
    return _svg(plot.width, plot.height, label, out, css="depth")


def step_chart(rows: Sequence[ReportRow], kinds: Sequence[str], measure: Measure) -> str:
    """Error over denoising steps: per rung a line of the worst block and a dotted one of the middle block.

    Empty where fewer than two steps were recorded.
    """
    chosen = [row for row in at_build_shapes(rows) if row["kind"] in kinds and row["rung"] not in EXACT_RUNGS]
    steps = sorted({row["step"] for row in chosen if row["step"] >= 0})
    if len(steps) < 2:
        return ""
    blocks: dict[tuple[str, str], list[Cell]] = {}
    for step in steps:
        for (_, rung), cell in _worst_cells((row for row in chosen if row["step"] == step), measure, True).items():
            blocks.setdefault((str(step), rung), []).append(cell)
    worst = {key: max(cells, key=lambda cell: (math.isnan(cell.value), cell.value)) for key, cells in blocks.items()}
    middle = {key: sorted(cell.value for cell in cells)[len(cells) // 2] for key, cells in blocks.items()}
    rungs = sorted({rung for _, rung in blocks}, key=RUNG_ORDER.__getitem__)
    shown = [max(value, FLOOR) for cell in worst.values() if math.isfinite(value := cell.value)]
    shown += [max(value, FLOOR) for value in middle.values() if math.isfinite(value)]
    low = math.floor(math.log10(min(shown, default=FLOOR)))
    high = max(math.ceil(math.log10(max(shown, default=1.0)) + 1e-9), low + 1, -1)
    plot = _Plot(low, high, len(steps))
    names = [str(step) for step in steps]
    out = [plot.axes(), _text((plot.left + plot.width - plot.right) / 2, 12, "denoising step", "label", "middle")]
    every = max(1, math.ceil(len(steps) / 20))
    out += [_text(plot.x(i), plot.height - 12, name, "tick", "middle") for i, name in enumerate(names) if not i % every]
    for rung in rungs:
        values = [middle.get((name, rung)) for name in names]
        points = "L".join(f"{plot.x(i):.1f} {plot.y(v):.1f}" for i, v in enumerate(values) if v is not None)
        out.append(f'<g class="series s{_series(rung)}"><path class="run middle" d="M{points}"/></g>')
        out.append(plot.line(rung, [worst.get((name, rung)) for name in names], [f"step {name}" for name in names]))
    out.append(plot.names({rung: worst[name, rung].value for name in names for rung in rungs if (name, rung) in worst}))
    label = f"error of {' and '.join(kinds)} parts over {len(steps)} steps, worst and middle, relative L2, logarithmic"
    return _svg(plot.width, plot.height, label, out, css="depth")


def _worst_cells(rows: Iterable[ReportRow], measure: Measure, name_part: bool = False) -> dict[tuple[str, str], Cell]:
    cells: dict[tuple[str, str], Cell] = {}
    for row in rows:
        key = (row["part"], row["rung"])
        value = value_of(row, measure)
        where = row["output"] if row["step"] < 0 else f"{row['output']}, step {row['step']}"
        where = f"{row['part']} {row['output']}" if name_part else where
        old = cells.get(key)
        passed = row["passed"] and (old is None or old.passed)
        if old is None or math.isnan(value) or value > old.value:
            cells[key] = Cell(value, passed, where)
        elif passed != old.passed:
            cells[key] = Cell(old.value, passed, old.where)
    return cells


def _dense_panel(name: str, parts: list[str], rungs: list[str], cells: Mapping[tuple[str, str], Cell]) -> str:
    width, height = LABEL_WIDTH + CELL * len(parts) + 1, 18 + ROW_HEIGHT * len(rungs)
    out = _rung_labels(rungs, 0)
    for column, part in enumerate(parts):
        x = LABEL_WIDTH + CELL * column
        out += [_cell(x, ROW_HEIGHT * i, CELL, part, rung, cells, False) for i, rung in enumerate(rungs)]
        if column % 6 == 0 or (column == len(parts) - 1 and column % 6 > 1):
            out.append(_text(x + CELL / 2, height - 5, _index(part), "tick", "middle"))
    return _svg(width, height, f"error of {name} by rung; every value stands in the table below", out, css="heat")


def _numbered_panel(parts: list[str], rungs: list[str], cells: Mapping[tuple[str, str], Cell]) -> str:
    names = [split_name(part)[0] for part in parts]
    longest = max(map(len, names))
    top = 14 + 3 * longest if longest > 9 else 20
    width, height = LABEL_WIDTH + NUMBERED_CELL * len(parts) + 40, top + ROW_HEIGHT * len(rungs) + 1
    out = _rung_labels(rungs, top)
    for column, part in enumerate(parts):
        x = LABEL_WIDTH + NUMBERED_CELL * column
        turn = f' transform="rotate(-28 {x + 8} {top - 7})"' if top > 20 else ""
        out.append(f'<text class="tick" x="{x + 8}" y="{top - 7}"{turn}>{escape(names[column])}</text>')
        out += [_cell(x, top + ROW_HEIGHT * i, NUMBERED_CELL, part, rung, cells, True) for i, rung in enumerate(rungs)]
    return _svg(width, height, "error of the parts that exist once, by rung", out, css="heat numbered")


def _rung_labels(rungs: list[str], top: float) -> list[str]:
    return [
        _text(LABEL_WIDTH - 8, top + ROW_HEIGHT * i + ROW_HEIGHT * 0.68, rung, "label", "end")
        for i, rung in enumerate(rungs)
    ]


def _cell(
    x: float, y: float, width: float, part: str, rung: str, cells: Mapping[tuple[str, str], Cell], numbered: bool
) -> str:
    cell = cells.get((part, rung))
    box = f'x="{x + 0.5:g}" y="{y + 0.5:g}" width="{width - 1:g}" height="{ROW_HEIGHT - 1}" rx="1.5"'
    if cell is None:
        return f'<rect class="none" {box}><title>{escape(part)}: {rung} not climbed</title></rect>'
    shade = shade_of(cell.value)
    number = "NaN" if math.isnan(cell.value) else f"{cell.value:.1e}".replace("e-0", "e-") if cell.value else "0"
    state = "within its gates" if cell.passed else "missed a gate"
    title = f"{part} · {rung}: {number} ({cell.where}), {state}"
    out = (
        f'<g data-part="{escape(part)}" data-rung="{rung}"><title>{escape(title)}</title><rect class="q{shade}" {box}/>'
    )
    if numbered:
        out += _text(x + width / 2, y + ROW_HEIGHT * 0.68, number, f"n{shade}", "middle")
    if not cell.passed:
        inset = "" if numbered else _cross(x + width / 2, y + ROW_HEIGHT / 2, 3.5)
        out += f'<rect class="miss" {box}/>{inset}'
    return out + "</g>"


def shade_of(value: float) -> int:
    """The shade of an error, 0 to BINS - 1; NaN and infinity have the strongest."""
    if not math.isfinite(value):
        return BINS - 1
    return 0 if value <= 0.0 else min(BINS - 1, max(0, math.floor(2.0 * (math.log10(value) + 8.0))))


def _delta_bounds(rows: Iterable[ReportRow], measure: Measure) -> dict[float, list[str]]:
    """Delta cosine bounds that apply on the side `measure` shows, and the rungs each applies to."""
    side = "previous" if measure == "added" else "reference"
    bounds: dict[float, set[str]] = {}
    for row in rows:
        for verdict in row["verdicts"]:
            if verdict["metric"] == "delta_cosine" and verdict["against"] == side:
                bounds.setdefault(float(verdict["bound"]), set()).add(row["rung"])
    return {bound: sorted(rungs, key=RUNG_ORDER.__getitem__) for bound, rungs in sorted(bounds.items())}


@dataclass(frozen=True, slots=True)
class _Plot:
    """Geometry of a depth chart: decades low..high upwards, one column per part."""

    low: int
    high: int
    columns: int
    width: int = 860
    height: int = 330
    left: int = 48
    right: int = 96
    top: int = 24
    bottom: int = 30

    def x(self, column: float) -> float:
        return self.left + (column + 0.5) * (self.width - self.left - self.right) / self.columns

    def y(self, value: float) -> float:
        exponent = math.log10(max(value, FLOOR)) if math.isfinite(value) else self.high
        share = (min(max(exponent, self.low), self.high) - self.low) / (self.high - self.low)
        return self.height - self.bottom - share * (self.height - self.top - self.bottom)

    def axes(self) -> str:
        out = ""
        for exponent in range(self.low, self.high + 1):
            y = self.y(10.0**exponent)
            name = "0" if 10.0**exponent <= FLOOR else f"1e{exponent}" if exponent else "1"
            out += f'<path class="grid" d="M{self.left} {y:.1f}H{self.width - self.right}"/>'
            out += _text(self.left - 8, y + 3.5, name, "tick", "end")
        return out

    def sections(self, parts: list[str], kinds: Mapping[str, str]) -> str:
        out, start = "", 0
        for column, part in enumerate(parts):
            end = column == len(parts) - 1 or kinds[parts[column + 1]] != kinds[part]
            if (column - start) % 6 == 0 and (not end or column == start):
                out += _text(self.x(column), self.height - 12, _index(part), "tick", "middle")
            if not end:
                continue
            out += _text((self.x(start) + self.x(column)) / 2, 12, kinds[part], "label", "middle")
            if column < len(parts) - 1:
                x = (self.x(column) + self.x(column + 1)) / 2
                out += f'<path class="divide" d="M{x:.1f} 4V{self.height - self.bottom}"/>'
            start = column + 1
        return out

    def bound(self, cosine: float, rungs: list[str], shown: Sequence[float]) -> str:
        """A dashed line, its name on the side where fewer points lie."""
        allowed = math.sqrt(2.0 * (1.0 - cosine))
        if not 10.0**self.low < allowed < 10.0**self.high:
            return ""
        y = self.y(allowed)
        above = sum(allowed < value < 5.0 * allowed for value in shown)
        below = sum(allowed / 5.0 < value <= allowed for value in shown)
        name = f"gate of {', '.join(rungs)}: delta cosine {cosine:g}"
        line = f'<path class="bound" d="M{self.left} {y:.1f}H{self.width - self.right}"/>'
        return line + _text(self.left + 6, y - 6 if above <= below else y + 14, name, "bound-name", "start")

    def line(self, rung: str, cells: list[Cell | None], parts: list[str]) -> str:
        series = f"s{_series(rung)}"
        path, marks, pen = "", "", "M"
        for column, (cell, part) in enumerate(zip(cells, parts, strict=True)):
            if cell is None:
                pen = "M"
                continue
            x, y = self.x(column), self.y(cell.value)
            path += f"{pen}{x:.1f} {y:.1f}"
            pen = "L"
            mark = _marker(_series(rung), x, y) if cell.passed else _cross(x, y, 5)
            title = f"{part} · {rung}: {cell.value:.2e} ({cell.where})"
            marks += f"<g><title>{escape(title)}</title>{mark}</g>"
        return f'<g class="series {series}"><path class="run" d="{path}"/>{marks}</g>'

    def names(self, ends: Mapping[str, float]) -> str:
        """Rung names at the right ends of their lines, pushed apart where lines meet."""
        placed: list[tuple[float, str]] = []
        for rung, value in sorted(ends.items(), key=lambda end: (self.y(end[1]), -RUNG_ORDER[end[0]])):
            y = self.y(value) + 4
            placed.append((max(y, placed[-1][0] + 15) if placed else y, rung))
        overflow = max(0.0, placed[-1][0] - (self.height - self.bottom + 6)) if placed else 0.0
        x = self.width - self.right + 6
        return "".join(
            f'<g class="series s{_series(rung)}">{_marker(_series(rung), x + 4, y - overflow - 4)}'
            f"{_text(x + 14, y - overflow, rung, 'name', 'start')}</g>"
            for y, rung in placed
        )


def _series(rung: str) -> int:
    return SERIES.get(rung, 0)


def _marker(series: int, x: float, y: float) -> str:
    """A shape per rung, so that lines stay apart without colour."""
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


def _cross(x: float, y: float, size: float) -> str:
    d = f"M{x - size:g} {y - size:.1f}l{2 * size:g} {2 * size:g}m0 {-2 * size:g}l{-2 * size:g} {2 * size:g}"
    return f'<path class="cross" d="{d}"/>'


def _text(x: float, y: float, text: str, css: str, anchor: str) -> str:
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(width: float, height: float, label: str, body: Iterable[str], css: str) -> str:
    return (
        f'<svg class="{css}" viewBox="0 0 {width:g} {height:g}" width="{width:g}" height="{height:g}" role="img" '
        f'aria-label="{escape(label)}">{"".join(body)}</svg>'
    )


def _index(part: str) -> str:
    return split_name(part)[0].rpartition(".")[2]
