"""This checkout beside another one in one run: start, no-op and cold build, as ratios.

    python -m bench.against ../other-checkout --target bm1684x --times 5

Each figure alternates between the two, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from bench.figure import WORK, fluxkiln, run

ROOT = Path(__file__).resolve().parent.parent


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=str(__doc__).splitlines()[0])
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--target", default="bm1684x")
    parser.add_argument("--times", type=int, default=5, help="runs of what takes less than a second")
    options = parser.parse_args(arguments)
    trees = {"this": ROOT, "other": options.tree.resolve()}
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        builds = {name: ["build", options.target, "--build-dir", str(Path(folder) / name), "--json"] for name in trees}
        cases = {
            "--help": (options.times, {name: ["--help"] for name in trees}),
            f"{options.target}, cold": (1, builds),
            f"{options.target}, no-op": (options.times, builds),
        }
        for what, (times, commands) in cases.items():
            seconds: dict[str, list[float]] = {name: [] for name in trees}
            peaks = dict.fromkeys(trees, 0)
            for _ in range(times):
                for name, tree in trees.items():
                    made = run(fluxkiln(*commands[name]), folder=tree)
                    seconds[name].append(made.seconds)
                    peaks[name] = max(peaks[name], made.peak_bytes)
            this, other = (statistics.median(seconds[name]) for name in trees)
            shown = ", ".join(
                f"{name} {statistics.median(each):.2f} s, {peaks[name] / 1e9:.2f} GB" for name, each in seconds.items()
            )
            print(
                f"{what}: {this / other:.3f} of the time, {peaks['this'] / peaks['other']:.3f} of the memory ({shown})",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
