"""The report and the comparison in a real browser: sorting, filtering, keys, phone, dark mode, and a quiet console."""

from __future__ import annotations

import pytest

from fluxkiln.verify.report.comparison import render_comparison
from fluxkiln.verify.report.document import build_report, compare_pictures, render_html
from tests.browser import CHROMIUM, Browser
from tests.colours import LEGIBLE, brightness

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: run .ci/test-tools as root")

# what does not depend on where the rows are
plain = pytest.mark.parametrize("page", ["plain"], indirect=True)
BODY = "document.getElementById('table').tBodies[0]"


@pytest.fixture(scope="module")
def browser():
    with Browser() as opened:
        yield opened


@pytest.fixture(scope="module")
def report(full_recording, pictures):
    ladder = full_recording.compare()
    ladder.compare("pipeline", None, "image", -1, pictures[0], None, [("simulator", pictures[1])], "W4BF16")
    images = compare_pictures(*pictures, "simulator")
    entries = [
        {"prompt": "a kiln", "seed": seed, "psnr": 30.0 + seed, "ssim": 0.9, "drift": [1e-3, 2e-3]} for seed in (0, 1)
    ]
    runs = {"rung": "simulator", "steps": 2, "entries": entries, "statistics": []}
    return build_report(
        ladder, {"title": "t", "target": "bm1684x", "images": images, "heat": ladder.maps.to_json(), "runs": runs}
    )


@pytest.fixture(params=["plain", "packed"])
def page(request, browser, report, tmp_path, monkeypatch):
    """The report opened: with all rows in the page, or with few of them and the others compressed."""
    if request.param == "packed":
        monkeypatch.setattr("fluxkiln.verify.report.page.MOST_PLAIN_BYTES", 1000)
        monkeypatch.setattr("fluxkiln.verify.report.page.static_rows.__defaults__", (50,))
    path = tmp_path / "report.html"
    path.write_text(render_html(report))
    browser.errors.clear()
    browser.look_like(1200, 900)
    browser.open(path.as_uri())
    yield browser
    assert browser.errors == []


def set_value(browser, name, value):
    element = f"document.getElementById('{name}')"
    browser.evaluate(f"{element}.value = '{value}', {element}.dispatchEvent(new Event('input'))")


def shown(browser):
    return browser.evaluate("document.getElementById('shown').textContent")


def test_filters_see_every_row(page, report):
    wanted = [row for row in report["rows"] if row["part"] == "double.07" and row["rung"] == "interpreter"]
    set_value(page, "find", "double.07")
    set_value(page, "rung", "interpreter")
    page.wait(f"document.getElementById('shown').textContent === '{len(wanted)} of {len(report['rows'])} rows'")
    parts = page.evaluate(f"[...{BODY}.rows].map(row => row.cells[0].textContent)")
    assert parts == ["double.07"] * len(wanted)
    classes = page.evaluate(f"[...{BODY}.rows[0].cells].map(cell => cell.textContent.trim()).length")
    assert classes == 15


def test_sorting_is_by_number(page, report):
    page.evaluate("document.querySelectorAll('#table thead tr:nth-child(2) button')[6].click()")
    page.wait("document.querySelector('#table th[aria-sort=descending]') !== null")
    page.wait(f"{BODY}.rows.length > 50")
    values = page.evaluate(f"[...{BODY}.rows].slice(0, 100).map(row => Number(row.cells[6].textContent))")
    assert values == sorted(values, reverse=True)
    worst = max(row["vs_reference"]["relative_l2"] for row in report["rows"])
    assert values[0] == pytest.approx(worst, rel=1e-2)


def test_panels_can_be_walked_by_keyboard(page):
    page.evaluate("document.querySelector('.panels .heat g[data-part][tabindex=\"0\"]').focus()")
    first = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.press("ArrowRight", 39)
    second = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.press("ArrowDown", 40)
    third = page.evaluate("document.activeElement.dataset.rung")
    assert first != second
    assert third != first.split(" · ")[1].split(":")[0]
    part = page.evaluate("document.activeElement.dataset.part")
    page.press("Enter", 13, "\r")
    page.wait(f"document.getElementById('find').value === '{part}'")
    page.wait(f"{BODY}.rows.length < 20")
    assert page.evaluate("document.activeElement.id") == "find"


@plain
def test_the_swipe_moves_by_keyboard(page):
    page.evaluate("document.querySelector('.swipe input').focus()")
    before = page.evaluate("getComputedStyle(document.querySelector('.pair')).getPropertyValue('--x')")
    page.press("ArrowRight", 39)
    after = page.evaluate("getComputedStyle(document.querySelector('.pair')).getPropertyValue('--x')")
    assert (before.strip(), after.strip()) == ("50%", "51%")


@plain
@pytest.mark.parametrize("dark", [False, True])
def test_no_text_fades_into_its_ground(page, dark):
    page.look_like(1280, 900, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.illegible(LEGIBLE) == []
    # and where a gate was missed
    page.evaluate("document.querySelectorAll('.bar').forEach(bar => bar.classList.add('over'))")
    page.evaluate("document.querySelector('.verdict').className = 'verdict fail'")
    assert page.illegible(LEGIBLE) == []
    # negative control
    page.evaluate("document.querySelector('h1').style.color = 'var(--line)'")
    assert [text for _, text in page.illegible(LEGIBLE)] == ["t"]


@plain
def test_the_focus_is_seen_at_every_stop(page):
    stops = page.walk(45)
    assert [name for name, seen in stops if not seen] == []
    assert any(name.startswith("g#") for name, _ in stops), "the cells of a panel"
    assert any("#find" in name for name, _ in stops)
    page.evaluate("document.head.append(Object.assign(document.createElement('style'), "
                  "{textContent: ':focus-visible { outline: none !important }'}))")  # fmt: skip
    page.evaluate("document.getElementById('find').focus()")
    assert not page.walk(1)[0][1], "negative control"


@plain
@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_scrolls_down_only(page, dark):
    page.look_like(390, 844, phone=True, dark=dark)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    for place in range(0, page.evaluate("document.documentElement.scrollHeight"), 5000):
        page.evaluate(f"window.scrollTo(9, {place})")
        assert page.evaluate("[document.documentElement.scrollWidth <= 390, window.scrollX]") == [True, 0]
    # what is wider scrolls by itself, and can be reached by keyboard
    wide = "[...document.querySelectorAll('.scroll')].filter(one => one.scrollWidth > one.clientWidth + 1)"
    assert page.evaluate(f"{wide}.length") > 3
    assert page.evaluate(f"{wide}.every(one => one.tabIndex === 0 && one.getAttribute('role') === 'region')")
    assert page.illegible(LEGIBLE) == []


@plain
def test_dark_mode_is_dark(page):
    page.look_like(390, 844, phone=True)
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.look_like(390, 844, dark=True, phone=True)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert brightness(light) > 0.8
    assert brightness(dark) < 0.02


@plain
def test_maps_are_drawn(page):
    assert page.evaluate("document.querySelectorAll('.map').length") > 10
    size = page.evaluate(
        "(()=>{const b=document.querySelector('.map').getBoundingClientRect();return [b.width,b.height]})()"
    )
    assert min(size) > 20
    mask = page.evaluate("getComputedStyle(document.querySelector('.map'), '::before').maskImage")
    assert mask.startswith("url(")


def test_comparison_is_quiet_and_fits_a_phone(browser, report, tmp_path):
    path = tmp_path / "comparison.html"
    path.write_text(render_comparison([report, {**report, "title": "other"}, {**report, "title": "third"}]))
    browser.errors.clear()
    browser.look_like(390, 844, phone=True)
    browser.open(path.as_uri())
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    assert browser.evaluate("document.querySelectorAll('#kinds tbody tr').length") > 5
    for dark in (False, True):
        browser.look_like(1280, 900, dark=dark)
        assert browser.illegible(LEGIBLE) == []
    assert browser.errors == []
