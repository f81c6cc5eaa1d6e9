"""full-dev (all of FLUX.1-dev) for bm1684x, one component after the other: cold, and with moulds but no compiler."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from bench.figure import ROOT, WORK, Figure, Run, fluxkiln, gigabytes, ratio, run
from fluxkiln.export.checkpoint import open_checkpoint
from fluxkiln.export.source import resolve_model
from fluxkiln.patches.flux1.model import MODEL as FLUX1
from fluxkiln.types import TensorRef

# rounded as the compiler rounds: what it is compared with does no better
MODEL, SIZE, TOKENS, SCHEME = "full-dev", "1024x1024", "512", "W4BF16-rtn"
BLOCK = 8 << 20
NO_COMPILER = {"FLUXKILN_TPU_MLIR": "/nonexistent"}


def measure() -> Figure:
    rows = []
    for component in reversed(FLUX1.components):
        root = resolve_model(MODEL, WORK / "models", components=(component,))
        with tempfile.TemporaryDirectory(dir=WORK) as folder:
            place = Path(folder)
            refs = open_checkpoint(root, (component,)).tensors[component].values()
            cold, written = build_cold(component, place, place / "moulds.tar")
            warm = build_from_moulds(component, place, place / "moulds.tar")
            plain = copy_plainly(refs, written, place / "plain")
        shutil.rmtree(root)
        rows.append(row(component, sum(ref.nbytes for ref in refs), written, cold, warm, plain))
    return Figure(
        f"{MODEL}, {SCHEME}, {SIZE}, {TOKENS} tokens",
        (
            "component", "weights in", "bmodel", "cold", "peak", "compiler runs", "with moulds", "peak ",
            "of which cast", "plain copy", "cast / plain copy",
        ),
        tuple(rows),
        (
            "`fluxkiln build bm1684x --no-verify --components NAME`, the checkpoint there already and not in the page "
            "cache by intent. Cold: an empty store. With moulds: a new store into which the moulds of the cold build "
            "were imported, and no TPU-MLIR environment. Both read and hash the checkpoint first, then cast, hash the "
            "file and put it into the bundle.",
            "Plain copy: the same byte ranges of the checkpoint read, and as many bytes as the bmodel has written to a "
            f"file, in blocks of {BLOCK >> 20} MiB, in the same run.",
        ),
    )  # fmt: skip


def build_cold(component: str, folder: Path, moulds: Path, tree: Path = ROOT) -> tuple[Run, int]:
    """A component built from nothing with the package in `tree`, its moulds exported; and its bmodels' bytes."""
    cold = build(component, folder / "cold", tree=tree)
    run(fluxkiln("mould", "export", str(moulds), "--store", str(folder / "cold" / "store"), "--json"), folder=tree)
    written = sum(path.stat().st_size for path in Path(cold.document()["bundle"]).glob("*.bmodel"))
    shutil.rmtree(folder / "cold")
    return cold, written


def build_from_moulds(component: str, folder: Path, moulds: Path, tree: Path = ROOT) -> Run:
    """The same with its moulds in a new store, and no compiler."""
    run(fluxkiln("mould", "import", str(moulds), "--store", str(folder / "warm" / "store"), "--json"), folder=tree)
    warm = build(component, folder / "warm", NO_COMPILER, tree)
    shutil.rmtree(folder / "warm")
    if warm.document()["compiler_runs"]:
        raise RuntimeError(f"{component}: the compiler ran although there were moulds")
    return warm


def build(
    component: str, folder: Path, environ: dict[str, str] | None = None, tree: Path = ROOT, more: Sequence[str] = ()
) -> Run:
    """One build of one component in a folder of its own; of options that come twice, those of `more` count."""
    arguments = ["--model", MODEL, "--scheme", SCHEME, "--size", SIZE, "--tokens", TOKENS, "--components", component]
    # the checkpoint is shared, the store is not
    folder.mkdir(exist_ok=True)
    (folder / "models").symlink_to(WORK / "models")
    folders = ["--build-dir", str(folder), "--store", str(folder / "store")]
    return run(fluxkiln("build", "bm1684x", *arguments, "--no-verify", *folders, *more, "--json"), environ, tree)


def copy_plainly(refs: Iterable[TensorRef], written: int, target: Path) -> float:
    """Seconds of reading these tensors and writing so many bytes; the target is removed."""
    for ref in refs:
        drop_from_cache(ref.file)
    started = time.perf_counter()
    left = written
    with target.open("wb", buffering=0) as file:
        for ref in sorted(refs, key=lambda ref: (ref.file, ref.offset)):
            with ref.file.open("rb", buffering=0) as source:
                source.seek(ref.offset)
                for start in range(0, ref.nbytes, BLOCK):
                    block = source.read(min(BLOCK, ref.nbytes - start))
                    if left:
                        left -= file.write(block[: min(left, len(block))])
    seconds = time.perf_counter() - started
    target.unlink()
    return seconds


def drop_from_cache(file: Path) -> None:
    """Let the kernel forget a file's pages, so that reading it is reading the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)


def row(component: str, read: int, written: int, cold: Run, warm: Run, plain: float) -> tuple[str, ...]:
    """A line of the table."""
    casting = float(warm.document()["timings"]["cast"])
    return (
        component,
        gigabytes(read),
        gigabytes(written),
        f"{cold.seconds:.0f} s",
        gigabytes(cold.peak_bytes),
        str(cold.document()["compiler_runs"]),
        f"{warm.seconds:.0f} s",
        gigabytes(warm.peak_bytes),
        f"{casting:.0f} s",
        f"{plain:.0f} s",
        ratio(casting, plain),
    )
