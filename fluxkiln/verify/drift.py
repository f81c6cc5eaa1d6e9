"""How far latents drift from the reference's, step by step: one line a run, on a logarithmic axis."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 260, 48, 24, 20, 34


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
    low, high = math.floor(math.log10(min(shown))), math.ceil(math.log10(max(shown)) + 1e-9)
    high = max(high, low + 1)

    def at(step: int, value: float) -> tuple[float, float]:
        x = LEFT + (step + 0.5) * (WIDTH - LEFT - RIGHT) / steps
        exponent = math.log10(value) if value > 0.0 and math.isfinite(value) else (low if value == 0.0 else high)
        return x, HEIGHT - BOTTOM - (exponent - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    out = []
    for exponent in range(low, high + 1):
        y = at(0, 10.0**exponent)[1]
        out.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 3.5:.1f}" text-anchor="end">1e{exponent}</text>')
    for step in range(0, steps, max(1, math.ceil(steps / 20))):
        x = at(step, 1.0)[0]
        out.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 16}" text-anchor="middle">{step + 1}</text>')
    worst = max(range(len(drifts)), key=lambda index: drifts[index][-1] if drifts[index] else -math.inf)
    for index, (entry, drift) in enumerate(zip(entries, drifts, strict=True)):
        points = [at(step, value) for step, value in enumerate(drift)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        title = f"{entry['prompt']}, seed {entry['seed']}: {drift[-1]:.2e} after step {len(drift)}"
        bold = " worst" if index == worst else ""
        dots = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>' for x, y in points) if bold else ""
        out.append(
            f'<g class="series s{5 if bold else 2}"><title>{escape(title)}</title>'
            f'<path class="run{bold}" d="{path}"/>{dots}</g>'
        )
    label = f"drift of the latents over {steps} steps, {len(drifts)} runs, relative L2 on a logarithmic axis"
    return (
        f'<svg class="depth" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(label)}">{"".join(out)}</svg>'
    )
