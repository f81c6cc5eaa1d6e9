"""A model cut over cores: made of shards, modules and what the compiler makes of these, completed, and reported.

Where the compiler is missing the bundle is written without compiled modules, with a script that makes them on a machine
that has it. `resume_compile` completes it there, without its checkpoint.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.intact import admit_manifest, read_manifest
from fluxkiln.artifacts.manifest import MANIFEST_FILE, FileEntry, Manifest, resolve_inside, role_of
from fluxkiln.artifacts.store import Blob, Store
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.plan import Binary, BundleFile, Made, Plan
from fluxkiln.compile.process import JobPool
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchain import Resumed
from fluxkiln.compile.toolchains.neuron.compilation import compile_kinds, write_compile_script
from fluxkiln.compile.toolchains.neuron.modules import Module, lay_out_jobs, lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.neff import (
    COMMAND,
    SCRIPT,
    ModuleJob,
    Neff,
    check_versions,
    hlo_file,
    neff_path,
    read_neffs,
    record_path,
)
from fluxkiln.compile.toolchains.neuron.neuronx_cc import compiler_missing, find_neuronx_cc
from fluxkiln.compile.toolchains.neuron.split import plan_memory, shard_file, shard_weights
from fluxkiln.compile.toolchains.neuron.split_bundle import DESCRIPTION, bundle_jobs, describe, read_split_bundle
from fluxkiln.digests import digest_json
from fluxkiln.errors import IntegrityError, ToolchainError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.files import build_lock, digest_file, write_durably
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, Shapes
from fluxkiln.verify.report.page import size

_LABEL = (
    "Counted in the modules that the compiler is given. The roofline is the least that arithmetic, reading the weights "
    "and moving the collectives' bytes can take at the published peaks of the instance, each part's largest of the "
    "three; no accelerator ran."
)
_ALL_REDUCE_PASSES = 2  # a ring moves every byte to all others twice: once to add, once to give the sum


@dataclass(frozen=True, slots=True)
class SplitModel:
    """What was made, at `shapes` first: modules by name, base of a part -> the weights of its ranks, and compiled
    modules if any."""

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
    binaries = tuple(_binary(plan, part, modules[module_name(part)], shards[part.base]) for part in plan.parts)
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
        found = read_neffs(work, jobs, plan.target, settings.flags)
        if len(found) != len(jobs):
            return ()
        check_versions(found)
        return tuple(found.values())
    with JobPool[Neff](settings.jobs) as pool:
        return compile_kinds(pool, jobs, compiler, plan.target, cache, work, settings.flags, progress)


def _binary(plan: Plan, part: Part, module: Module, shards: Sequence[Blob]) -> Binary:
    facts = {
        **{side: [[name, dtype, shape] for name, shape, dtype in module.facts[side]] for side in ("inputs", "outputs")},
        "weight_bytes": shards[0].size,
        "instruction_bytes": 0,
        "runtime_bytes": 0,
        "module": module.name,
    }
    digest = digest_json({"hlo": module.digest, "shards": [blob.digest for blob in shards]})
    held = sum(blob.size for blob in shards)
    return Binary(part, part.name, plan.scheme(part), facts, "sharded", digest=digest, size=held)


def resume_compile(bundle: Path, store: Store, progress: Progress, jobs: int | None = None) -> Resumed:
    """Compile the modules of a bundle that are not compiled yet, and name the results in its manifest.

    What `compile_neff.sh` left in the bundle is checked and taken over. The manifest is replaced last: killed before,
    the bundle is what it was, and the same call goes on.

    Raises:
        UsageError: no bundle of a split model. IntegrityError: a file of it was changed, or a compiled module is not
        what its record says. ToolchainError: no compiler, or modules of several versions. CompileError: it failed.
    """
    manifest = read_manifest(bundle)
    with build_lock(bundle.parent / f".{bundle.name}.resume.lock", f"the compile of {bundle}"):
        _check_files(bundle, manifest)
        split = read_split_bundle(bundle)
        target, wanted = find_target(split.target), bundle_jobs(split)
        found = read_neffs(bundle, wanted, target, split.flags)
        compiled: dict[str, Neff] = {}
        if missing := [job for job in wanted if job.name not in found]:
            try:
                compiler = find_neuronx_cc()
            except ToolchainError as error:
                raise compiler_missing(str(error), bundle) from None
            if found:
                check_versions(found, compiler.version)
            with JobPool[Neff](jobs) as pool:
                made = compile_kinds(pool, missing, compiler, target, ActionCache(store), bundle, split.flags, progress)
            compiled = {neff.name: neff for neff in made}
        version = check_versions({**found, **compiled})
        for log in (bundle / "neff").glob("*.log*"):  # of a failure that is mended now
            log.unlink()
        entries = {file.path: file for file in manifest.files if not file.path.startswith("neff/")}
        for path in (at(bundle, name) for name in split.modules for at in (neff_path, record_path)):
            digest, length = digest_file(path)
            label = path.relative_to(bundle).as_posix()
            entries[label] = FileEntry(label, role_of(label), digest.removeprefix("sha256:"), length)
        files = tuple(entries[label] for label in sorted(entries))
        completed = replace(manifest, files=files)
        admit_manifest(bundle, completed.digest)
        write_durably(bundle / MANIFEST_FILE, completed.to_bytes())
        open_bundle(bundle, progress, again=True)
    return Resumed(bundle, COMMAND, version, tuple(compiled), tuple(found))


def _check_files(bundle: Path, manifest: Manifest) -> None:
    """The modules and their description are what the manifest says; weights are not read for this."""
    for file in manifest.files:
        if file.path == DESCRIPTION or file.path.startswith("hlo/"):
            digest, _ = digest_file(resolve_inside(bundle, file.path))
            if digest != file.digest:
                raise IntegrityError(
                    f"{bundle / file.path} has the digest {digest}, the manifest says {file.digest}: it was changed; "
                    "build or fetch the bundle again"
                )


def report(checkpoint: Checkpoint, plan: Plan, made: Made) -> dict[str, Any]:
    """The report's facts `lowering` and `memory`."""
    own: SplitModel = made.own
    instance, degree = plan.layout.instance, plan.layout.degree
    modules, neffs, memory = own.modules, own.neffs, plan_memory(checkpoint, plan)
    first = plan.at(plan.shapes).parts
    step = [modules[module_name(part)] for part in first if part.component == "transformer"]
    reduces = [moved for module in step for moved in module.facts["all_reduce_bytes"]]
    gathers = [moved for module in step for moved in module.facts["all_gather_bytes"]]
    milliseconds = 1e3 * sum(_seconds(plan, module) for module in step)
    values = {
        "instance": instance.name,
        "tp_degree": degree,
        "modules": len(modules),
        "all_reduces": len(reduces),
        "all_gathers": len(gathers),
        "all_reduce_bytes": sum(reduces),
        "all_gather_bytes": sum(gathers),
        "core_bytes": memory.weight_bytes,
        "core_bytes_by_component": dict(memory.weights),
        "roofline_ms": milliseconds,
        "neffs": len(neffs),
    }
    entries = {
        "instance": f"{instance.name}, tp {degree}",
        "distinct compiles": f"{len(modules)}: {', '.join(modules)}",
        "collectives a step": f"{len(reduces)} all-reduce, {len(gathers)} all-gather",
        "bytes moved a step": f"{size(sum(reduces))} reduced, {size(sum(gathers))} gathered",
        **{f"{name} on a core": size(held) for name, held in memory.weights.items()},
        "all weights on a core": size(memory.weight_bytes),
        "roofline of a step": f"{milliseconds:,.3f} ms",
        "executed on": "XLA CPU replicas",
        "NEFF": f"{len(neffs)} compiled" if neffs else "not compiled here",
    }
    return {
        "lowering": {"label": _LABEL, "entries": entries, "values": values},
        "memory": {"each core": dict(memory.weights)},
    }


def _seconds(plan: Plan, module: Module) -> float:
    instance, others = plan.layout.instance, 1 - 1 / module.ranks
    facts = module.facts
    moved = others * (_ALL_REDUCE_PASSES * sum(facts["all_reduce_bytes"]) + sum(facts["all_gather_bytes"]))
    link = moved / instance.link_bandwidth if instance.link_bandwidth else 0.0
    return float(max(facts["flops"] / instance.core_flops, facts["parameter_bytes"] / instance.core_bandwidth, link))
