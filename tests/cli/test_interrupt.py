"""Signals end a command soon, also while a library computes and the main thread does not come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 900

PROGRAM = """
import hashlib, os, signal, sys
from fluxkiln.cli.interrupt import end_soon
from fluxkiln.compile.process import Worker
signal.signal(signal.SIGTERM, signal.default_int_handler)
{before}
end_soon(lambda: print("interrupted", flush=True) or 130, seconds=0.5)
worker = Worker([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), "sleeper")
print(worker._process.pid, flush=True)
# in C, as a product of matrices is: what a signal does in Python waits for its end
hashlib.pbkdf2_hmac("sha256", b"a", b"b", 2_000_000_000)
"""


def start(before=""):
    program = PROGRAM.format(before=before)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, process_group=0)
    worker, began = int(process.stdout.readline()), computed(process.pid)
    # what it prints comes before the long call; only that takes so much
    while process.poll() is None and computed(process.pid) < began + 20:
        time.sleep(0.02)
    return process, worker


def computed(pid: int) -> int:
    """Clock ticks, hundredths of a second, that a process has computed."""
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return int(file.read().rpartition(")")[2].split()[11])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True])
def test_a_signal_ends_a_command_whose_main_thread_is_elsewhere(number, group):
    process, worker = start()
    (os.killpg if group else os.kill)(process.pid, number)
    output, _ = process.communicate(timeout=30)  # the call would last minutes
    assert (process.returncode, output) == (130, "interrupted\n")
    deadline = time.monotonic() + 20
    while is_running(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(worker), "what it started is gone too"


def test_signals_that_another_handles_are_left_to_it():
    process, _ = start(before="signal.signal(signal.SIGINT, lambda *_: None)")
    os.kill(process.pid, signal.SIGINT)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=3)
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130


def descendants(pid: int) -> dict[int, str]:
    """Processes that one has started, and those that they have: pid -> its command line."""
    found, todo = {}, [pid]
    while todo:
        for task in Path(f"/proc/{todo.pop()}/task").glob("*"):
            try:
                children = [int(child) for child in (task / "children").read_text().split()]
                named = {child: Path(f"/proc/{child}/cmdline").read_text().replace("\0", " ") for child in children}
            except OSError:  # it has ended
                continue
            found |= named
            todo += children
    return found


@pytest.fixture(scope="module")
def build_dir(tmp_path_factory):
    """The same for all: what an interrupted build has finished is not made again."""
    return tmp_path_factory.mktemp("interrupted")


@pytest.mark.thorough
@pytest.mark.tpu_mlir
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("worker", ["tpuc-opt", "simulator_worker"])
def test_a_signal_ends_a_build_while_a_worker_computes(build_dir, number, group, worker):
    process = subprocess.Popen(
        [sys.executable, "-m", "fluxkiln", "build", "bm1684x", "--model", "tiny-dev", "--build-dir", str(build_dir)],
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, process_group=0,
        text=True,
    )  # fmt: skip
    until = time.monotonic() + PATIENCE
    while not any(worker in line for line in descendants(process.pid).values()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    started = descendants(process.pid)
    sent = time.monotonic()
    (os.killpg if group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)  # minutes are left of it
    print(f"ended {time.monotonic() - sent:.2f} s after the signal, {len(started)} processes with it")
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "error: interrupted; finished work is kept, the same command resumes"
    assert "Traceback" not in errors
    until = time.monotonic() + 20
    while any(map(is_running, started)) and time.monotonic() < until:
        time.sleep(0.05)
    assert [line for pid, line in started.items() if is_running(pid)] == []
