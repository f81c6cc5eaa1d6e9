"""Several reports held against one another."""

from __future__ import annotations

import json

import pytest

from fluxkiln.errors import UsageError
from fluxkiln.verify.report.comparison import (
    cost_lines,
    fact_lines,
    kind_lines,
    provenance_lines,
    render_comparison,
    rung_lines,
    short_names,
)
from fluxkiln.verify.report.document import build_report, compare_pictures, plain
from fluxkiln.verify.runs import Run, summarise_runs

RUNS = [
    {"prompt": "a", "seed": seed, "drift": (0.1, 0.2), "cosine": 0.99, "psnr": 33.0 + 2 * seed, "ssim": 0.9}
    for seed in (0, 1)
]


@pytest.fixture
def documents(recording, pictures):
    """A sound bundle for one target, and a bad one without a picture for another."""
    sound = recording.compare()
    sound.compare("pipeline", None, "image", -1, pictures[0], None, [("simulator", pictures[1])], "W4BF16")
    first = {
        "title": "tiny-dev", "target": "bm1684x", "model": {"name": "tiny-dev"},
        "shapes": {"width": 64, "height": 64, "tokens": 16, "steps": 2}, "schemes": {"double": "W4BF16", "clip": "F16"},
        "images": compare_pictures(*pictures, "simulator"),
        "parts": [{"name": "a", "kind": "double", "scheme": "F32", "bytes": 1e6, "device_memory": 1, "made": "cast"}],
        "devices": {"budget": 4e9, "peaks": {"all": [2e9, 3e9]}, "load": "all"},
        "estimate": {"label": "", "entries": {"one step": "6.58 s"}},
        "timings": [{"name": "verify", "seconds": 3.0}, {"name": "image by parts", "seconds": 1.5}],
        "tools": {"torch": "2.13.0", "numpy": "2.0"}, "provenance": {"prompt": "a kiln", "seed": 0},
        "runs": {
            "rung": "simulator", "steps": 2, "entries": RUNS, "statistics": summarise_runs([Run(**r) for r in RUNS]),
        },
    }  # fmt: skip
    one = build_report(sound, first)
    recording.outputs["clip", "last_hidden_state", 1]["onnxruntime"] *= 1.5
    spoilt = recording.compare()
    spoilt.rows = [row for row in spoilt.rows if row.rung != "simulator"]
    two = build_report(spoilt, {"title": "tiny-dev", "target": "cpu", "tools": {"torch": "2.14.0", "numpy": "2.0"}})
    return [plain(one), plain(two)]


def test_columns_have_names_of_their_own(documents):
    assert short_names(documents) == ["tiny-dev (bm1684x)", "tiny-dev (cpu)"]
    assert short_names([documents[0], documents[0]]) == ["tiny-dev (bm1684x) #1", "tiny-dev (bm1684x) #2"]
    assert short_names([{"title": "a", "target": "x"}, {"title": "b", "target": "x"}]) == ["a", "b"]


def test_facts(documents):
    facts = {line.name: line.cells for line in fact_lines(documents)}
    assert facts["target"] == ("bm1684x", "cpu")
    assert facts["shapes"] == ("64 x 64, 16 tokens, 2 steps", "")
    assert facts["schemes"] == ("W4BF16: double; F16: clip", "")
    assert facts["images of prompts and seeds"] == ("2, 34.0 dB in the mean, 33.0 dB at worst", "")
    assert facts["comparisons"][1].endswith("1 missed")


def test_one_image_by_every_backend(documents):
    facts = {line.name: line.cells for line in fact_lines(documents)}
    assert facts["recorded run"] == ("prompt a kiln, seed 0", "")
    psnr = next(row for row in documents[0]["rows"] if row["part"] == "pipeline")["vs_reference"]["psnr"]
    assert facts["its image by parts"] == (f"rung simulator, {psnr:.3g} dB, 1.5 s", "")


def test_rungs_that_one_has_not_run(documents):
    lines = {line.name: line.cells for line in rung_lines(documents)}
    assert list(lines)[-1] == "simulator"
    assert lines["simulator"][1] is None
    assert lines["onnxruntime"][1]["failed"] == 1
    assert lines["onnxruntime"][0]["failed"] == 0


def test_kinds_at_their_highest_rung(documents):
    lines = {line.name: line.cells for line in kind_lines(documents)}
    assert (lines["double"][0].rung, lines["double"][1].rung) == ("simulator", "interpreter")
    assert lines["pipeline"][1] is None
    assert 0.05 < lines["double"][0].value < 0.2
    assert lines["clip"][1].passed, "the miss was at a lower rung"
    hoisted = {
        **documents[1],
        "rows": [row | {"kind": f"{row['kind']}_modulated"} for row in documents[1]["rows"]],
        "kinds": {f"{kind}_modulated": entry for kind, entry in documents[1]["kinds"].items()},
    }
    assert {line.name for line in kind_lines([documents[0], hoisted])} == set(lines)


def test_parts_at_other_shapes_do_not_count_for_their_kind(documents):
    rows = [row | {"part": f"{row['part']} at 1024x1024"} for row in documents[0]["rows"] if row["rung"] == "simulator"]
    more = {**documents[1], "rows": [*documents[1]["rows"], *rows]}
    assert kind_lines([documents[0], more]) == kind_lines(documents)


def test_costs(documents):
    lines = {line.name: line.cells for line in cost_lines(documents)}
    assert lines == {
        "binaries of all parts": (("size", 1e6), None),
        "most at once on a device": (("size", 3e9), None),
        "one step": (("text", "6.58 s"), None),
        "verify, this build": (("seconds", 3.0), None),
        "image by parts, this build": (("seconds", 1.5), None),
    }


def test_what_differs_is_told_from_what_does_not(documents):
    equal = {line.name: line.equal for line in provenance_lines(documents)}
    assert equal == {"torch": False, "numpy": True, "prompt": False, "seed": False}


def test_page(documents):
    html = render_comparison(documents)
    for text in ("2 bundles compared", "tiny-dev (bm1684x)", "not run", documents[1]["verdict"]["failure"][:40]):
        assert text in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert "https://" not in html
    embedded = html.partition('id="data">')[2].partition("</script>")[0]
    assert [report["target"] for report in json.loads(embedded)["reports"]] == ["bm1684x", "cpu"]
    with pytest.raises(UsageError, match="1 report: two or more can be compared"):
        render_comparison(documents[:1])


def test_hostile_names_stay_text(documents):
    evil = "</script><script>alert(1)</script>"
    html = render_comparison([{**documents[0], "title": evil}, {**documents[1], "tools": {evil: evil}}])
    assert "<script>alert" not in html
