from __future__ import annotations

import io
import itertools
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fluxkiln.cli.output import LineProgress, RichProgress, StageTally, open_progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def lines(stream, clock) -> LineProgress:
    return LineProgress(stream, clock, interval=5.0)


def test_few_lines_while_a_stage_runs_and_one_at_its_end(lines, stream, clock):
    lines.stage("compile", 20)
    for i in range(20):
        clock.now += 2.0
        lines.done("compile", f"double.{i:02d}", "compiled in 2.0 s")
    assert stream.getvalue().splitlines() == [
        "compile: 3/20, double.02 compiled in 2.0 s, about 34 s left",
        "compile: 6/20, double.05 compiled in 2.0 s, about 28 s left",
        "compile: 9/20, double.08 compiled in 2.0 s, about 22 s left",
        "compile: 12/20, double.11 compiled in 2.0 s, about 16 s left",
        "compile: 15/20, double.14 compiled in 2.0 s, about 10 s left",
        "compile: 18/20, double.17 compiled in 2.0 s, about 4.0 s left",
        "compile: 20 done in 40 s",
    ]


def test_jobs_from_the_store_are_counted(lines, stream):
    lines.stage("cast", 2)
    lines.done("cast", "tail", "from the store")
    lines.done("cast", "head", "cast in 0.1 s")
    lines.stage("mould", 2)
    lines.done("mould", "tail", "from the store")
    lines.done("mould", "head", "from the store")
    assert stream.getvalue() == (
        "cast: 2 done in 0.0 s, 1 from the store\nmould: 2 done in 0.0 s, all from the store\n"
    )


def test_a_stage_may_shrink_to_what_is_done(lines, stream):
    lines.stage("cast", 3)
    lines.done("cast", "tail", "cast in 0.1 s")
    lines.stage("cast", 1)
    lines.stage("cast", 1)
    assert stream.getvalue() == "cast: 1 done in 0.0 s\n"


def test_one_job_is_told_as_it_is(lines, stream):
    lines.done("bundle", "build/cpu/tiny-dev", "18 MB")
    lines.note("a word")
    assert stream.getvalue() == "bundle: build/cpu/tiny-dev 18 MB\na word\n"


def test_a_stage_may_grow(lines, stream, clock):
    lines.stage("compile", 1)
    lines.stage("compile", 2)
    lines.done("compile", "head", "compiled")
    assert stream.getvalue() == ""
    lines.done("compile", "tail", "compiled")
    assert stream.getvalue() == "compile: 2 done in 0.0 s\n"


def test_jobs_beyond_the_announced_ones_do_not_fill_the_log(lines, stream, clock):
    lines.stage("compile", 2)
    for i in range(8):
        lines.done("compile", f"single.{i:02d}", "compiled")
    clock.now += 6.0
    lines.done("compile", "single.08", "compiled")
    assert stream.getvalue() == "compile: 2 done in 0.0 s\ncompile: 9/9, single.08 compiled\n"


def test_stored_jobs_do_not_spoil_the_estimate():
    tally = StageTally(60, 0.0)
    for _ in range(30):
        tally.finish("from the store", 0.1)
    assert tally.remaining(0.1) is None
    tally.finish("compiled in 10 s", 10.1)
    assert tally.remaining(10.1) is None
    tally.finish("compiled in 10 s", 20.1)
    assert tally.remaining(20.1) == pytest.approx(28 * 10.0)
    assert tally.remaining(25.1) == pytest.approx(28 * 10.0 - 5.0)


def test_estimate_follows_the_last_jobs():
    tally = StageTally(100, 0.0)
    for i in range(10):
        tally.finish("compiled", (i + 1) * 100.0)
    for i in range(10):
        tally.finish("compiled", 1000.0 + i + 1)
    assert tally.remaining(1010.0) == pytest.approx(80.0)
    tally.total = tally.done
    assert tally.remaining(1010.0) is None


@pytest.mark.parametrize("make", [LineProgress, RichProgress])
def test_many_threads_lose_no_job(make, stream):
    progress = make(stream)
    progress.stage("cast", 8 * 200)

    def work() -> None:
        for i in range(200):
            progress.done("cast", f"single.{i}", "cast")

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if isinstance(progress, RichProgress):
        progress.__exit__()
    assert "1600/1600" in stream.getvalue() or "1600 done in" in stream.getvalue()


def test_bars_show_the_stage_and_take_names_as_text(stream):
    with RichProgress(stream) as progress:
        progress.stage("compile", 2)
        progress.stage("compile", 3)
        progress.done("compile", "[red]head", "compiled in 2.0 s")
        progress.note("t5_block: [bytes] unknown")
        progress.done("unannounced", "x", "done")
    shown = stream.getvalue()
    assert "1/3" in shown
    assert "[red]head compiled" in shown
    assert "[bytes] unknown" in shown
    assert "unannounced" in shown


def test_rich_is_not_imported_before_there_is_something_to_draw(monkeypatch, stream):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with RichProgress(stream):
        pass
    with pytest.raises(ImportError), RichProgress(stream) as progress:
        progress.stage("compile", 1)


def test_lines_where_stderr_is_no_terminal(monkeypatch, stream):
    monkeypatch.setattr(sys, "stderr", stream)
    with open_progress() as progress:
        assert isinstance(progress, LineProgress)
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("TERM", "xterm")
    with open_progress() as progress:
        assert isinstance(progress, RichProgress)


def test_what_is_left_knows_what_jobs_cost(clock):
    """Two cheap parts, then one that costs as much as eight of them."""
    tally = StageTally(0, 0.0)
    tally.announce([1.0, 1.0, 8.0])
    for now in (2.0, 4.0):
        tally.finish("run", now)
    assert tally.remaining(4.0) == 16.0
    assert tally.remaining(19.0) == 1.0
    # no line says that nothing is left while work goes on
    assert tally.remaining(19.98) is None
    assert tally.remaining(20.0) is None


def test_what_is_waited_for_is_said(lines, stream, clock):
    """Looked at every second, five seconds never pass without a line."""
    lines.stage("verify", 2)
    clock.now += 3.9
    lines.tick()
    assert stream.getvalue() == ""
    clock.now += 1.0
    lines.tick()
    assert stream.getvalue() == "verify: 0/2 after 4.9 s\n"
    clock.now += 3.0
    lines.tick()
    lines.done("verify", "a", "b")
    lines.done("verify", "a", "b")
    assert stream.getvalue().splitlines()[1:] == ["verify: 2 done in 7.9 s"]
    clock.now += 4.0
    lines.tick()
    assert stream.getvalue().splitlines()[2:] == ["still at work after 12 s"], "between two stages too"


def test_before_the_first_stage_something_is_said_too(lines, stream, clock):
    clock.now += 4.5
    lines.tick()
    lines.tick()
    assert stream.getvalue() == "still at work after 4.5 s\n"


@pytest.mark.thorough
@pytest.mark.tpu_mlir
@pytest.mark.parametrize("target", ["cpu", "bm1684x"])
def test_a_build_says_what_it_does(target, tmp_path):
    command = [sys.executable, "-m", "fluxkiln", "build", target, "--model", "tiny-dev", "--build-dir", str(tmp_path)]
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    how = {"env": environ, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **how) as process:
        assert process.stderr is not None
        said = [(time.monotonic(), line) for line in process.stderr]
    assert process.returncode == 0, said[-1]
    times = [when for when, _ in said]
    print(f"{len(said)} lines, the longest silence {max(b - a for a, b in itertools.pairwise(times)):.1f} s")
    lines = [line for _, line in said]
    assert not [line for line in lines if re.search(r"about 0(\.0)? s left", line)]
    stages = [line.partition(":")[0] for line in lines if " done in " in line]
    assert {"template", "verify", "pipeline"} <= {*stages}
    assert stages.index("template") < stages.index("verify")
