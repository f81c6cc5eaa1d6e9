"""What pictures of drawn scenes show, in the page and where builds are compared."""

import numpy as np
import pytest

from fluxkiln.verify.ladder import Ladder
from fluxkiln.verify.report.comparison import fact_lines
from fluxkiln.verify.report.document import build_report, render_html
from fluxkiln.verify.runs import thumbnail

PICTURE = thumbnail(np.zeros((16, 16, 3)))
JUDGED = {
    "facts": 41.5, "prompts": 12.5, "chance": 15.0, "stated": 130, "images": 24, "wrong": {"count": 3},
    "reference": {"psnr": 31.2, "ssim": 0.95, "distance": 0.01}, "diffusers": 43.0, "rung": "dequantized", "steps": 8,
    "entries": [{"prompt": "a <red> kiln", "reference": PICTURE, "actual": PICTURE}],
}  # fmt: skip


@pytest.fixture
def report():
    ladder = Ladder()
    ones = np.ones((2, 4), np.float32)
    ladder.compare("pipeline", None, "latents", 0, ones, None, [("patched", ones)], "F32")
    return lambda **facts: build_report(ladder, {"title": "t", "target": "cpu", **facts})


def test_the_page_shows_facts_and_pictures(report):
    html = render_html(report(judged=JUDGED))
    for shown in ("41.5 %", "diffusers 43.0 %, chance 15.0 %", "count 3 wrong", "31.2 dB", "a &lt;red&gt; kiln"):
        assert shown in html
    assert html.count(PICTURE) == 2, "not once more among the data"
    assert 'id="judged"' not in render_html(report())


def test_builds_are_compared_by_them(report):
    (line,) = (line for line in fact_lines([report(judged=JUDGED), report()]) if line.name.startswith("facts"))
    assert line.cells[0].startswith("41.5 % (diffusers 43.0 %, chance 15.0 %); PSNR 31.2 dB")
    assert line.cells[1] == ""
