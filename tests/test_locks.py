from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from fluxkiln.errors import ResourceError
from fluxkiln.files import build_lock, waiting_lock


def take(path, what="tiny-dev for bm1684x"):
    with build_lock(path, what):
        return path.read_text()


HOLD = """
import os, sys, time
from pathlib import Path
from fluxkiln.files import build_lock
with build_lock(Path(sys.argv[1]), "tiny-dev for bm1684x"):
    child = 0
    if len(sys.argv) > 2:
        running, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(tell, b".")
            time.sleep(60)
            os._exit(0)
        os.read(running, 1)
    print(child, flush=True)
    sys.stdin.read()
"""


def test_second_process_is_told_who_holds_the_lock_and_since_when(tmp_path, start_python):
    path = tmp_path / "build" / ".lock"
    holder = start_python(HOLD, path)
    holder.stdout.readline()
    with pytest.raises(ResourceError, match=rf"process {holder.pid} since \d{{4}}-.*kill {holder.pid}") as error:
        take(path)
    assert error.value.exit_code == 1
    holder.communicate("")
    assert f'"pid": {os.getpid()}' in take(path)
    assert not path.exists()


def test_kill_9_frees_the_lock_even_when_a_forked_worker_lives_on(tmp_path, start_python):
    path = tmp_path / ".lock"
    holder = start_python(HOLD, path, "fork")
    worker = int(holder.stdout.readline())
    try:
        holder.kill()
        holder.wait()
        os.kill(worker, 0)  # it does live on
        take(path)
    finally:
        os.kill(worker, signal.SIGKILL)


def test_error_inside_frees_the_lock(tmp_path):
    with pytest.raises(RuntimeError), build_lock(tmp_path / "l", "it"):
        raise RuntimeError
    take(tmp_path / "l")


def test_lock_of_another_at_the_same_place_is_left_alone(tmp_path):
    path = tmp_path / "l"
    with build_lock(path, "it"):
        path.unlink()  # as `rm -r build` does
        with build_lock(path, "again"):
            path.rename(tmp_path / "aside")
            path.write_text("third")
        assert path.read_text() == "third"
    assert path.read_text() == "third"


def test_holder_that_has_not_written_its_name_yet(tmp_path):
    with waiting_lock(tmp_path / "l"), pytest.raises(ResourceError, match="has just started"):
        take(tmp_path / "l")


def test_waiting_lock_lets_one_thread_in_at_a_time_though_its_file_comes_and_goes(tmp_path):
    inside, most = [], []

    def work():
        for _ in range(30):
            with waiting_lock(tmp_path / "l"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 180
    assert max(most) == 1
