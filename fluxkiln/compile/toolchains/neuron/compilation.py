"""The Neuron compile stage: modules to NEFFs, several at once, through the store; or a script that does it where there
is the Neuron SDK and no fluxkiln.

What decides a NEFF is the module, the flags and the compiler's version, and these are the key under which it is stored:
one of another version is never found.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.process import JobPool
from fluxkiln.compile.targets import Target
from fluxkiln.compile.toolchains.neuron.neff import (
    COMMAND,
    RECORD_SCHEMA,
    SCRIPT,
    FlagPreset,
    ModuleJob,
    Neff,
    check_module,
    compile_flags,
    finished_neff,
    hlo_file,
    neff_path,
    record_path,
)
from fluxkiln.compile.toolchains.neuron.neuronx_cc import NeuronxCc, compile_module
from fluxkiln.digests import canonical_json
from fluxkiln.errors import UsageError
from fluxkiln.files import disk_full_named, partial_file, remove_unheld, rename_durably, write_durably
from fluxkiln.progress import FROM_STORE, Progress, Silent

# No code of ours is in the key: it cannot change what the compiler makes of a module.
_RECIPE = "neuronx-cc compile/1"


def neff_action(job: ModuleJob, target: Target, preset: FlagPreset, version: str) -> Action:
    """The key of a compiled module; names and paths are not in it, so equal modules are compiled once."""
    return Action(
        stage="neff",
        what=f"{job.name} {target.chip}",
        code_version=_RECIPE,
        inputs={"hlo": job.digest},
        settings={"target": target.chip, "flags": compile_flags(job.form, target, preset)},
        tools={COMMAND: version},
    )


def compile_kinds(
    pool: JobPool[Neff],
    jobs: Sequence[ModuleJob],
    compiler: NeuronxCc,
    target: Target,
    cache: ActionCache,
    folder: Path,
    preset: FlagPreset = "default",
    progress: Progress | None = None,
) -> tuple[Neff, ...]:
    """Compile every module, or take it from the store, into `folder/neff/<name>.neff`, each with its record.

    Files appear whole or not at all. After a kill or a failure the same call goes on: finished modules are in the
    store. What `compile_neff.sh` finished in `folder` with this compiler is taken over. Logs go to `logs` beside it.

    Args:
        pool: how many compilers run at once, and in how much memory; one that may take more runs alone.

    Raises:
        UsageError: two modules have one name.
        IntegrityError: a module is not the one that was lowered.
        CompileError: the compiler failed; with the log's telling lines, advice for its error codes, the log's place.
        ResourceError: it was killed for memory, or the disk is full.
    """
    progress, logs = progress or Silent(), folder.parent / "logs"
    _check_names(jobs)
    for job in jobs:
        check_module(job, job.hlo)
    logs.mkdir(parents=True, exist_ok=True)
    (folder / "neff").mkdir(parents=True, exist_ok=True)
    remove_unheld(folder / "neff")
    progress.stage("neff", len(jobs))
    futures = [
        pool.submit(
            f"the compile of {job.name}",
            min(job.memory, pool.budget),
            partial(_compile, job, compiler, target, preset, cache, folder, progress),
        )
        for job in jobs
    ]
    pool.wait()
    return tuple(future.result() for future in futures)


def _compile(
    job: ModuleJob,
    compiler: NeuronxCc,
    target: Target,
    preset: FlagPreset,
    cache: ActionCache,
    folder: Path,
    progress: Progress,
) -> Neff:
    started, logs = time.perf_counter(), folder.parent / "logs"
    flags = compile_flags(job.form, target, preset)
    how = "compiled"

    def produce(work: Path) -> tuple[Mapping[str, Path | Blob], dict[str, Any]]:
        nonlocal how
        found = finished_neff(job, flags, folder)
        if found is not None and found.compiler == compiler.version:
            how = f"taken over from {SCRIPT}"
            return {"neff": neff_path(folder, job.name)}, {}
        output = compile_module(job, compiler, target, preset, work, logs / f"{job.name}.log")
        return {"neff": output}, {}

    result = run_action(cache, neff_action(job, target, preset, compiler.version), produce)
    blob = result.outputs["neff"]
    cache.store.export(blob.digest, neff_path(folder, job.name), link=True)
    neff = Neff(job.name, job.digest, flags, compiler.version, blob.digest, result.hit)
    write_durably(record_path(folder, job.name), canonical_json(neff.to_json()) + b"\n")
    spent = f"{how} in {time.perf_counter() - started:.1f} s"
    progress.done("neff", job.name, FROM_STORE if result.hit else spent)
    return neff


def write_compile_script(
    folder: Path, jobs: Sequence[ModuleJob], target: Target, preset: FlagPreset = "default"
) -> Path:
    """Write `folder/compile_neff.sh`, which compiles the modules in `folder/hlo` to `folder/neff`; returns its path.

    It checks every module's sha256 first, keeps what this compiler version made of the same module with the same flags,
    and puts each finished file in its place by renaming, with the record that `read_neffs` reads.

    Raises:
        UsageError: a module lies elsewhere than in `folder/hlo`, or two have one name.
        ResourceError: the disk is full.
    """
    _check_names(jobs)
    checks, compiles = [], []
    for job in jobs:
        file, digest = hlo_file(job.name), job.digest.removeprefix("sha256:")
        if job.hlo.absolute() != (folder / file).absolute():
            raise UsageError(f"the module {job.hlo} must be {folder / file} to be compiled by {SCRIPT}")
        flags = compile_flags(job.form, target, preset)
        as_json = json.dumps(flags, separators=(",", ":"))
        checks.append(shlex.join(["check_module", file, digest]))
        compiles.append(shlex.join(["compile_module", job.name, file, digest, as_json, *flags]))
    text = Path(__file__).with_name(SCRIPT).read_text("utf-8")
    for mark, value in {
        "@TARGET@": target.chip,
        "@NAMES@": " ".join(job.name for job in jobs),
        "@COUNT@": str(len(jobs)),
        "@SCHEMA@": RECORD_SCHEMA,
        "@CHECKS@": "\n".join(checks),
        "@COMPILES@": "\n".join(compiles),
    }.items():
        text = text.replace(mark, value)
    path = folder / SCRIPT
    with disk_full_named(folder), partial_file(folder, f".{SCRIPT}") as (unfinished, stream):
        stream.write(text.encode())
        rename_durably(stream, unfinished, path, mode=0o755)
    return path


def _check_names(jobs: Sequence[ModuleJob]) -> None:
    names = [job.name for job in jobs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"two modules are called {twice}; files are named by it, each needs a name of its own")
