"""What a build will do, without doing it: its jobs, their memory, which of them the store has, and the disk it takes.

Nothing is traced. Where a template is in the store its keys are the build's own; where it is not, sizes come from the
shapes of the checkpoint's tensors, and everything that follows from the template has yet to be made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.build.budget import replayed_shapes
from fluxkiln.compile.jobs import available_memory
from fluxkiln.compile.plan import TRACE_MEMORY, Binary, Job, Plan
from fluxkiln.compile.templates import count_elements, find_template, net_name
from fluxkiln.compile.tensors import part_bytes, part_refs, search_memory, stored_bytes
from fluxkiln.compile.toolchain import find_toolchain
from fluxkiln.compile.toolchains.tpu_mlir.cast_file import CAST_MEMORY, combine_action, part_action
from fluxkiln.compile.toolchains.tpu_mlir.devices import group_parts, lay_files, plan_devices
from fluxkiln.compile.toolchains.tpu_mlir.moulds import (
    Mould,
    cast_part,
    compile_action,
    compile_memory,
    compile_part,
    find_mould,
)
from fluxkiln.compile.toolchains.tpu_mlir.proof import needs_proof, proof_part
from fluxkiln.errors import ResourceError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.settings import Settings
from fluxkiln.types import GraphFormat, Part, Template

if TYPE_CHECKING:
    from fluxkiln.build.context import Prepared

# 0.1 s of quantization per 50 million weights and 3 s of starting a compiler, measured on two cores
COMPILE_SECONDS, COMPILE_SECONDS_PER_WEIGHT = 3.0, 1e-7
CAST_SECONDS, CAST_SECONDS_PER_WEIGHT = 0.2, 4e-9
TRACE_SECONDS, RECORD_SECONDS, CALL_SECONDS = 1.5, 8.0, 1.0
# What is in a bundle besides binaries: tokenizers, configs, host constants; and the report.
SMALL_FILES = 20 << 20
# The chip's kernel module, which every bmodel brings along whatever its weights.
KERNEL_BYTES = 6 << 20


def plan_build(prepared: Prepared) -> dict[str, Any]:
    """Jobs in the order of their stages, and what they need in all, as plain JSON.

    `totals`: numbers of jobs and of those still to do, and estimates for these of peak memory, disk and seconds.
    `devices`: what every file takes on its device, by its weights alone where its moulds have yet to be made.
    `refused`: why a build would not start, or empty.
    """
    jobs = list_jobs(prepared)
    todo = [job for job in jobs if not job.in_store]
    return {
        "name": prepared.name,
        "target": prepared.plan.target.name,
        "jobs": [job.to_json() for job in jobs],
        "totals": {
            "jobs": len(jobs),
            "to_do": len(todo),
            "memory_peak_bytes": peak_memory(todo, prepared.settings),
            "disk_bytes": disk_bytes(prepared, todo),
            "seconds": round(estimate_seconds(prepared, todo)),
        },
        "devices": _devices(prepared.checkpoint, prepared.plan, prepared.cache),
        "refused": _refusal(prepared),
    }


def _devices(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> dict[str, Any]:
    if not plan.target.device_bytes or plan.layout is not None:
        return {}
    return lay_files(plan, group_parts(plan, _known_or_lightest(checkpoint, plan, cache))).to_json()


def _refusal(prepared: Prepared) -> str:
    try:
        check_resources(prepared)
    except ResourceError as error:
        return str(error)
    return ""


def list_jobs(prepared: Prepared) -> list[Job]:
    """All jobs of a build."""
    from fluxkiln.build.finish import build_action

    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    if plan.layout is not None:
        jobs = find_toolchain("neuron").jobs(checkpoint, plan, cache, prepared.settings)
    else:
        jobs = (
            compile_jobs(checkpoint, plan, cache, prepared.settings)
            if plan.target.toolchain == "tpu_mlir"
            else link_jobs(checkpoint, plan, cache)
        )
    finished = cache.lookup(build_action(prepared).key) is not None
    weights = count_elements(ref for part in plan.parts for ref in part_refs(checkpoint, plan, part))
    if prepared.settings.verify:
        largest = max(count_elements(part_refs(checkpoint, plan, part)) for part in plan.parts)
        if plan.layout is not None:  # the reference runs block by block, and larger parts are not executed
            largest = min(largest, find_toolchain("neuron").largest_part)
        # one part's weights in float32, and the next one's
        jobs.append(Job("record", "reference run", "", "F32", TRACE_MEMORY + 8 * largest, finished, weights))
        jobs.append(Job("verify", "parity ladder", "", "", 2 * TRACE_MEMORY + 8 * largest, finished, weights))
    jobs.append(Job("bundle", prepared.name, "", "", 0, finished, weights))
    return jobs


def link_jobs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> list[Job]:
    """Jobs of a target that runs the graphs as they are."""
    jobs = [template_job(checkpoint, plan, cache, kind, plan.target.graph_format) for kind in plan.kinds()]
    for part in plan.parts:
        weights = count_elements(part_refs(checkpoint, plan, part))
        # Linking is not a cached action: it takes the time of a copy.
        jobs.append(
            Job(
                "link",
                part.name,
                part.kind,
                plan.scheme(part).name,
                search_memory(checkpoint, plan, part) + CAST_MEMORY,
                False,
                weights,
            )
        )
    return jobs


def compile_jobs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
    """Jobs of a target with a compiler: templates, moulds, proofs, parts without a mould, combined shells, casts."""
    templates, made, cast = [], [], []
    known: list[Binary] = []
    for kind in plan.kinds():
        template = find_template(checkpoint, plan, cache, kind, plan.target.graph_format)
        templates.append(
            template_job(checkpoint, plan, cache, kind, plan.target.graph_format, known=template is not None)
        )
        parts = [part for part in plan.parts if part.kind == kind]
        weights = count_elements(template.slots if template else part_refs(checkpoint, plan, parts[0]))
        mould = find_mould(checkpoint, plan, cache, template) if template else None
        scheme, memory = plan.schemes[kind].name, compile_memory(weights)
        spent: Any = mould.result.facts.get("estimate_ms") if mould else None
        made.append(Job("mould", f"mould {kind}", kind, scheme, memory, mould is not None, weights, spent))
        if mould is not None and not mould.castable:
            made += [compile_job(checkpoint, plan, cache, part, template) for part in parts]
        elif settings.prove or needs_proof(cache, mould):
            made.append(compile_job(checkpoint, plan, cache, proof_part(parts, settings.seed), template))
        for part in parts:
            binary = _find_binary(checkpoint, plan, cache, part, template, mould)
            in_store = binary is not None and cache.lookup(part_action(checkpoint, plan, cache, binary).key) is not None
            cast.append(
                Job(
                    "cast",
                    part.name,
                    kind,
                    scheme,
                    search_memory(checkpoint, plan, part) + CAST_MEMORY,
                    in_store,
                    weights,
                )
            )
            known += [binary] if binary is not None else []
    return [*templates, *made, *_combine_jobs(plan, cache, known), *cast]


def _combine_jobs(plan: Plan, cache: ActionCache, known: list[Binary]) -> list[Job]:
    if len(known) == len(plan.parts):
        order = {part.name: index for index, part in enumerate(plan.parts)}
        groups = group_parts(plan, tuple(sorted(known, key=lambda binary: order[binary.part.name])))
        keys = {name: combine_action(plan, name, parts).key for name, parts in groups.items()}
        return [_combine_job(name, cache.lookup(key) is not None) for name, key in keys.items()]
    # Into how many files an unquantized transformer is cut depends on measured sizes.
    components = dict.fromkeys(part.component for part in plan.parts)
    return [_combine_job("vae_decoder.bmodel" if name == "vae" else f"{name}.bmodel") for name in components]


def _combine_job(name: str, known: bool = False) -> Job:
    return Job("combine", name, "", "", 0, known)


def _find_binary(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template | None, mould: Mould | None
) -> Binary | None:
    """What a part's binary is made of, if that is in the store."""
    if template is None or mould is None or not checkpoint.digests:
        return None
    if mould.castable:
        return cast_part(plan, part, mould)
    known = cache.lookup(compile_action(checkpoint, plan, cache, part, template).key) is not None
    return compile_part(checkpoint, plan, cache, part, template) if known else None


def template_job(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    kind: str,
    graph_format: GraphFormat,
    known: bool | None = None,
) -> Job:
    """The job that traces a kind."""
    if known is None:
        known = find_template(checkpoint, plan, cache, kind, graph_format) is not None
    return Job("template", f"{kind} {graph_format}", kind, "", TRACE_MEMORY, known)


def compile_job(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template | None) -> Job:
    """The job that compiles a part with its own weights."""
    weights = count_elements(template.slots if template else part_refs(checkpoint, plan, part))
    known = (
        template is not None
        and bool(checkpoint.digests)
        and cache.lookup(compile_action(checkpoint, plan, cache, part, template).key) is not None
    )
    return Job("compile", part.name, part.kind, plan.scheme(part).name, compile_memory(weights), known, weights)


def check_resources(prepared: Prepared) -> None:
    """Refuse a build that the devices, the disk or the memory cannot hold, before anything is started.

    Raises:
        ResourceError: which of them, what is there and what is needed.
    """
    check_devices(prepared.checkpoint, prepared.plan, prepared.cache)
    jobs = [job for job in list_jobs(prepared) if not job.in_store]
    check_disk(prepared, jobs)
    check_memory(jobs)


def check_devices(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
    """Refuse weights that no way of loading gets onto the devices; instructions and run-time memory come on top."""
    if plan.target.device_bytes and plan.layout is None:
        plan_devices(plan, group_parts(plan, _known_or_lightest(checkpoint, plan, cache)))


def _known_or_lightest(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> list[Binary]:
    """Every part with the facts of its mould, or with nothing but its weights."""
    moulds: dict[str, Mould | None] = {}
    for kind in plan.kinds():
        template = find_template(checkpoint, plan, cache, kind, plan.target.graph_format)
        moulds[kind] = find_mould(checkpoint, plan, cache, template) if template else None
    return [
        Binary(part, net_name(part), plan.scheme(part), mould.result.facts, "planned")
        if (mould := moulds[part.kind]) is not None
        else _lightest(checkpoint, plan, part)
        for part in plan.parts
    ]


def _lightest(checkpoint: Checkpoint, plan: Plan, part: Part) -> Binary:
    size = part_bytes(checkpoint, plan, part)
    facts = {"weight_bytes": size, "instruction_bytes": 0, "runtime_bytes": 0}
    return Binary(part, net_name(part), plan.scheme(part), facts, "planned")


def check_memory(todo: Iterable[Job]) -> None:
    """Refuse jobs the largest of which does not fit the memory even when it runs alone.

    Raises:
        ResourceError: with the smallest memory that works.
    """
    largest = max(todo, key=lambda job: job.memory_bytes, default=None)
    if largest is None:
        return
    needed, free = TRACE_MEMORY + largest.memory_bytes, available_memory()
    if free < needed:
        raise ResourceError(
            f"{free / 1e9:.1f} GB of memory are available, the smallest that works for this build is "
            f"{needed / 1e9:.1f} GB ({largest.stage} {largest.what}, alone); close other programs, choose a smaller "
            "SIZE, or use a machine with more. Nothing was started"
        )


def check_disk(prepared: Prepared, todo: Iterable[Job]) -> None:
    """Refuse a build that the disk has no room for.

    Raises:
        ResourceError: fewer bytes are free than the jobs still to do are estimated to write.
    """
    needed = disk_bytes(prepared, todo)
    # On two file systems each gets less than all of it; how much is not worth a second estimate.
    free, place = min((free_bytes(place), place) for place in places(prepared))
    share = needed if len({_existing(place).stat().st_dev for place in places(prepared)}) == 1 else needed // 2
    if free < share:
        raise ResourceError(
            f"{_existing(place)}: {free / 1e9:.2f} GB are free, this build needs about {share / 1e9:.2f} GB; make "
            "room, or name folders on a larger disk (--build-dir, --store). Nothing was started"
        )


def places(prepared: Prepared) -> tuple[Path, Path]:
    """Where a build writes: its folder and the store."""
    return prepared.folder, prepared.cache.store.root


def free_bytes(place: Path) -> int:
    """Bytes that can be written where `place` is or will be."""
    return shutil.disk_usage(_existing(place)).free


def disk_bytes(prepared: Prepared, todo: Iterable[Job]) -> int:
    """About how many bytes these jobs write: into the store, the bundle, and working folders at their fullest."""
    from fluxkiln.build.context import unwritten_bytes

    checkpoint, plan, settings = prepared.checkpoint, prepared.plan, prepared.settings
    todo = list(todo)
    if not todo:
        return 0
    total, working = SMALL_FILES + unwritten_bytes(settings), [0]
    for job in todo:
        if job.stage in ("mould", "compile"):
            stored = stored_bytes(plan.schemes[job.kind], job.weights)
            # Of a mould instructions and graphs are kept, of a compiled part its weights too, twice: the interpreter's
            # as well. A compile works on four float32 copies.
            total += KERNEL_BYTES + (2 * stored if job.stage == "compile" else 0)
            working.append(16 * job.weights)
        elif job.stage in ("cast", "shard"):
            total += stored_bytes(plan.schemes[job.kind], job.weights)
        elif job.stage == "combine":
            total += KERNEL_BYTES
    binaries = sum(part_bytes(checkpoint, plan, part) for part in plan.parts)
    stages = {job.stage for job in todo}
    # Graphs lie in the working folder and in the store; a bundle has links to bmodels where it can.
    total += 2 * binaries * ("link" in stages)
    if "link" in stages or len({_existing(place).stat().st_dev for place in places(prepared)}) > 1:
        total += binaries * ("bundle" in stages)
    if "verify" in stages:
        # one part at a time: the weights of the interpreter, and those of a graph in float32
        working.append(
            8 * max(count_elements(part_refs(checkpoint, plan, part)) for part in plan.parts) * (plan.layout is None)
        )
        shapes = replayed_shapes(checkpoint, plan)
        steps = settings.steps if shapes == plan.shapes else 1
        total += recording_bytes(checkpoint, replace(plan, shapes=shapes), steps)
    return total + _most(working, settings)


def recording_bytes(checkpoint: Checkpoint, plan: Plan, steps: int) -> int:
    """About the bytes of a recorded run: what goes into each part, in float32; most outputs are another's input."""
    total, constants = 0, checkpoint.model.constant_inputs
    for part in plan.parts:
        calls = steps if part.component == "transformer" else 1
        specs = checkpoint.model.part_inputs(part.kind, checkpoint.configs, plan.shapes)
        changing = [spec for spec in specs if spec.name not in constants]
        total += 4 * calls * count_elements(changing)
    return 2 * total


def peak_memory(todo: Iterable[Job], settings: Settings) -> int:
    """The most that jobs hold at once, this process included; stages come one after the other."""
    pooled: list[int] = []
    alone = [0]
    for job in todo:
        (pooled if job.stage in ("mould", "compile", "cast", "shard") else alone).append(job.memory_bytes)
    return max(TRACE_MEMORY * bool(pooled) + _most(pooled, settings), *alone)


def estimate_seconds(prepared: Prepared, todo: Iterable[Job]) -> float:
    """A guess from times measured on two cores."""
    settings, pooled, alone = prepared.settings, 0.0, 0.0
    for job in todo:
        if job.stage in ("mould", "compile"):
            pooled += COMPILE_SECONDS + COMPILE_SECONDS_PER_WEIGHT * job.weights
        elif job.stage in ("cast", "link", "shard"):
            pooled += CAST_SECONDS + CAST_SECONDS_PER_WEIGHT * job.weights
        elif job.stage in ("template", "lower"):
            alone += TRACE_SECONDS
        elif job.stage == "record":
            alone += RECORD_SECONDS
        elif job.stage == "verify":
            parts = prepared.plan.parts
            alone += CALL_SECONDS * sum(
                settings.steps if part.traits.component == "transformer" else 1 for part in parts
            )
    return alone + pooled / min(_workers(settings), 2)


def _most(claims: list[int], settings: Settings) -> int:
    """The largest sum of as many claims as there are workers."""
    return sum(sorted(claims, reverse=True)[: _workers(settings)])


def _workers(settings: Settings) -> int:
    return settings.jobs or os.cpu_count() or 1


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place
