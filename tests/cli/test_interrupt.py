"""Signals end a command soon, also while a library computes and the main thread does not come back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

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
