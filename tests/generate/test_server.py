"""The local page: its queue and its server, asked over real sockets, and used in a headless Chromium."""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from fluxkiln.artifacts.registry.place import is_loopback
from fluxkiln.cli.generate import listen
from fluxkiln.errors import CompileError, ResourceError, UsageError
from fluxkiln.generate.painter import Painter, Request
from fluxkiln.generate.server import Preview, Studio, find_reference, is_reference, parse_request
from fluxkiln.verify.reference import read_recording
from tests.browser import CHROMIUM, Browser
from tests.colours import LEGIBLE, brightness, contrast, variables
from tests.eager import SHAPES, make_bundle, open_eager

TEMPLATES = Path(__file__).parents[2] / "fluxkiln/generate/templates"
uvicorn = pytest.importorskip("uvicorn", reason="the extra serve is not installed")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed: run .ci/test-tools as root")


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tiny_recording, tmp_path_factory):
    """A bundle with the reference's recording beside it, as a build leaves it."""
    folder = make_bundle(tiny_checkpoint(), tmp_path_factory.mktemp("build"))
    recording = tiny_recording("tiny-dev", "kl", SHAPES)
    (folder.parent / "recording").symlink_to(recording.root)
    return folder


@pytest.fixture
def studio(folder, tiny_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle, executor = open_eager(tiny_checkpoint(), folder)
    with Studio(
        bundle, lambda shapes: Painter(bundle.at(shapes), executor), find_reference(bundle), most_waiting=2
    ) as studio:
        yield studio


@contextmanager
def served(studio: Studio) -> Iterator[int]:
    """The page on a free port."""
    from fluxkiln.generate.page import make_app

    listening = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(make_app(studio), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


def ask(port, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    given = {"Content-Type": "application/json"} if body is not None else {}
    connection.request(
        method, path, body if isinstance(body, bytes | None) else json.dumps(body), {**given, **(headers or {})}
    )
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, answer.headers, data


def finish(job, patience=60):
    until = time.monotonic() + patience
    while not job.ended:
        assert time.monotonic() < until, job.events[-1:]
        time.sleep(0.02)
    return job.events[-1]


@pytest.fixture
def held(studio, monkeypatch):
    """Lets the denoising of the first job wait until it is told to go on."""
    go, running = threading.Event(), threading.Event()
    runner = studio.painter.executor.runner

    def wait(part, inputs):
        if part == "tail":
            running.set()
            assert go.wait(60)
        return runner(part, inputs)

    monkeypatch.setattr(studio.painter.executor, "runner", wait)
    yield go, running
    go.set()


def test_one_at_a_time_and_the_others_wait(studio, held):
    go, running = held
    first = studio.submit(Request("one", steps=2))
    assert running.wait(60)
    second, third = studio.submit(Request("two", steps=1)), studio.submit(Request("three", steps=1))
    assert [second.events[-1], third.events[-1]] == [{"state": "waiting", "ahead": 1}, {"state": "waiting", "ahead": 2}]
    with pytest.raises(ResourceError, match="2 images are waiting already"):
        studio.submit(Request("four", steps=1))
    studio.cancel(second)
    assert second.events[-1] == {"state": "cancelled"}
    assert third.events[-1] == {"state": "waiting", "ahead": 1}
    go.set()
    assert finish(first)["state"] == "done"
    assert finish(third)["state"] == "done"
    assert [event["state"] for event in first.events] == ["waiting", "encoding", "denoising", "denoising", "done"]
    assert [event["step"] for event in first.events if "step" in event] == [1, 2]
    assert first.png.startswith(b"\x89PNG")
    assert second.png == b""


def test_a_running_job_stops_after_its_step(studio, held):
    go, running = held
    job = studio.submit(Request("one", steps=40))
    assert running.wait(60)
    studio.cancel(job)
    go.set()
    assert finish(job) == {"state": "cancelled"}
    assert len([event for event in job.events if "step" in event]) <= 1
    assert finish(studio.submit(Request("two", steps=1)))["state"] == "done"


def test_what_fails_is_a_sentence_and_the_next_one_runs(studio, monkeypatch):
    runner = studio.painter.executor.runner
    errors = iter([CompileError("the board is gone; plug it in"), KeyError("x")])

    def fail(part, inputs):
        error = next(errors, None)
        if error is not None:
            raise error
        return runner(part, inputs)

    monkeypatch.setattr(studio.painter.executor, "runner", fail)
    assert finish(studio.submit(Request("one", steps=1))) == {
        "state": "failed",
        "error": "the board is gone; plug it in",
    }
    assert "a bug in fluxkiln: KeyError" in finish(studio.submit(Request("one", steps=1)))["error"]
    assert finish(studio.submit(Request("one", steps=1)))["state"] == "done"


def test_the_references_settings_are_compared_with_it(studio, folder):
    reference = read_recording(folder.parent / "recording")
    request = Request(reference.prompt, reference.seed, steps=reference.steps, guidance=reference.guidance_scale)
    assert is_reference(studio.bundle, request, reference)
    found = finish(studio.submit(request))["comparison"]
    assert found["identical"] or found["psnr"] > 55
    assert found["ssim"] > 0.999
    assert found["gain"] >= 1
    other = Request(reference.prompt, reference.seed + 1, steps=reference.steps)
    assert finish(studio.submit(other))["comparison"] is None


def test_a_reference_of_another_size_is_none(studio, tmp_path, tiny_recording, monkeypatch):
    from dataclasses import replace

    assert find_reference(studio.bundle) is not None
    assert find_reference(replace(studio.bundle, folder=tmp_path / "bundle")) is None
    (tmp_path / "recording").mkdir()
    (tmp_path / "recording/recording.json").write_text("{")
    assert find_reference(replace(studio.bundle, folder=tmp_path / "bundle")) is None


def test_previews_show_the_latents():
    rng = np.random.default_rng(0)
    show = Preview(SHAPES)
    latents = rng.standard_normal((1, 16, 64)).astype(np.float32)
    first = show(latents)
    assert first.startswith(b"\x89PNG")
    assert show(latents) == first
    assert show(latents[:, ::-1]) != first
    assert show(np.zeros_like(latents)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ([], "no JSON object"),
        ({}, "no prompt"),
        ({"prompt": "  "}, "prompt: it must be a text of 1 to"),
        ({"prompt": 5}, "prompt: it must be a text"),
        ({"prompt": "x" * 4001}, "prompt: it must be a text of 1 to 4000"),
        ({"prompt": "x", "seed": True}, "seed: it must be a whole number"),
        ({"prompt": "x", "seed": None}, "seed: it must be a whole number"),
        ({"prompt": "x", "steps": 2.5}, "steps: it must be a whole number"),
        ({"prompt": "x", "steps": 10**9}, "steps: it must be a whole number up to 1000"),
        ({"prompt": "x", "guidance": "high"}, "guidance: it must be a number"),
        ({"prompt": "x", "guidance": 10**400}, "guidance: it must be a number up to 100"),
        ({"prompt": "x", "guidance": float("nan")}, "guidance: it must be a number up to 100"),
        ({"prompt": "x", "seed": -1}, "seed -1: it must be from 0 to"),
        ({"prompt": "x", "seed": 10**60}, "it must be from 0 to"),
        ({"prompt": "x", "scheduler": "euler"}, "unknown key 'scheduler'"),
    ],
)
def test_requests_that_are_wrong(studio, document, words):
    with pytest.raises(UsageError, match=words):
        studio.submit(parse_request(studio.bundle, document))


def test_a_request_that_is_right(studio):
    made = parse_request(studio.bundle, {"prompt": " x ", "prompt_2": " ", "seed": 3, "steps": None, "guidance": 2})
    assert made == Request("x", 3, None, None, 2.0)


def test_loopback():
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "example.org")] == [
        True, True, True, False, False,
    ]  # fmt: skip


def test_the_server(studio):
    with served(studio) as port:
        status, headers, page = ask(port, "GET", "/")
        assert status == 200
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert b"http://" not in page
        assert b"https://" not in page
        status, _, answer = ask(port, "POST", "/api/jobs", {"prompt": "a kiln", "steps": 2})
        assert status == 202
        job = json.loads(answer)["id"]
        status, headers, stream = ask(port, "GET", f"/api/jobs/{job}/events")
        assert headers["Content-Type"].startswith("text/event-stream")
        events = [json.loads(line[6:]) for line in stream.decode().splitlines() if line.startswith("data: ")]
        assert [event["state"] for event in events] == ["waiting", "encoding", "denoising", "denoising", "done"]
        # from where a connection broke
        _, _, rest = ask(port, "GET", f"/api/jobs/{job}/events", headers={"Last-Event-ID": "3"})
        assert rest.decode().startswith("id: 4\n")
        status, headers, image = ask(port, "GET", f"/api/jobs/{job}/image.png")
        assert (status, headers["Content-Type"], image[:4]) == (200, "image/png", b"\x89PNG")
        assert ask(port, "GET", "/api/reference.png")[0] == 200


def test_the_page_says_what_it_is_about(studio):
    """Whose weights, which size, what runs them."""
    with served(studio) as port:
        page = ask(port, "GET", "/")[2].decode()
        facts, shapes = studio.painter.executor.facts, studio.bundle.manifest.shapes
        said = page[page.index('<p class="facts">') : page.index("bundle <code")]
        assert "weights: random (synthetic): no kiln<br>" in said
        assert f"{shapes.width} × {shapes.height} pixels" in said
        assert f"{facts['runtime']}, {facts['device']}" in said
        assert json.loads(ask(port, "GET", "/api/bundle")[2])["weights"] == "random (synthetic): no kiln"


def test_what_the_server_refuses(studio):
    with served(studio) as port:

        def refused(*arguments, **more):
            status, _, data = ask(port, *arguments, **more)
            assert b"Traceback" not in data
            return status, json.loads(data)["error"]["message"] if data.startswith(b"{") else data.decode()

        for body in HOSTILE_BODIES:
            status, message = refused("POST", "/api/jobs", body)
            assert (status, message.endswith('; send {"prompt": ...}')) == (400, True), body[:40]
        assert refused("POST", "/api/jobs", {"prompt": ""})[0] == 400
        status, message = refused("POST", "/api/jobs", {"prompt": "x", "steps": 65})
        assert (status, "65 steps" in message) == (400, True)
        assert refused("POST", "/api/jobs", {"prompt": "x" * 70_000})[0] == 413
        # a form of another site, and a name led to this machine
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert refused("POST", "/api/jobs", b'{"prompt": "x"}', headers=form)[0] == 415
        assert refused("GET", "/", headers={"Host": "evil.example"})[0] == 400
        assert refused("GET", "/api/jobs/99/image.png")[0] == 404
        assert refused("DELETE", "/api/jobs/99")[0] == 404
        assert refused("GET", "/api/jobs/99/events")[0] == 404
        assert refused("GET", "/../../etc/passwd")[0] == 404


HOSTILE_BODIES = (
    b"", b"{", b"[]", b"null", b"\xff", b"[" * 60_000, b'{"prompt":' * 6000, b'{"prompt": "a", "prompt": "b"}',
    b'{"prompt": "x", "guidance": NaN}', b'{"prompt": "x", "guidance": 1e400}',
    b'{"prompt": "x", "guidance": ' + b"9" * 400 + b"}", b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}",
    b'{"prompt": "\\ud800"}',
)  # fmt: skip


@pytest.mark.parametrize("last", ["x", "-1", "1" * 5000, "\u00b2", "", "0x1", "1.5"])
def test_a_last_event_that_is_no_number_is_none(studio, last):
    """A superscript two is a digit to Python and no number."""
    with served(studio) as port:
        job = json.loads(ask(port, "POST", "/api/jobs", {"prompt": "a kiln", "steps": 1})[2])["id"]
        headers = {"Last-Event-ID": last.encode("latin-1")}
        status, _, stream = ask(port, "GET", f"/api/jobs/{job}/events", headers=headers)
        assert (status, stream.decode().startswith("id: 0\n")) == (200, True)


def test_an_image_is_for_who_asked_for_it(studio):
    """Its id is all that is asked for, and tells nothing of another's."""
    with served(studio) as port:
        ids = [json.loads(ask(port, "POST", "/api/jobs", {"prompt": "x", "steps": 1})[2])["id"] for _ in range(2)]
        for job in ids:
            assert finish(studio.find(job))["state"] == "done"
            assert len(job) >= 32
            assert len(set(job)) > 10
        first, second = ids
        guesses = [
            "1",
            "2",
            "0",
            first[:-1],
            first[:-1] + chr(ord(first[-1]) ^ 1),
            first.swapcase(),
            "*",
            first + second,
        ]
        for guess in guesses:
            for method, path in (("GET", "/image.png"), ("GET", "/events"), ("DELETE", "")):
                assert ask(port, method, f"/api/jobs/{guess}{path}")[0] == 404, guess
        assert ask(port, "GET", f"/api/jobs/{first}/image.png")[0] == 200


@needs_browser
def test_in_a_browser(studio, tmp_path):
    with served(studio) as port, Browser() as browser:
        browser.look_like(1280, 900)
        browser.open(f"http://127.0.0.1:{port}/")
        assert browser.evaluate("document.querySelector('h1').textContent") == studio.bundle.manifest.name
        # by keyboard alone: the first stops are the skip link and the prompt
        browser.press("Tab", 9)
        assert browser.evaluate("document.activeElement.className") == "skip"
        browser.press("Tab", 9)
        assert browser.evaluate("document.activeElement.id") == "prompt"
        # nothing typed: said at the prompt, nothing sent
        browser.press("Enter", 13, "\r", modifiers=2)
        assert browser.evaluate("document.getElementById('error').textContent") == "Type a prompt first."
        assert browser.evaluate("document.getElementById('prompt').getAttribute('aria-invalid')") == "true"
        browser.type("a kiln " * 60)
        browser.evaluate("document.getElementById('steps').value = 3")
        browser.press("Enter", 13, "\r", modifiers=2)
        browser.wait("document.getElementById('status').textContent.startsWith('Done in')")
        assert browser.evaluate("document.getElementById('error').hidden")
        assert "were cut" in browser.evaluate("document.getElementById('notes').textContent")
        browser.wait("document.getElementById('now').naturalWidth === 64")
        assert browser.evaluate("document.getElementById('compare').hidden")
        assert browser.evaluate("document.getElementById('download').download").endswith("-seed0.png")
        # the reference's settings are compared with it
        browser.evaluate("document.getElementById('reference').click()")
        browser.evaluate("document.getElementById('form').requestSubmit()")
        browser.wait("!document.getElementById('compare').hidden")
        found = browser.evaluate("document.getElementById('metrics').textContent")
        assert found == "every pixel is the same" or re.fullmatch(r"PSNR \d+\.\d dB, SSIM [01]\.\d{4}", found)
        browser.evaluate(
            "const s = document.getElementById('swipe'); s.value = 20; s.dispatchEvent(new Event('input'))"
        )
        assert "80%" in browser.evaluate("document.getElementById('under').style.clipPath")
        browser.evaluate("document.getElementById('difference').click()")
        assert browser.evaluate("document.getElementById('stage').classList.contains('difference')")
        gain = browser.evaluate("getComputedStyle(document.getElementById('stage')).getPropertyValue('--gain')")
        assert browser.evaluate("getComputedStyle(document.getElementById('stage')).filter") == f"brightness({gain})"
        assert browser.evaluate("document.querySelectorAll('#history li').length") == 2
        # every control shows that it has the focus, and every text stands out
        stops = browser.walk(18)
        assert [name for name, seen in stops if not seen and not name.startswith("body")] == []
        assert {"input#difference.", "a#download.button", "button#paint.primary"} <= {name for name, _ in stops}
        for width, dark in ((1280, True), (390, True), (390, False), (1280, False)):
            browser.look_like(width, 900, dark=dark, phone=width == 390)
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.illegible(LEGIBLE) == []
        browser.screenshot(tmp_path / "page.png")
        assert browser.errors == []
        # the bundle's own refusal reaches the page
        browser.evaluate("document.getElementById('steps').value = 65")
        browser.evaluate("document.getElementById('form').requestSubmit()")
        browser.wait("!document.getElementById('error').hidden")
        assert "65 steps" in browser.evaluate("document.getElementById('error').textContent")
        assert [error for error in browser.errors if "400" not in error] == []


def test_colours_can_be_read():
    for scheme, colours in variables((TEMPLATES / "serve.css.j2").read_text()).items():
        pairs = [(text, ground) for text in ("ink", "muted", "bad") for ground in ("bg", "panel")]
        for text, ground in [*pairs, ("muted", "well"), ("bad", "bad-bg"), ("on-accent", "accent")]:
            assert contrast(colours[text], colours[ground]) >= LEGIBLE, (scheme, text, ground)
        assert contrast(colours["accent"], colours["bg"]) >= 3, "the ring of the focus"


@needs_browser
def test_on_a_phone_in_the_dark(studio):
    with served(studio) as port, Browser() as browser:
        for width in (320, 390):
            browser.look_like(width, 844, dark=True, phone=True)
            browser.open(f"http://127.0.0.1:{port}/")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            lowest = "Math.min(...[...document.querySelectorAll('button:not([hidden])')].map(b => b.offsetHeight))"
            assert browser.evaluate(lowest) >= 44
        ink, ground = (
            browser.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor")
        )
        assert contrast(ink, ground) > 7
        assert brightness(ground) < 0.1
        browser.look_like(390, 844, phone=True)
        assert brightness(browser.evaluate("getComputedStyle(document.body).backgroundColor")) > 0.8
        assert browser.errors == []
