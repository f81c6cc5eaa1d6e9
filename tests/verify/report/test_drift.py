"""The chart of latents drifting from the reference's."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

from fluxkiln.verify.report.charts import drift_chart


def entry(drift, seed=0, prompt="a kiln"):
    return {"prompt": prompt, "seed": seed, "drift": drift}


def test_a_line_a_run_and_the_worst_is_bold():
    svg = ElementTree.fromstring(drift_chart([entry([1e-3, 2e-3]), entry([1e-3, 9e-3], 1), entry([1e-4, 1e-3], 2)]))
    groups = [group for group in svg.iter("g") if "series" in group.get("class", "")]
    assert len(groups) == 3
    bold = [group.find("title").text for group in groups if "worst" in group.find("path").get("class")]
    assert bold == ["a kiln, seed 1: 9.00e-03 after step 2"]


def test_later_is_right_and_more_is_up():
    svg = ElementTree.fromstring(drift_chart([entry([1e-3, 1e-2, 1e-1])]))
    dots = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in svg.iter("circle")]
    assert dots == sorted(dots)
    assert [y for _, y in dots] == sorted((y for _, y in dots), reverse=True)


def test_odd_numbers_are_drawn():
    assert drift_chart([]) == ""
    assert drift_chart([entry([0.0, 0.0])]) == ""
    ElementTree.fromstring(drift_chart([entry([0.0, 1e-3, math.inf, math.nan], prompt='<"&>')]))
