"""The report's charts as inline SVG: heat maps of rungs and parts, errors over depth and over steps, drift of latents.

Functions take rows as `report.json` holds them (see `ladder.row_to_dict`) and the rungs of their ladder by name;
variable text is escaped. What a chart shows stands in the report's table as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any, Literal, TypeVar

from fluxkiln.verify.gates import Rung
from fluxkiln.verify.report.plot import Plot, Point, cross, decades, marker, svg, svg_text

Measure = Literal["delta", "whole", "added"]
ReportRow = Mapping[str, Any]
_Rungs = Mapping[str, Rung]

BINS = 17  # half decades from 1e-8: the first bin holds everything below, the last everything from 1 up
COLUMNS = 24  # a panel wraps after this many parts, so that it still fits a telephone
LABEL_WIDTH, CELL, ROW_HEIGHT = 82, 13, 20
NUMBERED_CELL = 56
MOST_TICKS = 20


@dataclass(frozen=True, slots=True)
class Cell:
    """The worst value of one part at one rung, over outputs and steps."""

    value: float
    passed: bool
    where: str


_Cell = TypeVar("_Cell", bound=Cell)


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


def ladder_panels(rows: Sequence[ReportRow], measure: Measure, known: _Rungs) -> list[tuple[str, str]]:
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
    rungs = _rungs_of(cells, [part for parts in kinds.values() for part in parts], known)
    single = [parts[0] for parts in kinds.values() if len(parts) == 1]
    if single:
        panels.append(("parts that exist once", _numbered_panel(single, rungs, cells)))
    for shapes, parts in elsewhere.items():
        panels.append((f"compiled form at {shapes}", _numbered_panel(parts, _rungs_of(cells, parts, known), cells)))
    for (kind, _), parts in kinds.items():
        if len(parts) == 1:
            continue
        pieces = math.ceil(len(parts) / COLUMNS)
        size = math.ceil(len(parts) / pieces)
        for start in range(0, len(parts), size):
            piece = parts[start : start + size]
            name = f"{kind} {_index(piece[0])}–{_index(piece[-1])}"
            panels.append((name, _dense_panel(name, piece, _rungs_of(cells, parts, known), cells)))
    return panels


def _rungs_of(cells: Mapping[tuple[str, str], Cell], parts: Sequence[str], known: _Rungs) -> list[str]:
    """The rungs at which any of `parts` was run, the highest first."""
    chosen = set(parts)
    return sorted({rung for part, rung in cells if part in chosen}, key=lambda rung: -known[rung].order)


def depth_chart(rows: Sequence[ReportRow], kinds: Mapping[str, str], measure: Measure, known: _Rungs) -> str:
    """Error over depth: a line per rung, a point per block, logarithmic; empty when there are no such rows.

    A dashed line marks the delta cosine bound as the error it allows when only the direction is wrong,
    sqrt(2 (1 - cosine)).

    Args:
        kinds: kind of block -> what its blocks are called.
    """
    chosen = _drawn(rows, kinds, known)
    if not chosen:
        return ""
    cells = _worst_cells(chosen, measure)
    parts = list(dict.fromkeys(row["part"] for kind in kinds for row in chosen if row["kind"] == kind))
    rungs = rungs_drawn(rows, kinds, known)
    shown = [cell.value for cell in cells.values()]
    gates = _delta_bounds(chosen, measure, known)
    bounds = {math.sqrt(2.0 * (1.0 - cosine)): (cosine, on) for cosine, on in gates.items()}
    plot = Plot(*decades([*shown, *bounds]), len(parts))
    out = [plot.axes("block"), _sections(plot, parts, {row["part"]: kinds[row["kind"]] for row in chosen})]
    for allowed, (cosine, on) in bounds.items():
        out.append(plot.bound(allowed, f"gate of {', '.join(on)}: delta cosine {cosine:g}", shown))
    for rung in rungs:
        points = [_point(part, rung.name, cells.get((part, rung.name))) for part in parts]
        out.append(plot.line(rung.series, points))
    ends = {rung: cells[part, rung.name].value for rung in rungs for part in parts if (part, rung.name) in cells}
    out.append(plot.names(ends))
    what = "what each rung adds to the error" if measure == "added" else "error against the reference"
    named = " and ".join(dict.fromkeys(kinds[row["kind"]] for row in chosen))
    label = f"{what}, {len(parts)} {named}, relative L2 on a logarithmic axis"
    return svg(plot.width, plot.height, label, out, css="depth")


def step_chart(rows: Sequence[ReportRow], kinds: Mapping[str, str], measure: Measure, known: _Rungs) -> str:
    """Error over denoising steps: per rung a line of the worst block and a dotted one of the middle block.

    Empty where fewer than two steps were recorded.
    """
    chosen = _drawn(rows, kinds, known)
    steps = sorted({row["step"] for row in chosen if row["step"] >= 0})
    if len(steps) < 2:
        return ""
    blocks: dict[tuple[int, str], list[Cell]] = {}
    for step in steps:
        for (_, name), cell in _worst_cells((row for row in chosen if row["step"] == step), measure, True).items():
            blocks.setdefault((step, name), []).append(cell)
    worst = {key: max(cells, key=lambda cell: (math.isnan(cell.value), cell.value)) for key, cells in blocks.items()}
    middle = {key: sorted(cell.value for cell in cells)[len(cells) // 2] for key, cells in blocks.items()}
    plot = Plot(*decades([*middle.values(), *(cell.value for cell in worst.values())]), len(steps))
    every = math.ceil(len(steps) / MOST_TICKS)
    out = [plot.axes("denoising step"), *(plot.tick(i, str(step)) for i, step in enumerate(steps) if not i % every)]
    ends: dict[Rung, float] = {}
    for rung in rungs_drawn(rows, kinds, known):
        values = plot.path([middle.get((step, rung.name)) for step in steps])
        out.append(f'<g class="series s{rung.series}"><path class="run middle" d="{values}"/></g>')
        seen = {step: worst.get((step, rung.name)) for step in steps}
        out.append(plot.line(rung.series, [_point(f"step {step}", rung.name, cell) for step, cell in seen.items()]))
        ends[rung] = [cell.value for cell in seen.values() if cell is not None][-1]
    out.append(plot.names(ends))
    named = " and ".join(dict.fromkeys(kinds[row["kind"]] for row in chosen))
    label = f"error of the {named} over {len(steps)} steps, worst and middle, relative L2 on a logarithmic axis"
    return svg(plot.width, plot.height, label, out, css="depth")


def rungs_drawn(rows: Sequence[ReportRow], kinds: Mapping[str, str], known: _Rungs) -> list[Rung]:
    """The rungs that the charts of these kinds have a line for, the lowest first."""
    return sorted({known[row["rung"]] for row in _drawn(rows, kinds, known)}, key=lambda rung: rung.order)


def rung_keys(rungs: Sequence[Rung]) -> str:
    """Which mark and colour is which rung, as HTML: for where the names in a chart are out of sight."""
    return "".join(
        f'<span class="series s{rung.series}"><svg width="12" height="12" aria-hidden="true">'
        f"{marker(rung.series, 6, 6)}</svg> {escape(rung.name)}</span> "
        for rung in rungs
    )


def _drawn(rows: Sequence[ReportRow], kinds: Mapping[str, str], known: _Rungs) -> list[ReportRow]:
    return [row for row in at_build_shapes(rows) if row["kind"] in kinds and not known[row["rung"]].exact]


def _point(place: str, rung: str, cell: Cell | None) -> Point | None:
    if cell is None:
        return None
    return Point(cell.value, cell.passed, f"{place} · {rung}: {cell.value:.2e} ({cell.where})")


def _sections(plot: Plot, parts: list[str], named: Mapping[str, str]) -> str:
    """The numbers of the blocks, what each kind of them is called above it, and a line between kinds."""
    every = 1 if len(parts) <= MOST_TICKS else 6
    out, start = "", 0
    for column, part in enumerate(parts):
        end = column == len(parts) - 1 or named[parts[column + 1]] != named[part]
        # the last one stands close to the first of the next kind
        if (column - start) % every == 0 and (every == 1 or not end or column == start):
            out += plot.tick(column, _index(part))
        if not end:
            continue
        out += svg_text((plot.x(start) + plot.x(column)) / 2, 12, named[part], "label", "middle")
        if column < len(parts) - 1:
            x = (plot.x(column) + plot.x(column + 1)) / 2
            out += f'<path class="divide" d="M{x:.1f} 4V{plot.height - plot.bottom}"/>'
        start = column + 1
    return out


def _worst_cells(rows: Iterable[ReportRow], measure: Measure, name_part: bool = False) -> dict[tuple[str, str], Cell]:
    cells: dict[tuple[str, str], Cell] = {}
    for row in rows:
        key = (row["part"], row["rung"])
        value = value_of(row, measure)
        where = row["output"] if row["step"] < 0 else f"{row['output']}, step {row['step']}"
        where = f"{row['part']} {row['output']}" if name_part else where
        keep_worst(cells, key, Cell(value, row["passed"], where))
    return cells


def keep_worst(cells: dict[Any, _Cell], key: Any, new: _Cell) -> None:
    """Have the worse of a cell and a new one at its place; it has passed where both have."""
    old = cells.get(key, new)
    worst = new if math.isnan(new.value) or new.value > old.value else old
    cells[key] = replace(worst, passed=new.passed and old.passed)


def _dense_panel(name: str, parts: list[str], rungs: list[str], cells: Mapping[tuple[str, str], Cell]) -> str:
    width, height = LABEL_WIDTH + CELL * len(parts) + 1, 18 + ROW_HEIGHT * len(rungs)
    out = _rung_labels(rungs, 0)
    for column, part in enumerate(parts):
        x = LABEL_WIDTH + CELL * column
        out += [_cell(x, ROW_HEIGHT * i, CELL, part, rung, cells, False) for i, rung in enumerate(rungs)]
        if column % 6 == 0 or (column == len(parts) - 1 and column % 6 > 1):
            out.append(svg_text(x + CELL / 2, height - 5, _index(part), "tick", "middle"))
    return svg(width, height, f"error of {name} by rung; every value stands in the table below", out, css="heat")


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
    return svg(width, height, "error of the parts that exist once, by rung", out, css="heat numbered")


def _rung_labels(rungs: list[str], top: float) -> list[str]:
    return [
        svg_text(LABEL_WIDTH - 8, top + ROW_HEIGHT * i + ROW_HEIGHT * 0.68, rung, "label", "end")
        for i, rung in enumerate(rungs)
    ]


def _cell(
    x: float, y: float, width: float, part: str, rung: str, cells: Mapping[tuple[str, str], Cell], numbered: bool
) -> str:
    cell = cells.get((part, rung))
    box = f'x="{x + 0.5:g}" y="{y + 0.5:g}" width="{width - 1:g}" height="{ROW_HEIGHT - 1}" rx="1.5"'
    if cell is None:
        return f'<rect class="none" {box}><title>{escape(part)}: {rung} not run</title></rect>'
    shade = shade_of(cell.value)
    number = "NaN" if math.isnan(cell.value) else f"{cell.value:.1e}".replace("e-0", "e-") if cell.value else "0"
    state = "within its gates" if cell.passed else "missed a gate"
    title = f"{part} · {rung}: {number} ({cell.where}), {state}"
    out = (
        f'<g data-part="{escape(part)}" data-rung="{rung}"><title>{escape(title)}</title><rect class="q{shade}" {box}/>'
    )
    if numbered:
        out += svg_text(x + width / 2, y + ROW_HEIGHT * 0.68, number, f"n{shade}", "middle")
    if not cell.passed:
        inset = "" if numbered else cross(x + width / 2, y + ROW_HEIGHT / 2, 3.5)
        out += f'<rect class="miss" {box}/>{inset}'
    return out + "</g>"


def shade_of(value: float) -> int:
    """The shade of an error, 0 to BINS - 1; NaN and infinity have the strongest."""
    if not math.isfinite(value):
        return BINS - 1
    return 0 if value <= 0.0 else min(BINS - 1, max(0, math.floor(2.0 * (math.log10(value) + 8.0))))


def _delta_bounds(rows: Iterable[ReportRow], measure: Measure, known: _Rungs) -> dict[float, list[str]]:
    """Delta cosine bounds that apply on the side `measure` shows, and the rungs each applies to."""
    side = "previous" if measure == "added" else "reference"
    bounds: dict[float, set[str]] = {}
    for row in rows:
        for verdict in row["verdicts"]:
            if verdict["metric"] == "delta_cosine" and verdict["against"] == side:
                bounds.setdefault(float(verdict["bound"]), set()).add(row["rung"])
    return {bound: sorted(rungs, key=lambda rung: known[rung].order) for bound, rungs in sorted(bounds.items())}


def _index(part: str) -> str:
    return split_name(part)[0].rpartition(".")[2]


def drift_chart(entries: Sequence[Mapping[str, Any]]) -> str:
    """Relative L2 of the latents after every step, a line for each of `entries`; the worst at the end is the bold one.

    Args:
        entries: of a report's `runs`: prompt, seed, and drift, a number per step.
    """
    drifts = [[float(value) for value in entry["drift"]] for entry in entries]
    steps = max(map(len, drifts), default=0)
    shown = [value for drift in drifts for value in drift if math.isfinite(value) and value > 0.0]
    if not shown:
        return ""
    plot = Plot(*decades(shown), steps, right=24)
    every = math.ceil(steps / MOST_TICKS)
    out = [plot.axes("steps done"), *(plot.tick(step, str(step + 1)) for step in range(0, steps, every))]
    worst = max(range(len(drifts)), key=lambda index: drifts[index][-1] if drifts[index] else -math.inf)
    for index, (entry, drift) in enumerate(zip(entries, drifts, strict=True)):
        title = f"{entry['prompt']}, seed {entry['seed']}: {drift[-1]:.2e} after step {len(drift)}"
        bold = " worst" if index == worst else ""
        places = ((plot.x(step), plot.y(value)) for step, value in enumerate(drift))
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in places) if bold else ""
        out.append(
            f'<g class="series s{5 if bold else 2}"><title>{escape(title)}</title>'
            f'<path class="run{bold}" d="{plot.path(drift)}"/>{dots}</g>'
        )
    label = f"drift of the latents over {steps} steps, {len(drifts)} runs, relative L2 on a logarithmic axis"
    return svg(plot.width, plot.height, label, out, css="depth")
