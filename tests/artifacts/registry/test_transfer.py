from __future__ import annotations

import functools
import hashlib
import io
import os
import threading
import time

import pytest

from fluxkiln.artifacts.modelpack import Layer
from fluxkiln.artifacts.registry.transfer import (
    SHOWN_BYTES,
    Arrival,
    Departure,
    Meter,
    Patience,
    Stop,
    StoppedError,
    TransientError,
    each,
    retrying,
)
from fluxkiln.errors import RegistryError

QUICK = Patience(4, first_wait=0.0, longest_wait=0.0)


def sha(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def test_waits_grow_and_end_at_the_longest():
    patience = Patience(first_wait=1.0, longest_wait=8.0)
    for failures, longest in ((1, 1.0), (2, 2.0), (3, 4.0), (4, 8.0), (9, 8.0)):
        for _ in range(20):
            assert longest / 2 <= patience.wait(failures) <= longest


def test_attempts_count_without_progress_in_between():
    calls = []

    def flaky() -> str:
        calls.append(1)
        if len(calls) < 40:
            raise TransientError("cut")
        return "done"

    assert retrying(QUICK, Stop(), "x", flaky, lambda: len(calls) // 3) == "done"
    assert len(calls) == 40
    calls.clear()

    def dead() -> None:
        calls.append(1)
        raise TransientError("no route")

    with pytest.raises(RegistryError, match="x: no route; tried 4 times without progress"):
        retrying(QUICK, Stop(), "x", dead)
    assert len(calls) == 4


def test_other_errors_are_not_repeated():
    calls = []

    def wrong() -> None:
        calls.append(1)
        raise RegistryError("no")

    with pytest.raises(RegistryError, match="no"):
        retrying(QUICK, Stop(), "x", wrong)
    assert len(calls) == 1


def test_a_stop_ends_a_wait():
    stop = Stop()

    def fail() -> None:
        raise TransientError("cut", wait=60.0)

    threading.Timer(0.05, stop.event.set).start()
    started = time.monotonic()
    with pytest.raises(StoppedError):
        retrying(QUICK, stop, "x", fail)
    assert time.monotonic() - started < 30


def test_arrival_hashes_and_refuses_more_than_was_announced():
    arrival = Arrival(io.BytesIO(), 5)
    assert not arrival.complete
    arrival.write(b"abc")
    arrival.write(b"de")
    assert (arrival.complete, arrival.digest) == (True, sha(b"abcde"))
    with pytest.raises(TransientError, match="more than the 5 bytes"):
        arrival.write(b"f")
    assert arrival.received == 0


def test_arrival_goes_on_with_what_is_in_the_file():
    file = io.BytesIO(b"abc")
    arrival = Arrival(file, 5)
    arrival.take_up()
    arrival.write(b"de")
    assert (arrival.digest, file.getvalue()) == (sha(b"abcde"), b"abcde")
    longer = io.BytesIO(b"abcdefgh")
    arrival = Arrival(longer, 5)
    arrival.take_up()
    assert (arrival.received, longer.getvalue()) == (0, b"")


def test_departure_hashes_each_byte_once_whatever_is_sent_again(tmp_path):
    data = os.urandom((2 << 20) + 5)
    (tmp_path / "x").write_bytes(data)
    moved = []
    departure = Departure(tmp_path / "x", len(data), moved.append)
    assert b"".join(departure.pieces(0, 1 << 20)) == data[: 1 << 20]
    assert departure.digest is None
    assert b"".join(departure.pieces(500_000, 2 << 20)) == data[500_000 : 2 << 20]
    assert b"".join(departure.pieces(0, len(data))) == data
    assert departure.digest == sha(data)
    assert sum(moved) == len(data)
    rest = Departure(data, len(data))
    rest.read_rest()
    assert rest.digest == sha(data)


def test_departure_notices_a_file_that_shrank_or_became_a_link(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    departure = Departure(tmp_path / "x", 5)
    departure.read_rest()
    assert departure.digest is None
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(OSError, match="symbolic link"):
        Departure(tmp_path / "link", 3).read_rest()


def test_the_first_failure_ends_the_others_and_is_the_one_told():
    stop, begun = Stop(), []

    def work(item: int) -> None:
        begun.append(item)
        if item == 2:
            raise ValueError("the second")
        stop.sleep(20.0)

    started = time.monotonic()
    with pytest.raises(ValueError, match="the second"):
        each(range(1, 50), work, stop, 3)
    assert time.monotonic() - started < 15
    assert len(begun) < 10
    done = []
    each(range(5), done.append, Stop(), 2)
    assert sorted(done) == list(range(5))


class Steps:
    def __init__(self) -> None:
        self.total, self.steps = 0, 0

    def stage(self, name: str, total: int) -> None:
        self.total = total

    def done(self, stage: str, what: str, how: str) -> None:
        self.steps += 1


def test_a_meter_tells_every_step_once():
    steps = Steps()
    layers = [Layer("small", sha(b"1"), 10), Layer("large", sha(b"2"), 3 * SHOWN_BYTES), Layer("empty", sha(b"3"), 0)]
    meter = Meter(steps, "push", layers)
    assert steps.total == 5
    moved = functools.partial(meter.move, layers[1])
    for _ in range(6):
        moved(SHOWN_BYTES // 2)
    # What is sent again does not count twice, and the last step comes with the end.
    moved(SHOWN_BYTES)
    assert steps.steps == 2
    for layer in layers:
        meter.finish(layer, "sent")
    assert steps.steps == steps.total
