"""How far latents drift from the reference's, step by step: one line a run, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from fluxkiln.verify.report.charts import MOST_TICKS
from fluxkiln.verify.report.plot import Plot, decades, svg


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
