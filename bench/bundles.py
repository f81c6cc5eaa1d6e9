"""Digests of every file of the bundles of many builds, recorded before a change and compared after it.

    python -m bench.bundles record before.json --tree ../other-checkout --work /tmp/before
    python -m bench.bundles compare before.json --work /tmp/after

A change that must not move a byte (of code to another file, say) is proven so. Verified builds have the numbers of
their report compared as well. What names a version, a machine or a time is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
INLINE = ("--modulation", "inline")
# target and options of `fluxkiln build`; what is not --no-verify has its report compared
BUILDS: tuple[tuple[str, ...], ...] = (
    ("cpu",),
    ("cpu", "--scheme", "W4BF16"),
    ("cpu", *INLINE),
    ("cpu", "--scheme", "W4BF16-svd-r16", "--no-verify"),
    ("cpu", "--model", "tiny-schnell", "--no-verify"),
    ("cpu", "--model", "wide-dev", "--no-verify"),
    ("trn1",),
    ("trn1", "--model", "tiny-schnell", "--no-verify"),
    ("trn1", "--model", "tiny-dev", "--granularity", "group:2", "--tp", "2", "--no-verify"),
    ("trn1", "--model", "wide-dev", "--components", "transformer", "--no-verify"),
    ("inf2", "--granularity", "whole", "--no-verify"),
    ("bm1684x",),
    ("bm1684x", "--scheme", "W4BF16", *INLINE, "--no-verify"),
    *(
        ("bm1684x", "--scheme", scheme, *form, "--no-verify")
        for scheme in ("BF16", "W4BF16-svd-r16", "W4BF16-gptq")
        for form in ((), INLINE)
    ),
    ("bm1684x", "--model", "tiny-schnell", "--no-verify"),
    ("bm1684x", "--vae", "tiny", "--components", "vae", "--no-verify"),
    ("bm1688", "--scheme", "W4BF16-rtn", "--no-verify"),
    ("bm1684x", "--model", "wide-dev", "--no-verify"),
)
CALIBRATED = "tiny-dev"
PARITY_FAILED, NO_TOOLCHAIN = 3, 5
# of the manifest: versions, and what is said of the parity
LEFT_OUT = ("tools", "fluxkiln", "parity", "digest")


def record(tree: Path, work: Path, only: str) -> dict[str, Any]:
    """Make the builds with the package in `tree`; build -> path in the bundle -> digest."""
    found: dict[str, Any] = {}
    run(tree, ["calibrate", CALIBRATED, "--build-dir", str(work)])
    for build in BUILDS:
        name = " ".join(build)
        if only not in name:
            continue
        made = run(tree, ["build", *build, "--build-dir", str(work)])
        bundle = Path(made["bundle"])
        found[name] = files_of(bundle)
        if "--no-verify" not in build:
            found[name]["report"] = numbers_of(bundle.parent / "report.json")
        print(f"{name}: {len(found[name])} files", flush=True)
    return found


def run(tree: Path, arguments: list[str]) -> dict[str, Any]:
    """The JSON that a command prints; what is missing for it may only be a compiler."""
    argv = [sys.executable, "-P", "-m", "fluxkiln", *arguments, "--json"]
    made = subprocess.run(argv, env={**os.environ, "PYTHONPATH": str(tree)}, capture_output=True, text=True)
    if made.returncode not in (0, PARITY_FAILED, NO_TOOLCHAIN):
        raise SystemExit(f"fluxkiln {' '.join(arguments)} ended with {made.returncode}:\n{made.stderr[-3000:]}")
    document: dict[str, Any] = json.loads(made.stdout)
    if made.returncode and "bundle" not in document:  # the second call finds what the first one finished
        document["bundle"] = document.get("error", {}).get("bundle") or bundle_named_in(made.stderr + made.stdout)
    return document


def bundle_named_in(text: str) -> str:
    words = [word.strip(".,;:()\"'") for word in text.replace("\\n", " ").split()]
    return next(word for word in words if word.endswith("/bundle"))


def files_of(bundle: Path) -> dict[str, Any]:
    """Path -> digest of every file, of the manifest without versions."""
    found = {}
    for path in sorted(bundle.rglob("*")):
        name = str(path.relative_to(bundle))
        if not path.is_file() or name == "build.json":
            continue
        data = path.read_bytes()
        if name == "manifest.json":
            known = json.loads(data)
            known["files"] = [entry for entry in known["files"] if entry["path"] != "build.json"]
            data = json.dumps({key: known[key] for key in known if key not in LEFT_OUT}, sort_keys=True).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def numbers_of(report: Path) -> str:
    """A digest over every row of a report: part, output, rung, metrics, verdicts; a gate's place in its table is none
    of them."""
    rows = json.loads(report.read_text())["rows"]
    for row in rows:
        verdicts = [{key: verdict[key] for key in verdict if key != "gate"} for verdict in row["verdicts"]]
        row["verdicts"] = sorted(verdicts, key=json.dumps)
        row.pop("worst", None)
    return f"{len(rows)} rows " + hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.bundles", description=str(__doc__).splitlines()[0])
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout whose package builds")
    parser.add_argument("--work", type=Path, required=True, help="an empty folder for builds and their store")
    parser.add_argument("--only", default="", help="builds whose name has this in it")
    options = parser.parse_args(arguments)
    made = record(options.tree.resolve(), options.work.resolve(), options.only)
    if options.action == "record":
        options.file.write_text(json.dumps(made, indent=1) + "\n")
        return 0
    before = json.loads(options.file.read_text())
    wrong = 0
    for name, files in made.items():
        known = before.get(name, {})
        for path in sorted(known.keys() | files.keys()):
            if known.get(path) != files.get(path):
                wrong += 1
                print(f"{name}: {path} was {known.get(path)}, is {files.get(path)}")
    print(f"{len(made)} builds, {sum(map(len, made.values()))} files, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
