"""A process that answers requests, here a small one of Python."""

from __future__ import annotations

import os
import sys

import pytest

from fluxkiln.compile.process import Worker

ECHO = """
import json, os, sys
print("awake", file=sys.stderr, flush=True)
for line in sys.stdin:
    request = json.loads(line)
    if request.get("die"):
        os._exit(request["die"])
    print(json.dumps({"here": os.getcwd(), "back": request}), flush=True)
"""


@pytest.fixture
def worker(tmp_path):
    with Worker([sys.executable, "-c", ECHO], os.environ, "echo", tmp_path / "logs" / "echo.log") as worker:
        yield worker


def test_requests_are_answered_in_turn(worker):
    for number in range(3):
        answer = worker.request({"number": number, "text": "a\nb"})
        assert answer == {"here": str(worker.folder), "back": {"number": number, "text": "a\nb"}}
    assert worker.log.read_text() == "awake\n"


def test_a_process_that_ends_says_how(worker):
    assert worker.request({"die": 7}) == 7
    # and again, when there is nobody to read the request
    assert worker.request({"number": 1}) == 7


def test_nothing_is_left_behind(tmp_path):
    with Worker([sys.executable, "-c", ECHO], os.environ, "echo") as worker:
        assert worker.log.parent == worker.folder
        assert worker.folder.is_dir()
        process = worker._process
    assert process.poll() is not None
    assert not worker.folder.exists()


def test_closing_takes_a_request_that_was_never_read(worker):
    worker._process.kill()
    worker._process.wait()
    assert worker._process.stdin is not None
    worker._process.stdin.write(b"x" * 10)
    worker.close()
