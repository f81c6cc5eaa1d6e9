"""The plot that the charts share: its axes, its lines and what is written on them."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from fluxkiln.compile.toolchains.neuron.toolchain import TOOLCHAIN
from fluxkiln.compile.toolchains.onnxruntime.toolchain import RUNGS as LINKED
from fluxkiln.compile.toolchains.tpu_mlir.toolchain import RUNGS as COMPILED
from fluxkiln.verify.gates import RUNGS
from fluxkiln.verify.report.plot import FLOOR, Plot, Point, decades, marker


def parse(markup):
    return ElementTree.fromstring(f"<svg>{markup}</svg>")


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([2e-7, 4e-7], (-7, -6)),
        ([2e-7, 0.3], (-7, 0)),
        ([0.001, 0.1], (-3, -1)),
        ([0.0, 1e-12], (-9, -8)),
        ([math.nan, math.inf, 3.0], (0, 1)),
        ([math.nan], (-9, -8)),
        ([], (-9, -8)),
    ],
)
def test_decades_are_no_more_than_it_takes(values, wanted):
    assert decades(values) == wanted


def test_axes_say_what_they_are():
    texts = [text.text for text in parse(Plot(-3, 0, 4).axes("block")).iter("text")]
    assert texts == ["1e-3", "1e-2", "1e-1", "1", "relative L2 error", "block"]
    assert next(parse(Plot(-9, -8, 4).axes("x")).iter("text")).text == "0"


def test_more_is_up_and_what_is_beyond_stands_at_the_edge():
    plot = Plot(-3, 0, 2)
    heights = [plot.y(value) for value in (1e-3, 1e-2, 1.0)]
    assert heights == sorted(heights, reverse=True)
    assert plot.y(0.0) == plot.y(FLOOR) == plot.y(1e-3)
    assert plot.y(math.nan) == plot.y(math.inf) == plot.y(50.0) == plot.y(1.0)


def test_a_line_breaks_where_there_is_no_value_and_marks_a_miss():
    points = [Point(0.1, True, "a"), None, Point(0.1, False, "<b>"), Point(0.1, True, "c")]
    line = parse(Plot(-3, 0, 4).line(5, points))
    assert line.find(".//path[@class='run']").get("d").count("M") == 2
    assert [title.text for title in line.iter("title")] == ["a", "<b>", "c"]
    assert len(line.findall(".//path[@class='cross']")) == 1


def test_the_name_of_a_bound_keeps_clear_of_the_lines():
    plot = Plot(-4, 0, 2)
    for shown, above in (([0.02, 1e-3], False), ([0.5, 9e-3], True), ([], True)):
        name = parse(plot.bound(0.01, "gate", shown)).find("text")
        assert (float(name.get("y")) < plot.y(0.01)) is above


def test_rungs_that_can_stand_in_one_chart_have_marks_of_their_own():
    for rungs in (
        [rung for rung in (*RUNGS[1:], *COMPILED) if not rung.exact],
        (*RUNGS[1:], *LINKED),
        TOOLCHAIN.rungs,
    ):
        plot = Plot(-3, 0, 1)
        groups = parse(plot.names(dict.fromkeys(rungs, 0.1))).findall("g")
        assert len({group.get("class") for group in groups}) == len(rungs)
        heights = sorted(float(group.find("text").get("y")) for group in groups)
        assert all(after - before >= 15 for before, after in pairwise(heights))
    assert len({marker(series, 0, 0) for series in range(1, 6)}) == 5
