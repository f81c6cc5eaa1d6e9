"""A coverage-guided fuzz target for each reader, for atheris.

    python -m tests.hostile.fuzz READER [FOLDER ...] [-max_total_time=60 and other options of libFuzzer]

It ends with a crash when a reader raises anything besides a FluxkilnError, takes longer than `-timeout` or more memory
than `-rss_limit_mb`. The input is then left in a file that `tests/hostile/corpus/<reader>` may take.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

# first: numba compiles nothing that is instrumented
import fluxkiln.export.finite
import fluxkiln.export.low_rank  # noqa: F401

with atheris.instrument_imports(include=["fluxkiln"], enable_loader_override=False):
    from tests.hostile.readers import READERS, samples, survives


def main() -> None:
    name = sys.argv.pop(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(FileNotFoundError):
        seeds = Path(folder, "seeds")
        seeds.mkdir()
        for number, data in enumerate(samples(name)):
            (seeds / str(number)).write_bytes(data)

        def once(data: bytes) -> None:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                survives(name, data, Path(work))

        # imported while instrumentation is on: readers import when they are called
        with atheris.instrument_imports(include=["fluxkiln"], enable_loader_override=False):
            once(samples(name)[0])
        assert name in READERS
        atheris.Setup([*sys.argv, str(seeds)], once)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
