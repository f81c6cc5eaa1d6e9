"""A second build with nothing changed: wall time, and which processes it starts."""

from __future__ import annotations

import json
import statistics
import sys

from bench.figure import WORK, Figure, fluxkiln, run

TIMES = 7
# every way in which Python starts a process raises one of these audit events
_COUNT = """
import json, sys
started = []
events = ("subprocess.Popen", "os.posix_spawn", "os.fork", "os.forkpty", "os.exec", "os.system")
sys.addaudithook(lambda event, arguments: started.append([event, str(arguments[0])]) if event in events else None)
from fluxkiln.cli.main import main
code = main(sys.argv[1:])
print(json.dumps({"code": code, "started": started}), file=sys.stderr)
sys.exit(code or len(started))
"""


def measure() -> Figure:
    rows = []
    for target in ("bm1684x", "cpu"):
        arguments = ["build", target, "--build-dir", str(WORK), "--json"]
        run(fluxkiln(*arguments))
        again = [run(fluxkiln(*arguments)) for _ in range(TIMES)]
        document = again[-1].document()
        if not document["nothing_to_do"]:
            raise RuntimeError(f"the second build of {target} was not a no-op: {json.dumps(document)[:500]}")
        # exits with the number of processes, so that any at all is an error here
        run([sys.executable, "-c", _COUNT, *arguments])
        seconds = [one.seconds for one in again]
        rows.append(
            (
                f"`fluxkiln build {target}` again",
                f"{min(seconds):.3f} s",
                f"{statistics.median(seconds):.3f} s",
                str(document["compiler_runs"]),
                "0",
            )
        )
    return Figure(
        "A build in which nothing changed",
        ("command", "best", f"median of {TIMES}", "compiler runs", "processes started"),
        tuple(rows),
        (
            "tiny-dev in the target's default scheme, verified. Processes are counted by Python's audit hook; one of "
            "them, of any kind, fails the measurement. `make` adds its own check of the environments. Aim: at most "
            "0.5 s, no compiler.",
        ),
    )
