import base64
import gzip
import io
import json
import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fluxkiln.errors import UsageError
from fluxkiln.patches.flux1.kinds import KINDS
from fluxkiln.verify.gates import Rung
from fluxkiln.verify.ladder import Ladder
from fluxkiln.verify.report.document import (
    FEW_ROWS,
    MAX_HTML_BYTES,
    MAX_IMAGE_BYTES,
    build_report,
    compare_pictures,
    render_html,
    write_report,
)
from fluxkiln.verify.report.page import MOST_STATIC_ROWS
from tests.colours import LEGIBLE, contrast, variables

TEMPLATES = Path(__file__).parents[3] / "fluxkiln/verify/report/templates"
VOID = {"meta", "img", "input", "br", "link"}


class Structure(HTMLParser):
    """Checks that tags nest, and collects text, links and attributes."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.text, self.scripts = [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open and self.open[-1] == "script" else self.text).append(data)


def facts(**more):
    return {
        "title": "tiny-dev on BM1684X",
        "target": "bm1684x",
        "reference": "diffusers 0.42.1, float32, seed 0, 2 steps",
        "model": {"name": "tiny-dev", "fingerprint": "sha256:00", "variant": "dev"},
        "shapes": {"width": 64, "height": 64, "tokens": 16, "steps": 2},
        "schemes": {"double": "W4BF16"},
        "parts": [
            {"name": "double.00", "kind": "double", "scheme": "W4BF16", "bytes": 1000, "device_memory": 2000, "made": m}
            for m in ("cast", "proof compiled: identical")
        ],
        "timings": [{"name": "export", "seconds": 1.25}],
        "memory": {"transformer": {"weights": 1e6, "runtime": 2e5}},
        "estimate": {"label": "the compiler's own", "entries": {"one step": "6.58 s"}},
        "tools": {"torch": "2.13.0"},
        "machine": {"cpu": "2 cores"},
        "provenance": {"seed": 0},
    } | more


@pytest.fixture
def good(recording, pictures):
    ladder = recording.compare()
    ladder.compare("pipeline", None, "image", -1, pictures[0], None, [("simulator", pictures[1])], "W4BF16")
    return build_report(ladder, facts(images=compare_pictures(*pictures, "simulator")))


@pytest.fixture
def bad(recording):
    recording.outputs["double.01", "hidden_states_out", 0]["simulator"][0, 0] = np.inf
    recording.outputs["clip", "last_hidden_state", 1]["onnxruntime"] *= 1.5
    return build_report(recording.compare(), facts())


def test_verdict_in_words(good, bad):
    count = good["summary"]["rows"]
    assert good["verdict"] == {
        "passed": True, "headline": f"All {count} comparisons stayed within their gates.", "failure": "",
    }  # fmt: skip
    assert bad["verdict"]["headline"] == f"2 of {count - 1} comparisons missed a gate, in 2 of 13 parts."
    assert bad["verdict"]["failure"].startswith("first bad rung: onnxruntime, worst in clip")
    assert (good["summary"]["parts"], good["summary"]["pipeline"]) == (13, True)
    assert (bad["summary"]["parts"], bad["summary"]["pipeline"]) == (13, False)
    assert bad["summary"]["first_bad"] == {"clip": "onnxruntime", "double.01": "simulator"}
    assert build_report(Ladder(), facts())["verdict"] == {
        "passed": False,
        "headline": "Nothing was compared.",
        "failure": "no row was compared, so nothing is proven: at least one part has to be run",
    }


def test_summary_names_the_worst_row_of_each_rung(bad):
    rungs = {rung["rung"]: rung for rung in bad["summary"]["rungs"]}
    assert list(rungs) == ["patched", "onnxruntime", "dequantized", "interpreter", "simulator"]
    assert rungs["onnxruntime"]["worst"]["part"] == "clip"
    assert rungs["onnxruntime"]["worst"]["value"] == pytest.approx(0.5, rel=1e-3)
    assert (rungs["simulator"]["worst"]["part"], rungs["simulator"]["failed"]) == ("double.01", 1)
    assert rungs["patched"]["failed"] == 0


def test_gates_count_what_they_judged(bad):
    onnxruntime = next(gate for gate in bad["gates"] if gate["rung"] == "onnxruntime")
    rows = [row for row in bad["rows"] if row["rung"] == "onnxruntime"]
    assert (onnxruntime["judged"], onnxruntime["failed"]) == (len(rows), 1)
    for row in bad["rows"]:
        for verdict in row["verdicts"]:
            assert bad["gates"][verdict["gate"]]["metric"] == verdict["metric"]


def test_files_are_deterministic_and_strict_json(tmp_path, bad):
    first = [path.read_bytes() for path in write_report(tmp_path / "a", bad)]
    shuffled = dict(reversed(list(bad.items())))
    assert [path.read_bytes() for path in write_report(tmp_path / "b", shuffled)] == first

    def refuse(constant):
        raise AssertionError(constant)

    document = json.loads(first[0], parse_constant=refuse)
    assert document["schema"] == "fluxkiln.report/2"
    assert list(document) == sorted(document)
    spoilt = next(
        row for row in document["rows"] if (row["part"], row["rung"], row["step"]) == ("double.01", "simulator", 0)
    )
    assert spoilt["vs_reference"]["relative_l2"] == "NaN"
    assert spoilt["vs_reference"]["finite"] is False
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["report.html", "report.json"]


def test_floats_keep_six_digits(tmp_path, good):
    text = write_report(tmp_path, good | {"memory": {"x": {"y": 1.23456789e-7}}})[0].read_text()
    assert "1.23457e-07" in text
    numbers = re.findall(r"[:,]-?(\d+\.\d+)", text)
    assert len(numbers) > 1000
    assert max(len(number.removesuffix(".0").replace(".", "").lstrip("0")) for number in numbers) <= 6


def test_numpy_values_and_paths_are_taken(tmp_path, good):
    more = {"provenance": {"path": tmp_path, "count": np.int64(3), "share": np.float32(0.5)}}
    document = json.loads(write_report(tmp_path, good | more)[0].read_text())
    assert document["provenance"] == {"path": str(tmp_path), "count": 3, "share": 0.5}


@pytest.mark.parametrize("which", ["good", "bad"])
def test_html_can_be_made_again_from_the_json(tmp_path, request, which):
    json_path, html_path = write_report(tmp_path, request.getfixturevalue(which))
    assert render_html(json.loads(json_path.read_text())) == html_path.read_text()


@pytest.mark.parametrize("which", ["good", "bad"])
def test_html_is_sound_and_needs_no_network(request, which):
    html = render_html(request.getfixturevalue(which))
    page = Structure(html)
    for tag, name, value in page.attributes:
        if name in ("src", "href", "action", "srcset", "poster"):
            assert value.startswith(("data:", "#")), (tag, name, value[:60])
    assert not re.search(r"url\(|@import|https?://", html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    targets = {value[1:] for _, name, value in page.attributes if name == "href"}
    assert targets <= set(ids)
    assert {value for _, name, value in page.attributes if name == "for"} <= set(ids)


def test_all_rows_stand_in_the_html_without_script(bad):
    html = render_html(bad)
    assert html.count("<tr data-kind=") == len(bad["rows"])
    assert html.count("class=missed") == 2
    text = " ".join(Structure(html).text)
    assert bad["verdict"]["headline"] in text
    assert "NaN or infinity on one side" in text
    for gate in bad["gates"]:
        assert gate["reason"] in text


def test_readers_that_do_not_see_are_told(good):
    entry = {"prompt": "a kiln", "seed": 0, "psnr": 30.0, "ssim": 0.9, "drift": [1e-3]}
    entry |= {"reference": "data:", "actual": "data:"}
    runs = {"rung": "simulator", "steps": 1, "statistics": [], "entries": [entry]}
    html = render_html(good | {"runs": runs})
    levels = [int(level) for level in re.findall(r"<h(\d)", html)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    for tag in re.findall(r"<img [^>]*>", html):
        assert re.search(r' alt="[^"]+"', tag), tag
    for tag in re.findall(r'<[^>]* role="(?:img|region|group)"[^>]*>', html):
        assert "aria-label" in tag, tag
    for head in re.findall(r"<thead>.*?</thead>", html, re.DOTALL):
        names = re.findall(r"<th[ >][^<]*", head)
        assert names
        assert all('scope="col' in name for name in names), names


def test_colours_can_be_read():
    css = (TEMPLATES / "report.css.j2").read_text()
    for scheme, colours in variables(css).items():
        for text in ("ink", "muted", "accent", "good", "bad", "s1", "s2", "s3", "s4", "s5"):
            for ground in ("bg", "panel", "good-bg", "bad-bg")[: 2 if text[0] == "s" else 4]:
                assert contrast(colours[text], colours[ground]) >= LEGIBLE, (scheme, text, ground)
        # numbers on the shades, with the switch from dark to light that the sheet has
        for shade in range(9):
            text = colours["n-low"] if shade < 5 else "#000" if shade < 6 else colours["n-high"]
            assert contrast(text, colours[f"q{shade}"]) >= LEGIBLE, (scheme, shade)
        assert contrast(colours["miss"], colours["bg"]) >= 3, "what is drawn"
    assert contrast("#767676", "#fff") == pytest.approx(4.54, abs=0.01)
    assert contrast("rgb(0, 0, 0)", "#ffffff") == pytest.approx(21)


def test_gates_that_judged_nothing_stand_behind_the_others(good):
    html = render_html(good)
    section = unescape(html.partition('id="gates"')[2].partition("</section>")[0])
    seen, folded = section.split("<details>")
    for gate in good["gates"]:
        assert gate["reason"] in (seen if gate["judged"] else folded)
    assert f"{sum(not gate['judged'] for gate in good['gates'])} more gates" in folded


def test_memory_of_a_device_is_shown_where_there_is_one(recording):
    compared = recording.compare()
    assert render_html(build_report(compared, facts())).count("Device memory</th>") == 2
    none = [part | {"device_memory": 0} for part in facts()["parts"]]
    assert "Device memory</th>" not in render_html(build_report(compared, facts(parts=none)))


def test_no_difference_is_said(good, pictures):
    assert "none, all pixels are equal" not in render_html(good)
    same = compare_pictures(pictures[0], pictures[0], "simulator")
    assert (same["largest"], good["images"]["largest"] > 0) == (0, True)
    assert "none, all pixels are equal" in render_html(good | {"images": same})
    old = {key: value for key, value in same.items() if key != "largest"}
    assert "not amplified" in render_html(good | {"images": old})


def test_hostile_text_stays_text(recording):
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> & \u2028"
    report = build_report(recording.compare(), facts(title=evil, provenance={evil: evil}))
    html = render_html(report)
    page = Structure(html)
    assert "alert(1)" not in [script.strip() for script in page.scripts]
    assert ("img", "src", "x") not in page.attributes
    data = next(script for script in page.scripts if script.startswith("{"))
    assert not set("<>&\u2028") & set(data)
    assert json.loads(data)["title"] == evil


def test_full_size_report_stays_small(full_recording, pictures):
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    images = compare_pictures(noise, 255 - noise, "simulator")
    report = build_report(full_recording.compare(), facts(images=images))
    html = render_html(report)
    assert len(report["rows"]) > 1000
    assert len(html.encode()) < MAX_HTML_BYTES


def test_ten_steps_of_every_block_stay_small_and_whole(full_recording, pictures):
    noise = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    compared = full_recording.compare()
    rows = compared.rows = [replace(row, step=row.step + 2 * n) for n in range(5) for row in compared.rows]
    heat = compared.maps.to_json()
    report = build_report(compared, facts(images=compare_pictures(noise, 255 - noise, "simulator"), heat=heat))
    html = render_html(report)
    assert len(rows) > 4000
    assert len(html.encode()) < MAX_HTML_BYTES
    assert html.count("<tr data-kind=") == FEW_ROWS, "three pictures of noise leave no room for more"
    packed = html.partition('type="application/gzip" id="data">')[2].partition("<")[0]
    assert len(json.loads(gzip.decompress(base64.b64decode(packed)))["rows"]) == len(rows)
    assert f"{FEW_ROWS} of {len(rows)} rows stand here" in html
    without = render_html({key: value for key, value in report.items() if key != "images"})
    assert without.count("<tr data-kind=") == MOST_STATIC_ROWS
    assert len(without.encode()) < MAX_HTML_BYTES


def test_a_report_too_large_for_the_page_drops_only_the_embedded_copy(good, monkeypatch):
    monkeypatch.setattr("fluxkiln.verify.report.document.MAX_HTML_BYTES", 1000)
    html = render_html(good)
    assert 'id="data"' not in html
    assert 'id="save"' not in html
    assert html.count("<tr data-kind=") == len(good["rows"])


def test_facts_are_optional_but_known(recording):
    compared = recording.compare()
    Structure(render_html(build_report(compared, {"title": "t", "target": "cpu"})))
    Structure(render_html(build_report(Ladder(), {"title": "t", "target": "cpu"})))
    with pytest.raises(UsageError, match="no place for timing"):
        build_report(compared, facts(timing=[]))
    with pytest.raises(UsageError, match="title is missing"):
        build_report(compared, {"target": "cpu"})


def test_a_rung_without_a_gate_is_shown_as_unjudged():
    array = np.ones((2, 2), np.float32)
    ladder = Ladder([Rung("guessed", 4, "a rung whose toolchain", "gave it no gate")])
    ladder.compare("tail", KINDS["tail"], "sample", 0, array, None, [("guessed", array)])
    assert "judged by no gate" in render_html(build_report(ladder, facts()))


def picture(uri):
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))))


def test_pictures(pictures):
    reference, actual = pictures
    images = compare_pictures(reference, actual, "simulator")
    assert (images["width"], images["height"], images["rung"]) == (96, 96, "simulator")
    assert np.array_equal(picture(images["reference"]), reference)
    difference = np.abs(reference.astype(int) - actual.astype(int)) * images["gain"]
    assert np.array_equal(picture(images["difference"]), np.minimum(difference, 255))
    assert images["gain"] in (8, 16)
    assert compare_pictures(reference, reference, "simulator")["gain"] == 1
    assert np.array_equal(picture(compare_pictures(reference / 255, actual / 255, "simulator")["actual"]), actual)


def test_one_wrong_pixel_is_still_visible(pictures):
    spoilt = pictures[0].copy()
    spoilt[5, 5] = 255 - spoilt[5, 5]
    assert picture(compare_pictures(pictures[0], spoilt, "simulator")["difference"])[5, 5].max() > 100


def test_large_pictures_are_compressed():
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    images = compare_pictures(noise, noise, "simulator")
    assert images["reference"].startswith("data:image/webp;base64,")
    assert len(base64.b64decode(images["reference"].partition(",")[2])) <= MAX_IMAGE_BYTES


def test_wrong_picture_shape(pictures):
    with pytest.raises(UsageError, match=r"\(3, 96, 96\)"):
        compare_pictures(pictures[0].transpose(2, 0, 1), pictures[1], "simulator")
