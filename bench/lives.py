"""A command in a process of its own: how it ended, what it said, how long it lived, how much memory it took."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench.figure import WORK, tree_bytes

FOLDER = WORK / "hostile"
PATIENCE = 60  # seconds after which a command is taken for one that never ends
SIGNS = (b"Traceback (most recent call last)", b"a bug in fluxkiln")


@dataclass(slots=True)
class Group:
    """What commands did with one kind of input. `late`: seconds that the longest lived, beyond its deadline if any."""

    inputs: int = 0
    refused: int = 0
    signs: list[int] = field(default_factory=lambda: [0] * len(SIGNS))
    late: float = 0.0
    peak_bytes: int = 0
    worst: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Case:
    """A command line, and what is to be in the environment."""

    arguments: Sequence[str | bytes]
    environ: dict[str, str] = field(default_factory=dict)
    deadline: float = 0.0


def run_group(name: str, cases: Iterator[Case]) -> Group:
    print(f"{time.strftime('%H:%M:%S')} {name}", file=sys.stderr, flush=True)
    group = Group()
    for case in cases:
        code, seconds, peak, said = run_case(case)
        group.inputs += 1
        group.refused += code != 0
        group.late = max(group.late, seconds - case.deadline)
        group.peak_bytes = max(group.peak_bytes, peak)
        for number, sign in enumerate(SIGNS):
            group.signs[number] += sign in said
        late = seconds > case.deadline + 5 if case.deadline else seconds > PATIENCE / 2
        if any(sign in said for sign in SIGNS) or late or peak > 1e9 or code < 0:
            last = said.decode(errors="replace").strip().rsplit("\n", 1)[-1]
            group.worst.append(f"{case.arguments}: {code}, {seconds:.1f} s, {peak / 1e6:.0f} MB: {last[:300]}")
    print(f"{name}: {group}", file=sys.stderr, flush=True)
    return group


def start_case(case: Case, log: Path) -> int:
    """The process, with a group of its own, of a command in a fork of this one; what it says goes to `log`."""
    child = os.fork()
    if not child:
        _be_command(case, log)
    with suppress(OSError):  # it was faster, or has ended
        os.setpgid(child, child)
    return child


def run_case(case: Case) -> tuple[int, float, int, bytes]:
    """Exit code, seconds, peak memory of the process tree, and what was said, of a command in a fork of this one."""
    log = FOLDER / "said"
    began = time.monotonic()
    child = start_case(case, log)
    peak, status = 0, 0
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            peak = max(peak, tree_bytes(child))
            if time.monotonic() - began > case.deadline + PATIENCE:
                os.killpg(child, signal.SIGKILL)
            time.sleep(0.02)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it left behind
    return os.waitstatus_to_exitcode(status), time.monotonic() - began, peak, log.read_bytes()


def _be_command(case: Case, log: Path) -> None:
    """The rest of a forked process' life: what `fluxkiln ARGUMENTS` does."""
    code = 1
    try:
        os.setpgid(0, 0)
        here = log.with_name("here")
        here.mkdir(exist_ok=True)
        os.chdir(here)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number in (1, 2):
            os.dup2(file, number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update({"FLUXKILN_TRACEBACK": "1", **case.environ})
        sys.argv = ["fluxkiln", *map(os.fsdecode, case.arguments)]
        from fluxkiln.cli.main import main

        code = main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Import what commands import, so that a fork need not."""
    import diffusers  # noqa: F401
    import torch
    import transformers  # noqa: F401

    import fluxkiln.build.make
    import fluxkiln.cli.main  # noqa: F401

    torch.set_num_threads(1)  # no pool whose threads a fork would lack
