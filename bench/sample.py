"""The official sample's way to FLUX.1-dev's 57 blocks, summed from measured ones, beside a build of the transformer."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.figure import WORK, Figure, Run, gigabytes, run
from bench.full import MODEL, SCHEME, build_cold, build_from_moulds
from bench.reference_sample import NAMES, Kind, compile_arguments, input_shapes
from fluxkiln.compile.toolchains.tpu_mlir.environment import (
    TpuMlirEnv,
    default_tpu_mlir_root,
    find_tpu_mlir,
    tool_argv,
    tpu_mlir_environ,
)
from fluxkiln.export.source import resolve_model
from fluxkiln.patches.flux1.presets import PRESETS

CONFIG = PRESETS[MODEL].configs["transformer"]
BLOCKS: Mapping[Kind, int] = {"double": int(CONFIG["num_layers"]), "single": int(CONFIG["num_single_layers"])}
_EXPORT = "import sys; from pathlib import Path; from bench.reference_sample import export_block as export; "
_EXPORT += "export(sys.argv[1], Path(sys.argv[2]))"


def measure() -> Figure:
    env = find_tpu_mlir(default_tpu_mlir_root())
    if env is None:
        raise RuntimeError("TPU-MLIR's environment is not there; run make env-tpu-mlir")
    WORK.mkdir(parents=True, exist_ok=True)
    blocks = {kind: build_block(env, kind) for kind in BLOCKS}
    root = resolve_model(MODEL, WORK / "models", components=("transformer",))
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        moulds = Path(folder) / "moulds.tar"
        cold, _ = build_cold("transformer", Path(folder), moulds)
        warm = build_from_moulds("transformer", Path(folder), moulds)
    shutil.rmtree(root)
    steps = tuple(next(iter(blocks.values())))
    rows = [_row(f"the sample's way: {step}", {kind: [runs[step]] for kind, runs in blocks.items()}) for step in steps]
    rows.append(_row("**the sample's way**", {kind: list(runs.values()) for kind, runs in blocks.items()}))
    theirs = sum(BLOCKS[kind] * one.seconds for kind, runs in blocks.items() for one in runs.values())
    for name, ours in (("**fluxkiln, cold**", cold), ("**fluxkiln, with moulds**", warm)):
        times = f"{theirs / ours.seconds:.1f}"
        rows.append((name, "", "", f"{ours.seconds:.0f} s", times, gigabytes(ours.peak_bytes)))
    return Figure(
        f"The blocks of {MODEL} beside the official sample's way, {SCHEME}, 1024x1024, 512 tokens",
        ("", "a double block", "a single block", f"{BLOCKS['double']} + {BLOCKS['single']} blocks", "ratio", "peak"),
        tuple(rows),
        (
            "The sample's way is `bench/reference_sample.py`: one block in float32 traced with its weights, then its "
            "own calls of `model_transform` and `model_deploy`. One block of each kind was measured and counted as "
            "often as there are blocks. Its script has the whole pipeline in float32 in memory while it exports "
            "(its README asks for 96 GB), and combines the 57 files at the end; neither is counted here.",
            "fluxkiln's rows are `fluxkiln build bm1684x --no-verify --components transformer` from start to end: the "
            "checkpoint read and hashed, head, tail and modulation too, and all combined in one file. With moulds: a "
            "store into which those of the cold build were imported, and no TPU-MLIR. Aim: ratios of 15 and 40.",
        ),
    )


def build_block(env: TpuMlirEnv, kind: Kind) -> dict[str, Run]:
    """One block exported and compiled as the sample does it: step -> its run."""
    with tempfile.TemporaryDirectory(dir=WORK) as name:
        folder = Path(name)
        runs = {"export": run([sys.executable, "-c", _EXPORT, kind, str(folder)])}
        for tool, *arguments in compile_arguments(folder / f"{NAMES[kind]}.onnx", input_shapes(kind)):
            environ = tpu_mlir_environ(env, "bm1684x")
            runs[tool] = run([*tool_argv(env, tool), *arguments], environ, folder)
        if not list(folder.glob("*.bmodel")):
            raise RuntimeError(f"{kind}: the sample's calls left no bmodel")
    return runs


def _row(name: str, runs: Mapping[Kind, list[Run]]) -> tuple[str, ...]:
    seconds = {kind: sum(one.seconds for one in taken) for kind, taken in runs.items()}
    total = sum(BLOCKS[kind] * value for kind, value in seconds.items())
    peak = max(one.peak_bytes for taken in runs.values() for one in taken)
    columns = (f"{seconds[kind]:.0f} s" for kind in ("double", "single"))
    return (name, *columns, f"{total:.0f} s", "", gigabytes(peak))
