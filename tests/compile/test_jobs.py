"""The pool's promises: memory is never oversubscribed, and a failure ends everything early."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import CancelledError

import pytest

from fluxkiln.compile.process import JobPool, available_memory
from fluxkiln.errors import CompileError, ResourceError


class Gauge:
    """What the running jobs claim together, and the most they ever claimed."""

    def __init__(self):
        self.lock = threading.Lock()
        self.now = self.most = self.running = self.most_running = 0

    def job(self, claim, seconds):
        def run():
            with self.lock:
                self.now += claim
                self.running += 1
                self.most, self.most_running = max(self.most, self.now), max(self.most_running, self.running)
            time.sleep(seconds)
            with self.lock:
                self.now -= claim
                self.running -= 1
            return claim

        return run


@pytest.mark.parametrize("seed", range(5))
def test_claims_never_exceed_the_budget(seed):
    choose, gauge = random.Random(seed), Gauge()
    budget = choose.randint(100, 1000)
    claims = [choose.randint(1, budget) for _ in range(40)]
    with JobPool(jobs=8, memory=budget) as pool:
        futures = [pool.submit(f"job {i}", claim, gauge.job(claim, 0.002)) for i, claim in enumerate(claims)]
        pool.wait()
    assert [future.result() for future in futures] == claims
    assert gauge.most <= budget
    assert gauge.now == 0
    assert pool._used == 0


def test_small_claims_run_beside_one_another():
    """The control: the gauge sees more than one job at once when memory allows."""
    gauge, both = Gauge(), threading.Barrier(2, timeout=20)

    def meet():
        gauge.job(50, 0)()
        both.wait()

    with JobPool(jobs=2, memory=100) as pool:
        for i in range(2):
            pool.submit(f"job {i}", 50, meet)
        pool.wait()


def test_no_more_jobs_than_asked_for():
    gauge = Gauge()
    with JobPool(jobs=3, memory=1000) as pool:
        for i in range(20):
            pool.submit(f"job {i}", 1, gauge.job(1, 0.002))
        pool.wait()
    assert gauge.most_running <= 3


def test_claim_above_the_budget_is_refused_at_once():
    ran = []

    def build():
        with JobPool(jobs=1, memory=2_000_000_000) as pool:
            pool.submit("mould double", 9_000_000_000, lambda: ran.append(1))
            pool.wait()

    with pytest.raises(ResourceError, match=r"mould double needs about 9\.0 GB of memory, 2\.0 GB are available.*SIZE"):
        build()
    assert not ran


def test_first_error_is_raised_while_others_still_run():
    release, started = threading.Event(), threading.Event()

    def slow():
        started.set()
        release.wait(20)

    def bad():
        started.wait(20)
        raise CompileError("the second job failed")

    with JobPool(jobs=2, memory=100) as pool:
        first = pool.submit("slow", 1, slow)
        pool.submit("bad", 1, bad)
        with pytest.raises(CompileError, match="the second job failed"):
            pool.wait()
        assert not first.done()
        release.set()


def test_check_raises_for_finished_jobs_only():
    def bad():
        raise CompileError("no")

    release = threading.Event()
    with JobPool(jobs=2, memory=100) as pool:
        pool.submit("slow", 1, lambda: release.wait(20))
        pool.check()
        failed = pool.submit("bad", 1, bad)
        while not failed.done():
            time.sleep(0.001)
        with pytest.raises(CompileError, match="no"):
            pool.check()
        release.set()


def test_waiting_jobs_do_not_start_after_a_failure():
    """One waits for memory, others for a thread."""
    ran, waiting = [], threading.Event()

    def bad():
        waiting.wait(20)
        raise CompileError("the first job failed")

    later = []

    def build():
        with JobPool(jobs=2, memory=100) as pool:
            pool.submit("bad", 90, bad)
            later.extend(pool.submit(f"later {i}", 90, lambda i=i: ran.append(i)) for i in range(5))
            while not later[0].running():
                time.sleep(0.001)
            waiting.set()
            pool.wait()

    with pytest.raises(CompileError, match="the first job failed"):
        build()
    assert not ran
    for future in later:
        assert future.done()
        with pytest.raises((ResourceError, CancelledError)):
            future.result()


def test_the_error_that_counts_is_the_first_one():
    """Not what it did to the others, whichever result is asked for."""
    waiting = threading.Event()

    def bad():
        waiting.wait(20)
        raise CompileError("the first job failed")

    def build():
        with JobPool(jobs=1, memory=100) as pool:
            pool.submit("bad", 100, bad)
            later = pool.submit("later", 100, lambda: None)
            waiting.set()
            later.result(20)

    with pytest.raises(CompileError, match="the first job failed"):
        build()


def test_memory_is_given_back_by_failed_jobs():
    def bad():
        raise CompileError("no")

    pool = JobPool(jobs=1, memory=100)
    assert isinstance(pool.submit("bad", 100, bad).exception(20), CompileError)
    assert isinstance(pool.submit("late", 100, lambda: 7).exception(20), ResourceError)
    assert pool._used == 0
    pool.__exit__(None, None, None)


def test_memory_of_this_machine():
    assert 1 << 28 < available_memory() < 1 << 45
    assert JobPool().budget >= 1 << 30
