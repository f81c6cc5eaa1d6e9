"""Real processes: what an error shows, and that nothing goes on after a stop."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from fluxkiln.compile.process import run_tool, stop_all
from fluxkiln.errors import CompileError, ResourceError


@pytest.fixture
def run(tmp_path):
    def start(script, folder=tmp_path):
        run_tool(
            ["/bin/sh", "-c", script], folder, dict(os.environ), tmp_path / "logs" / "tool.log", "double_00 deploy"
        )

    return start


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_output_goes_to_the_log_and_the_folder_is_its_own(run, tmp_path):
    run("pwd; echo said >&2; touch made; cat")  # stdin is empty, or cat would wait
    text = (tmp_path / "logs" / "tool.log").read_text()
    assert text.startswith("$ /bin/sh -c ")
    assert text.endswith(f"{tmp_path}\nsaid\n")
    assert (tmp_path / "made").exists()


def test_failure_shows_the_telling_lines_and_the_log(run, tmp_path):
    with pytest.raises(CompileError) as raised:
        run("echo 'Error: op Foo is not supported'; for i in 1 2 3 4 5 6 7 8; do echo step $i; done; exit 3")
    message = str(raised.value)
    assert raised.value.exit_code == 1
    assert "double_00 deploy" in message
    assert "exit code 3" in message
    assert "op Foo is not supported" in message
    assert "step 8" not in message
    assert str(tmp_path / "logs" / "tool.log") in message


def test_without_telling_lines_the_last_ones_are_shown(run):
    with pytest.raises(CompileError, match=r"exit code 5: a \| b \| c \| d \| two \| three") as raised:
        run("echo one; echo; for i in a b c d; do echo $i; done; echo two; echo three; exit 5")
    assert "one" not in str(raised.value)
    with pytest.raises(CompileError, match="it printed nothing"):
        run("exit 1")


def test_lines_of_an_earlier_tool_are_not_shown(run):
    run("echo 'error of yesterday'")
    with pytest.raises(CompileError, match="of today") as raised:
        run("echo 'error of today'; exit 1")
    assert "yesterday" not in str(raised.value)


@pytest.mark.parametrize("script", ["kill -9 $$", "sh -c 'kill -9 $$'; exit $?", "sh -c 'kill -9 $$'; exit 1"])
def test_signal_9_names_memory(run, script):
    with pytest.raises(ResourceError, match=r"double_00 deploy: sh was killed \(signal 9\).*memory.*JOBS=1.*tool\.log"):
        run(script)


def test_disk_full_is_named(run):
    with pytest.raises(ResourceError, match="the disk is full"):
        run("echo 'OSError: [Errno 28] No space left on device'; exit 1")


def test_stop_all_ends_the_whole_group(run, tmp_path):
    """The tool, and what the tool started."""
    errors = []

    def job():
        try:
            run("sleep 300 & echo $! > child; echo $$ > parent; wait")
        except (CompileError, ResourceError) as error:
            errors.append(error)

    thread = threading.Thread(target=job)
    thread.start()
    wait_for(lambda: (tmp_path / "parent").exists() and (tmp_path / "parent").read_text().strip())
    pids = [int((tmp_path / name).read_text()) for name in ("child", "parent")]
    assert all(map(alive, pids))

    def stopped():
        stop_all()  # again and again, as the pool does: a tool is known a moment after it has started
        return not thread.is_alive()

    wait_for(stopped)
    wait_for(lambda: not any(map(alive, pids)))
    assert isinstance(errors[0], ResourceError)


def test_an_interrupt_stops_the_tool(tmp_path):
    """Ctrl-C while waiting: the exception goes on, and the tool does not."""
    code = (
        "import os, signal, sys, threading, time, pathlib\n"
        "from fluxkiln.compile.process import run_tool\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def interrupt():\n"
        "    while not (folder / 'parent').exists(): time.sleep(0.01)\n"
        "    time.sleep(0.2)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "threading.Thread(target=interrupt, daemon=True).start()\n"
        "script = 'sleep 300 & echo $! > child; echo $$ > parent; wait'\n"
        "run_tool(['/bin/sh', '-c', script], folder, dict(os.environ), folder / 'log', 'x')\n"
    )
    import subprocess

    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=60)
    assert "KeyboardInterrupt" in done.stderr
    wait_for(lambda: not any(alive(int((tmp_path / name).read_text())) for name in ("child", "parent")))
