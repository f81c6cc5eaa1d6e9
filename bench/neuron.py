"""Lowering and sharding FLUX.1-dev for trn1 at full size, tp 8, beside a plain copy of the same bytes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from bench.figure import WORK, Figure, Run, gigabytes, ratio, run
from bench.full import BLOCK, drop_from_cache
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.source import resolve_model
from fluxkiln.types import TensorRef

MODEL, DEGREE, SIZE, TOKENS = "full-dev", 8, (1024, 1024), 512
_LOWER = """
import json, sys, time
from pathlib import Path
from fluxkiln.compile.toolchains.neuron.modules import lower_modules, module_name
from fluxkiln.build.make import outline
from fluxkiln.progress import Silent
from fluxkiln.settings import Settings
from bench.neuron import DEGREE, MODEL, SIZE, TOKENS
settings = Settings("trn1", MODEL, size=(SIZE,), tokens=(TOKENS,), tp_degree=DEGREE, granularity=sys.argv[2],
                    build_dir=Path(sys.argv[1]))
made = outline(settings)
modules = lower_modules(made.checkpoint, made.plan, made.cache, Silent())
step = [modules[module_name(part)] for part in made.plan.parts if part.component == "transformer"]
print(json.dumps({
    "modules": len(modules),
    "reduces": sum(len(m.facts["all_reduce_bytes"]) for m in step),
    "gathers": sum(len(m.facts["all_gather_bytes"]) for m in step),
}))
"""
_SHARD = """
import json, sys, time
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from fluxkiln.export.bindings import bind_shard, split_slots
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.shard_files import WORKERS, write_part
from bench.neuron import DEGREE
checkpoint = open_checkpoint(Path(sys.argv[1]), ("transformer",))
parts = checkpoint.model.list_split_parts(checkpoint.configs, "block", "kl")
def shard(part, slots):
    bindings = [bind_shard(part, slots, checkpoint, DEGREE, rank) for rank in range(DEGREE)]
    return write_part(slots, bindings, checkpoint, Path(sys.argv[2]))
started = time.perf_counter()
parts = [part for part in parts if part.component == "transformer"]
slots = [split_slots(checkpoint.model, part, checkpoint.configs, DEGREE) for part in parts]
with ThreadPoolExecutor(WORKERS) as pool:
    files = [file for written in pool.map(shard, parts, slots) for file in written]
print(json.dumps({"seconds": time.perf_counter() - started, "bytes": sum(file.nbytes for file in files),
                  "of_rank_0": sum(file.nbytes for file in files if file.rank == 0)}))
"""


def measure() -> Figure:
    WORK.mkdir(parents=True, exist_ok=True)
    rows = []
    for granularity in ("block", "whole"):
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            made = run([sys.executable, "-c", _LOWER, folder, granularity])
        found = made.document()
        what = f"{found['modules']} modules, {found['reduces']} all-reduces and {found['gathers']} all-gather a step"
        rows.append((f"lowering, granularity {granularity}", what, f"{made.seconds:.1f} s", "", _peak(made)))
    root = resolve_model(MODEL, WORK / "models", components=("transformer",))
    refs = tuple(open_checkpoint(root, ("transformer",)).tensors["transformer"].values())
    with tempfile.TemporaryDirectory(dir=WORK) as folder:
        for ref in refs:
            drop_from_cache(ref.file)
        made = run([sys.executable, "-c", _SHARD, str(root), str(Path(folder) / "shards")])
        shutil.rmtree(Path(folder) / "shards")
        plain = copy_durably(refs, Path(folder) / "plain")
    shutil.rmtree(root)
    found = made.document()
    what = f"{gigabytes(found['bytes'])} in 8 ranks of 59 parts, {gigabytes(found['of_rank_0'])} on rank 0"
    rows.append(
        ("sharding the transformer", what, f"{found['seconds']:.0f} s", ratio(found["seconds"], plain), _peak(made))
    )
    rows.append(("plain copy", gigabytes(sum(ref.nbytes for ref in refs)), f"{plain:.0f} s", "1.00", ""))
    return Figure(
        f"{MODEL} for trn1, tp {DEGREE}, {SIZE[0]}x{SIZE[1]}, {TOKENS} tokens",
        ("", "what", "wall", "ratio", "peak memory"),
        tuple(rows),
        (
            "One process each. Lowering: from start to end, imports included, from shapes alone. Sharding: every file "
            "hashed while it is written and synchronised to the disk; the copy reads the same byte ranges and writes "
            "them to one file, synchronised at its end. Neither finds the checkpoint in the page cache by intent. Aim: "
            "15 s and 2 GB; 1.5 times a copy and 1.5 GB.",
        ),
    )


def copy_durably(refs: tuple[TensorRef, ...], target: Path) -> float:
    """Seconds of reading these tensors, writing them to a file, and having it on the disk; the file is removed."""
    for ref in refs:
        drop_from_cache(ref.file)
    started = time.perf_counter()
    with target.open("wb", buffering=0) as file:
        for ref in sorted(refs, key=lambda ref: (ref.file, ref.offset)):
            with ref.file.open("rb", buffering=0) as source:
                source.seek(ref.offset)
                for start in range(0, ref.nbytes, BLOCK):
                    file.write(source.read(min(BLOCK, ref.nbytes - start)))
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def _peak(made: Run) -> str:
    return gigabytes(made.peak_bytes)
