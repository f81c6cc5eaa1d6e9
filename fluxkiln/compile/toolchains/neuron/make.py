"""A model cut over cores: shards, modules, and the compiler.

Where the compiler is missing the bundle is written without compiled modules, with a script that makes them on a machine
that has it.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.jobs import JobPool
from fluxkiln.compile.plan import Binary, BundleFile, Made, Plan
from fluxkiln.compile.toolchains.neuron.compilation import compile_kinds, take_finished, write_compile_script
from fluxkiln.compile.toolchains.neuron.modules import Module, lay_out_jobs, lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.neff import SCRIPT, ModuleJob, Neff, hlo_file, neff_path, record_path
from fluxkiln.compile.toolchains.neuron.split import shard_file, shard_weights
from fluxkiln.compile.toolchains.neuron.split_bundle import DESCRIPTION, describe
from fluxkiln.digests import digest_json
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, Shapes


@dataclass(frozen=True, slots=True)
class SplitModel:
    """What was made at `shapes`: modules by name, part -> the weights of its ranks, and compiled modules if any."""

    shapes: Shapes
    modules: Mapping[str, Module]
    shards: Mapping[str, tuple[Blob, ...]]
    neffs: tuple[Neff, ...] = ()


def make(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
) -> Made:
    """Lower, shard, compile. Errors as `compile_kinds`."""
    work, store = plan.folder / "work", cache.store
    modules = lower_modules(checkpoint, plan, cache, progress)
    laps.lap("lower")
    shards = shard_weights(checkpoint, plan, cache, progress, settings.jobs)
    laps.lap("shard")
    shutil.rmtree(work, ignore_errors=True)
    jobs = lay_out_jobs(cache, modules, work)
    script = write_compile_script(work, jobs, plan.target, settings.flags)
    neffs = _compile(plan, cache, settings, jobs, work, progress)
    laps.lap("compile")
    files = [BundleFile(SCRIPT, store.add_file(script))]
    for name, module in modules.items():
        members = tuple(part.name for part in plan.parts if module_name(part) == name)
        files.append(BundleFile(hlo_file(name), module.blob, members))
    for part, blobs in shards.items():
        files += [BundleFile(shard_file(part, rank), blob) for rank, blob in enumerate(blobs)]
    for neff in neffs:
        for path in (neff_path(work, neff.name), record_path(work, neff.name)):
            files.append(BundleFile(f"neff/{path.name}", store.add_file(path)))
    description = describe(checkpoint, plan, settings, modules, shards)
    files.append(BundleFile(DESCRIPTION, store.add_bytes(description)))
    binaries = tuple(_binary(plan, part, modules[module_name(part)], shards[part.name]) for part in plan.parts)
    missing = "" if neffs else plan.layout.missing
    return Made(binaries, tuple(files), missing, SplitModel(plan.shapes, modules, shards, neffs))


def _compile(
    plan: Plan, cache: ActionCache, settings: Settings, jobs: Sequence[ModuleJob], work: Path, progress: Progress
) -> tuple[Neff, ...]:
    """The compiled modules; none where there is no compiler and not all were compiled elsewhere."""
    compiler = plan.layout.compiler
    # what the script of an earlier bundle compiled there; whether it is what is asked for is judged next
    bundled = plan.folder / "bundle" / "neff"
    if bundled.is_dir():
        shutil.copytree(bundled, work / "neff", symlinks=True, dirs_exist_ok=True)
    if compiler is None:
        return take_finished(work, jobs, plan.target, settings.flags) or ()
    with JobPool[Neff](settings.jobs) as pool:
        return compile_kinds(pool, jobs, compiler, plan.target, cache, work, settings.flags, progress)


def _binary(plan: Plan, part: Part, module: Module, shards: Sequence[Blob]) -> Binary:
    facts = {
        **{side: [[name, dtype, shape] for name, shape, dtype in module.facts[side]] for side in ("inputs", "outputs")},
        "weight_bytes": shards[0].size,
        "instruction_bytes": 0,
        "runtime_bytes": 0,
    }
    digest = digest_json({"hlo": module.digest, "shards": [blob.digest for blob in shards]})
    size = sum(blob.size for blob in shards)
    return Binary(part, part.name, plan.scheme(part), facts, "sharded", digest=digest, size=size)
