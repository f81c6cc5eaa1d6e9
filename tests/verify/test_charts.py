import math
from xml.etree import ElementTree

import numpy as np
import pytest

from fluxkiln.verify.charts import BINS, _bin, depth_chart, ladder_panels
from fluxkiln.verify.ladder import row_to_dict

MEASURES = ("delta", "whole", "added")


@pytest.fixture(scope="module")
def rows(full_recording):
    return [row_to_dict(row) for row in full_recording.climb().rows]


def parse(svg):
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize("measure", MEASURES)
def test_panels_hold_every_part_at_every_rung_once(rows, measure):
    panels = ladder_panels(rows, measure)
    cells = [(g.get("data-part"), g.get("data-rung")) for _, svg in panels for g in parse(svg).iter("g")]
    assert sorted(cells) == sorted({(row["part"], row["rung"]) for row in rows})
    assert [title for title, _ in panels] == [
        "parts that exist once", "t5_block 00–23", "double 00–18", "single 00–18", "single 19–37",
    ]  # fmt: skip


def test_a_miss_is_marked_by_more_than_colour(recording):
    recording.outputs["single.01", "hidden_states_out", 1]["simulator"][0, 0] = np.nan
    rows = [row_to_dict(row) for row in recording.climb().rows]
    svg = dict(ladder_panels(rows, "delta"))["single 00–02"]
    bad = [g for g in parse(svg).iter("g") if g.find("path[@class='cross']") is not None]
    assert [(g.get("data-part"), g.get("data-rung")) for g in bad] == [("single.01", "simulator")]
    assert "NaN (hidden_states_out, step 1), missed a gate" in bad[0].find("title").text
    assert 'class="cross"' in depth_chart(rows, ("double", "single"), "added")


def test_a_rung_not_climbed_is_shown_as_such(rows):
    some = [row for row in rows if not (row["part"] == "double.03" and row["rung"] == "simulator")]
    svg = dict(ladder_panels(some, "delta"))["double 00–18"]
    empty = [rect for rect in parse(svg).iter("rect") if rect.get("class") == "none"]
    assert [rect.find("title").text for rect in empty] == ["double.03: simulator not climbed"]


@pytest.mark.parametrize("measure", ["added", "delta"])
def test_depth_has_a_line_per_rung_and_a_point_per_block(rows, measure):
    svg = parse(depth_chart(rows, ("double", "single"), measure))
    lines = [g for g in svg.iter("g") if g.find("path[@class='run']") is not None]
    assert len(lines) == 5
    assert all(len(line.findall("g")) == 19 + 38 for line in lines)
    assert any("delta cosine" in (text.text or "") for text in svg.iter("text"))


def test_depth_of_nothing_is_empty(rows):
    assert depth_chart(rows, ("unknown",), "delta") == ""


def test_names_are_escaped(rows):
    hostile = [row | {"part": '<b>"&', "kind": "tail"} for row in rows if row["part"] == "tail"]
    (_, svg) = ladder_panels(hostile, "whole")[0]
    assert "<b>" not in svg
    assert parse(svg).find("g").get("data-part") == '<b>"&'


def test_bins_rise_with_the_error():
    values = [0.0, 1e-12, 1e-8, 5e-8, 1e-6, 1e-3, 0.09, 0.11, 1.0, 100.0, math.inf, math.nan]
    bins = [_bin(value) for value in values]
    assert bins == sorted(bins)
    assert bins[0] == 0
    assert bins[-1] == BINS - 1
