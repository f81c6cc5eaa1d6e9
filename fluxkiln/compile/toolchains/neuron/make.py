"""A build for a target that cuts the model over cores: shards, modules, their execution, and the compiler.

Everything up to the compiler's call is done and verified first. Where the compiler is missing the bundle is written
without compiled modules, with a script that makes them on a machine that has it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.store import Blob
from fluxkiln.build.finish import HOST_CONSTANTS, finish_bundle
from fluxkiln.compile.plan import Binary, BundleFile
from fluxkiln.compile.templates import SHARDED, host_constants
from fluxkiln.compile.toolchains.neuron.compilation import compile_kinds, take_finished, write_compile_script
from fluxkiln.compile.toolchains.neuron.modules import Module, compile_jobs, lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.neff import HLO_SUFFIX, SCRIPT, CompileJob, Neff, neff_path, record_path
from fluxkiln.compile.toolchains.neuron.neuronx_cc import compiler_missing, find_neuronx_cc
from fluxkiln.compile.toolchains.neuron.roofline import report_split
from fluxkiln.compile.toolchains.neuron.rungs import verify_split
from fluxkiln.compile.toolchains.neuron.split import (
    plan_memory,
    shard_file,
    shard_weights,
    split_settings,
)
from fluxkiln.compile.toolchains.neuron.split_bundle import DESCRIPTION, SCHEMA
from fluxkiln.errors import ToolchainError
from fluxkiln.progress import Laps, Progress
from fluxkiln.types import Part

if TYPE_CHECKING:
    from fluxkiln.build.context import Prepared
    from fluxkiln.build.make import BuildResult


def build_split(prepared: Prepared, progress: Progress, laps: Laps) -> BuildResult:
    """Lower, shard, compile, verify, bundle.

    Raises:
        ToolchainError: there is no compiler; all the rest is finished and in the bundle. Others as `build.build`.
    """
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    settings, work = prepared.settings, prepared.folder / "work"
    modules = lower_modules(checkpoint, plan, cache, progress)
    laps.lap("lower")
    shards = shard_weights(checkpoint, plan, cache, progress, settings.jobs)
    laps.lap("shard")
    shutil.rmtree(work, ignore_errors=True)
    jobs = compile_jobs(cache, modules, work)
    script = write_compile_script(work, jobs, plan.target, settings.flags)
    neffs, missing = _compile(prepared, jobs, work, progress)
    laps.lap("compile")
    store = cache.store
    files = [BundleFile(SCRIPT, store.add_file(script), ())]
    for name, module in modules.items():
        members = tuple(part.name for part in plan.parts if module_name(part) == name)
        files.append(BundleFile(hlo_file(name), module.blob, members))
    for part, blobs in shards.items():
        files += [BundleFile(shard_file(part, rank), blob, ()) for rank, blob in enumerate(blobs)]
    for neff in neffs:
        for path in (neff_path(work, neff.name), record_path(work, neff.name)):
            files.append(BundleFile(f"neff/{path.name}", store.add_file(path), ()))
    description = describe_split(prepared, modules, shards)
    files.append(BundleFile(DESCRIPTION, store.add_bytes(json.dumps(description, indent=1).encode() + b"\n"), ()))
    binaries = tuple(_binary(part, modules, shards) for part in plan.parts)
    result = finish_bundle(
        prepared, binaries, tuple(files), {}, progress, laps,
        lambda recording: verify_split(checkpoint, plan, cache, settings, modules, shards, recording, progress),
        report_split(plan, modules, plan_memory(checkpoint, plan), neffs), str(missing or ""),
    )  # fmt: skip
    if missing is not None:
        raise compiler_missing(missing, prepared.bundle)
    return result


def hlo_file(name: str) -> str:
    """The path of a module in a bundle."""
    return f"hlo/{name}{HLO_SUFFIX}"


def describe_split(
    prepared: Prepared, modules: Mapping[str, Module], shards: Mapping[str, Sequence[Blob]]
) -> dict[str, Any]:
    """`neuron.json`: modules with their parameters in order, parts in the order they run with the shards of each rank.

    A module's parameters are `inputs` and then `slots`, its result is a tuple of `outputs`. Rank r of a part runs its
    module with the tensors of `shards[r]`, which lie there in the order of `slots`.
    """
    checkpoint, plan = prepared.checkpoint, prepared.plan
    return {
        "schema": SCHEMA,
        **split_settings(prepared),
        "target": plan.target.name,
        "modules": {
            name: {
                "kind": module.kind,
                "ranks": module.ranks,
                "hlo": hlo_file(name),
                "digest": module.blob.digest,
                "neff": f"neff/{name}.neff",
                **{side: module.facts[side] for side in ("inputs", "slots", "outputs")},
                "collectives": {
                    opcode: len(module.facts[f"{opcode.replace('-', '_')}_bytes"])
                    for opcode in ("all-reduce", "all-gather")
                },
            }
            for name, module in modules.items()
        },
        "parts": [
            {
                "name": part.name,
                "module": module_name(part),
                "shards": [
                    {"file": shard_file(part.name, rank), "digest": blob.digest, "size": blob.size}
                    for rank, blob in enumerate(shards[part.name])
                ],
            }
            for part in plan.parts
        ],
        "modulation_rows": checkpoint.model.modulation_rows(checkpoint.configs),
        "host_constants": {"file": HOST_CONSTANTS, "names": sorted(host_constants(checkpoint, plan))},
    }


def _compile(
    prepared: Prepared, jobs: Sequence[CompileJob], work: Path, progress: Progress
) -> tuple[tuple[Neff, ...], ToolchainError | None]:
    """The compiled modules, or why there are none."""
    plan, cache, settings = prepared.plan, prepared.cache, prepared.settings
    try:
        compiler = find_neuronx_cc()
    except ToolchainError as error:
        _take_over(prepared.bundle, work)
        taken = take_finished(work, jobs, plan.target, settings.flags)
        return (taken, None) if taken is not None else ((), error)
    _take_over(prepared.bundle, work)
    return compile_kinds(
        jobs, compiler, plan.target, cache, work, plan.logs, preset=settings.flags, workers=settings.jobs,
        progress=progress,
    ), None  # fmt: skip


def _take_over(bundle: Path, work: Path) -> None:
    """What the script of an earlier bundle compiled there; whether it is what is asked for is judged later."""
    if (bundle / "neff").is_dir():
        shutil.copytree(bundle / "neff", work / "neff", symlinks=True, dirs_exist_ok=True)


def _binary(part: Part, modules: Mapping[str, Module], shards: Mapping[str, Sequence[Blob]]) -> Binary:
    from fluxkiln.digests import digest_json
    from fluxkiln.quantize.schemes import parse_scheme

    module, blobs = modules[module_name(part)], shards[part.name]
    facts = {
        **{side: [[name, dtype, shape] for name, shape, dtype in module.facts[side]] for side in ("inputs", "outputs")},
        "weight_bytes": blobs[0].size,
        "instruction_bytes": 0,
        "runtime_bytes": 0,
    }
    digest = digest_json({"hlo": module.blob.digest, "shards": [blob.digest for blob in blobs]})
    size = sum(blob.size for blob in blobs)
    return Binary(part, part.name, parse_scheme("BF16"), facts, SHARDED, digest=digest, size=size)
