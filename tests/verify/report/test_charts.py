import math
from xml.etree import ElementTree

import numpy as np
import pytest

from fluxkiln.compile.toolchains.tpu_mlir.toolchain import RUNGS as OWN
from fluxkiln.verify.gates import rung_table
from fluxkiln.verify.ladder import row_to_dict
from fluxkiln.verify.report.charts import BINS, depth_chart, ladder_panels, shade_of, step_chart, value_of

MEASURES = ("delta", "whole", "added")
RUNGS = rung_table(OWN)
BLOCKS = {"double": "double blocks", "single": "single blocks"}


def dicts(ladder):
    return [row_to_dict(row, ladder.gates) for row in ladder.rows]


@pytest.fixture(scope="module")
def rows(full_recording):
    return dicts(full_recording.compare())


def parse(svg):
    return ElementTree.fromstring(svg)


@pytest.mark.parametrize("measure", MEASURES)
def test_panels_hold_every_part_at_every_rung_once(rows, measure):
    panels = ladder_panels(rows, measure, RUNGS)
    cells = [(g.get("data-part"), g.get("data-rung")) for _, svg in panels for g in parse(svg).iter("g")]
    assert sorted(cells) == sorted({(row["part"], row["rung"]) for row in rows})
    assert [title for title, _ in panels] == [
        "parts that exist once", "t5_block 00–23", "double 00–18", "single 00–18", "single 19–37",
    ]  # fmt: skip


def test_a_miss_is_marked_by_more_than_colour(recording):
    recording.outputs["single.01", "hidden_states_out", 1]["simulator"][0, 0] = np.nan
    rows = dicts(recording.compare())
    svg = dict(ladder_panels(rows, "delta", RUNGS))["single 00–02"]
    bad = [g for g in parse(svg).iter("g") if g.find("path[@class='cross']") is not None]
    assert [(g.get("data-part"), g.get("data-rung")) for g in bad] == [("single.01", "simulator")]
    assert "NaN (hidden_states_out, step 1), missed a gate" in bad[0].find("title").text
    assert 'class="cross"' in depth_chart(rows, BLOCKS, "added", RUNGS)


def test_a_rung_not_run_is_shown_as_such(rows):
    some = [row for row in rows if not (row["part"] == "double.03" and row["rung"] == "simulator")]
    svg = dict(ladder_panels(some, "delta", RUNGS))["double 00–18"]
    empty = [rect for rect in parse(svg).iter("rect") if rect.get("class") == "none"]
    assert [rect.find("title").text for rect in empty] == ["double.03: simulator not run"]


@pytest.mark.parametrize("measure", ["added", "delta"])
def test_depth_has_a_line_per_rung_and_a_point_per_block(rows, measure):
    svg = parse(depth_chart(rows, BLOCKS, measure, RUNGS))
    lines = [g for g in svg.iter("g") if g.find("path[@class='run']") is not None]
    assert len(lines) == 5
    assert all(len(line.findall("g")) == 19 + 38 for line in lines)
    assert any("delta cosine" in (text.text or "") for text in svg.iter("text"))


def test_depth_of_nothing_is_empty(rows):
    assert depth_chart(rows, {"unknown": "x"}, "delta", RUNGS) == ""


def test_names_are_escaped(rows):
    hostile = [row | {"part": '<b>"&', "kind": "tail"} for row in rows if row["part"] == "tail"]
    (_, svg) = ladder_panels(hostile, "whole", RUNGS)[0]
    assert "<b>" not in svg
    assert parse(svg).find("g").get("data-part") == '<b>"&'


def test_bins_rise_with_the_error():
    values = [0.0, 1e-12, 1e-8, 5e-8, 1e-6, 1e-3, 0.09, 0.11, 1.0, 100.0, math.inf, math.nan]
    bins = [shade_of(value) for value in values]
    assert bins == sorted(bins)
    assert bins[0] == 0
    assert bins[-1] == BINS - 1


def test_parts_executed_at_other_shapes_have_a_panel_of_their_own(rows):
    chosen = [row for row in rows if row["part"] in ("double.00", "clip")]
    elsewhere = [
        row | {"part": f"{row['part']} at 1024x1024"} for row in chosen if row["rung"] in ("dequantized", "interpreter")
    ]
    panels = dict(ladder_panels([*rows, *elsewhere], "delta", RUNGS))
    assert list(panels)[:2] == ["parts that exist once", "compiled form at 1024x1024"]
    assert dict(ladder_panels(rows, "delta", RUNGS)).keys() == panels.keys() - {"compiled form at 1024x1024"}
    svg = parse(panels["compiled form at 1024x1024"])
    assert {group.get("data-part") for group in svg.iter("g")} == {"double.00 at 1024x1024", "clip at 1024x1024"}
    assert {group.get("data-rung") for group in svg.iter("g")} == {"dequantized", "interpreter"}
    assert "at 1024x1024" not in [text.text for text in svg.iter("text")]
    assert depth_chart([*rows, *elsewhere], BLOCKS, "delta", RUNGS) == depth_chart(rows, BLOCKS, "delta", RUNGS)


def test_runs_of_the_pipeline_stand_apart_from_it(rows):
    clip = next(row for row in rows if row["part"] == "clip")
    runs = [clip | {"kind": "pipeline", "part": f"pipeline{n}"} for n in ("", ".00", ".01")]
    panels = dict(ladder_panels([*rows, *runs], "whole", RUNGS))
    assert "pipeline 00–01" in panels
    assert 'data-part="pipeline"' in panels["parts that exist once"]


def test_stored_weights_have_no_place_on_a_logarithmic_axis(rows):
    stored = [row | {"rung": "stored"} for row in rows if row["rung"] == "simulator"]
    assert depth_chart([*rows, *stored], BLOCKS, "delta", RUNGS) == depth_chart(rows, BLOCKS, "delta", RUNGS)


def test_error_over_steps_shows_the_worst_block_of_each(rows):
    svg = parse(step_chart(rows, BLOCKS, "delta", RUNGS))
    titles = [title.text for title in svg.iter("title")]
    steps = {title.split(" · ")[0] for title in titles}
    assert steps == {"step 0", "step 1"}
    blocks = [row for row in rows if row["kind"] in ("double", "single") and row["rung"] == "simulator"]
    worst = max((row for row in blocks if row["step"] == 1), key=lambda row: value_of(row, "delta"))
    assert f"step 1 · simulator: {value_of(worst, 'delta'):.2e} ({worst['part']} {worst['output']})" in titles
    assert step_chart([row for row in rows if row["step"] == 0], BLOCKS, "delta", RUNGS) == ""
