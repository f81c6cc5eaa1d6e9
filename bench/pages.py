"""The report of 57 blocks x 6 rungs x 10 timesteps: how long it is built, how large it is, when a browser shows it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np

from bench.figure import Figure
from fluxkiln.verify.report.document import build_report, compare_pictures, render_html
from tests.browser import Browser
from tests.verify.conftest import record, toy_parts

STEPS = 10
SIDE = 512
SECONDS, MEGABYTES, PAINT = 3.0, 3.0, 1.0
_PAINT = "performance.getEntriesByName('first-contentful-paint')[0]?.startTime"


def measure() -> Figure:
    ladder = record(toy_parts(doubles=19, singles=38, encoders=0), STEPS).compare()
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    picture = np.stack([0.5 + 0.4 * np.sin(9 * x + 5 * y), 0.2 + 0.7 * y, 0.5 + 0.4 * np.cos(11 * x * y)], axis=-1)
    off = picture + 0.02 * np.random.default_rng(1).standard_normal(picture.shape)
    reference, compiled = ((np.clip(one, 0, 1) * 255).round().astype(np.uint8) for one in (picture, off))
    ladder.compare("pipeline", None, "image", -1, reference, None, [("simulator", compiled)], "W4BF16")
    render_html(build_report(ladder.rows[:10], {"title": "imports and templates", "target": "bm1684x"}))
    began = time.perf_counter()
    images = compare_pictures(reference, compiled, "simulator")
    facts = {"title": "57 blocks", "target": "bm1684x", "images": images, "heat": ladder.maps.to_json()}
    page = render_html(build_report(ladder.rows, facts))
    built = time.perf_counter() - began
    with tempfile.TemporaryDirectory() as folder, Browser() as browser:
        path = Path(folder) / "report.html"
        path.write_text(page)
        painted = []
        for dark in (False, True, False):
            browser.look_like(1200, 900, dark=dark)
            browser.open(path.as_uri())
            browser.wait(f"{_PAINT} !== undefined")
            painted.append(float(browser.evaluate(_PAINT)) / 1000)
        if browser.errors:
            raise RuntimeError(f"the page complains: {browser.errors[0]}")
    size = len(page.encode()) / 1e6
    rows = (
        ("built", f"{built:.2f} s", f"{SECONDS:.0f} s"),
        ("size, images inside", f"{size:.2f} MB", f"{MEGABYTES:.0f} MB"),
        ("first paint in Chromium, worst of 3", f"{max(painted):.2f} s", f"{PAINT:.0f} s"),
        ("messages on the console", str(len(browser.errors)), "0"),
    )
    return Figure(
        "The report of a whole FLUX.1",
        ("", "measured", "aim"),
        rows,
        (
            f"{len(ladder.rows)} comparisons, made up; two pictures of {SIDE} x {SIDE}. Building is from rows to HTML, "
            "imports excluded.",
        ),
    )
