"""This checkout beside another one in one run: start, no-op and cold build, full-size cast, opening, as ratios.

    python -m bench.against ../other-checkout --target bm1684x --times 5
    python -m bench.against ../other-checkout --cast transformer
    python -m bench.against ../other-checkout --open wide-dev --target cpu
    python -m bench.against ../other-checkout --open tiny-dev --target cpu --steps 4

Each figure alternates between the two, so that what else the machine does meets both.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.figure import ROOT, WORK, Run, fluxkiln, run
from bench.full import MODEL, build_cold, build_from_moulds
from fluxkiln.export.source import resolve_model

# as an installed package has it, whatever the shell says
BYTECODE = {"PYTHONDONTWRITEBYTECODE": ""}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.against", description=str(__doc__).splitlines()[0])
    parser.add_argument("tree", type=Path, help="the other checkout")
    parser.add_argument("--target", default="bm1684x")
    parser.add_argument("--times", type=int, default=5, help="runs of what takes less than a second")
    parser.add_argument("--cast", metavar="COMPONENT", help=f"cast this component of {MODEL} from moulds; nothing else")
    parser.add_argument("--open", metavar="MODEL", help="make an image from a bundle of it; nothing else")
    parser.add_argument("--steps", type=int, default=1, help="of that image")
    options = parser.parse_args(arguments)
    trees = {"this": ROOT, "other": options.tree.resolve()}
    WORK.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        if options.cast:
            compare_casts(options.cast, trees, Path(folder))
        elif options.open:
            compare_openings(options.open, options.target, (options.times, options.steps), trees, Path(folder))
        else:
            compare_builds(options.target, options.times, trees, Path(folder))
    return 0


def compare_builds(target: str, times: int, trees: Mapping[str, Path], folder: Path) -> None:
    builds = {
        name: ["build", target, "--model", "tiny-dev", "--build-dir", str(folder / name), "--json"] for name in trees
    }
    cases = {
        "--help": (times, {name: ["--help"] for name in trees}),
        f"{target}, cold": (1, builds),
        f"{target}, no-op": (times, builds),
    }
    for what, (repeats, commands) in cases.items():
        runs: dict[str, list[Run]] = {name: [] for name in trees}
        for _ in range(repeats):
            for name, tree in trees.items():
                runs[name].append(run(fluxkiln(*commands[name]), BYTECODE, tree))
        show(what, runs)


def compare_casts(component: str, trees: Mapping[str, Path], folder: Path) -> None:
    """The files of a component written from the moulds that each checkout has compiled before, twice."""
    resolve_model(MODEL, WORK / "models", components=(component,))
    for name, tree in trees.items():
        (folder / name).mkdir()
        build_cold(component, folder / name, folder / name / "moulds.tar", tree)
    runs: dict[str, list[Run]] = {name: [] for name in trees}
    for _ in range(2):
        for name, tree in trees.items():
            runs[name].append(build_from_moulds(component, folder / name, folder / name / "moulds.tar", tree))
    show(f"{MODEL}, {component} from moulds", runs)
    casts = {name: min(float(one.document()["timings"]["cast"]) for one in each) for name, each in runs.items()}
    print(f"of which cast: {casts['this'] / casts['other']:.3f} of the time ({casts})", flush=True)


def compare_openings(model: str, target: str, asked: tuple[int, int], trees: Mapping[str, Path], folder: Path) -> None:
    """`generate` as a whole; and until a bundle, which was opened before, is checked and its executor there: `check`
    and `open` of it. `asked` are how often, and how many steps."""
    times, steps = asked
    root, bundles = resolve_model(model, WORK / "models"), {}
    for name, tree in trees.items():
        build = fluxkiln("build", target, "--model", str(root), "--build-dir", str(folder / name), "--no-verify")
        run(build, BYTECODE, tree)
        (bundles[name],) = (folder / name / target).glob("*/bundle")
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    runs: dict[str, list[Run]] = {name: [] for name in trees}
    for _ in range(times + 1):
        for name, tree in trees.items():
            image = ["x", "--bundle", str(bundles[name]), "--steps", str(steps), "--out", str(folder / "x.png")]
            environ = {**BYTECODE, "XDG_CACHE_HOME": str(folder / "cache")}
            runs[name].append(run(fluxkiln("generate", *image, "--json"), environ, tree))
            seconds[name].append(sum(runs[name][-1].document()["timings"][what] for what in ("check", "open")))
    # the first one reads every file
    medians = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    show(f"{model} for {target}, an image of {steps} steps", {name: each[1:] for name, each in runs.items()})
    print(f"{model} for {target}, opened: {medians['this'] / medians['other']:.3f} of the time ({medians})", flush=True)


def show(what: str, runs: Mapping[str, Sequence[Run]]) -> None:
    seconds = {name: statistics.median(one.seconds for one in each) for name, each in runs.items()}
    peaks = {name: max(one.peak_bytes for one in each) for name, each in runs.items()}
    shown = ", ".join(f"{name} {seconds[name]:.2f} s, {peaks[name] / 1e9:.2f} GB" for name in runs)
    print(
        f"{what}: {seconds['this'] / seconds['other']:.3f} of the time, {peaks['this'] / peaks['other']:.3f} of the "
        f"memory ({shown})",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
