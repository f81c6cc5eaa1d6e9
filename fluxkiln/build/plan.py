"""What a build will do, without doing it: its jobs, their memory, which of them the store has, and the disk it takes.

Nothing is traced. Where a template is in the store its keys are the build's own; where it is not, sizes come from the
shapes of the checkpoint's tensors, and everything that follows from the template has yet to be made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.build.budget import replayed_shapes
from fluxkiln.build.durations import SOURCE, estimate_seconds, jobs_of_second_size
from fluxkiln.compile.plan import Job, Plan
from fluxkiln.compile.process import available_memory
from fluxkiln.compile.templates import count_elements
from fluxkiln.compile.tensors import part_bytes, part_refs, stored_bytes
from fluxkiln.compile.toolchain import TRACE_MEMORY, toolchain_of
from fluxkiln.errors import ResourceError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings

if TYPE_CHECKING:
    from fluxkiln.build.prepared import Prepared

# What is in a bundle besides binaries: tokenizers, configs, host constants; and the report.
SMALL_FILES = 20 << 20
# of `Toolchain.devices`: nothing but the weights is known
ORIGIN_UNKNOWN = "weights"
# The chip's kernel module, which every bmodel brings along whatever its weights.
KERNEL_BYTES = 6 << 20


@dataclass(frozen=True, slots=True)
class BuildForm:
    """One of the forms that a build may have: which VAE and modulation, and the build; or why there is none."""

    vae: str
    modulation: str
    prepared: Prepared | None
    why: str = ""


def plan_build(prepared: Prepared, forms: Iterable[BuildForm] = (), download: int = 0) -> dict[str, Any]:
    """What a build needs and takes, as plain JSON.

    Args:
        forms: of it, its own among them. download: bytes of a checkpoint that is not on this machine.

    Returns:
        `jobs` in the order of their stages; `totals`: how many, how many to do, estimates for these of peak memory and
        disk; `seconds`: as `durations.estimate_seconds`, and their `source`; `devices`: what every file takes on its
        device (see `Toolchain.devices`); `further`: what each further size adds to the sizes before it; `forms`: the
        same in short of each form; `refused`: why a build would not start.
    """
    jobs = list_jobs(prepared)
    todo = [job for job in jobs if not job.in_store]
    return {
        "name": prepared.name,
        "target": prepared.plan.target.name,
        "scheme": (prepared.settings.scheme or prepared.plan.target.schemes[0]),
        "shapes": asdict(prepared.plan.shapes),
        "jobs": [job.to_json() for job in jobs],
        "totals": {
            "jobs": len(jobs),
            "to_do": len(todo),
            "memory_peak_bytes": peak_memory(todo, prepared.settings),
            "disk_bytes": disk_bytes(prepared, todo),
            "second_size_bytes": _second_size_bytes(prepared, jobs),
            "download_bytes": download,
        },
        "seconds": {**estimate_seconds(prepared, jobs), "source": SOURCE, "workers": _workers(prepared.settings)},
        "devices": _devices(prepared),
        "further": _further(prepared),
        "forms": [_form(form) for form in forms],
        "refused": refusal(prepared),
    }


def _further(prepared: Prepared) -> list[dict[str, Any]]:
    """Label of each further size, and what the build takes more than that of the sizes before it: `seconds` to make,
    `disk_bytes` to write, `device_bytes` of all files, None where that is not known."""
    plan, told = prepared.plan, list[dict[str, Any]]()
    before: dict[str, Any] = {}
    for count in range(1, len(plan.sizes) + 1 if plan.further else 1):
        one = replace(prepared, plan=plan.first(count))
        jobs, shapes = list_jobs(one), one.plan.sizes[-1]
        alone = _devices(replace(prepared, plan=plan.at(shapes)))
        now = {
            "seconds": estimate_seconds(one, jobs)["cold"],
            "disk_bytes": disk_bytes(one, [job for job in jobs if job.stage not in ("record", "verify")]),
            "device_bytes": sum(file["total"] for file in _devices(one).get("files", ())),
        }
        if before:
            more = {name: value - before[name] for name, value in now.items()}
            unknown = {"device_bytes": None} if alone.get("origin", ORIGIN_UNKNOWN) == ORIGIN_UNKNOWN else {}
            told.append({"size": shapes.label, **more, **unknown})
        before = now
    return told


def _second_size_bytes(prepared: Prepared, jobs: list[Job]) -> int:
    from fluxkiln.build.prepared import unwritten_bytes

    second = jobs_of_second_size(prepared, jobs)
    if toolchain_of(prepared.plan.target).many_sizes:
        return disk_bytes(prepared, [*jobs, *second]) - disk_bytes(prepared, jobs)
    written = disk_bytes(prepared, second)
    return written - unwritten_bytes(prepared.settings) if written else 0  # the checkpoint is there then


def _devices(prepared: Prepared) -> dict[str, Any]:
    return toolchain_of(prepared.plan.target).devices(prepared.checkpoint, prepared.plan, prepared.cache)


def _form(form: BuildForm) -> dict[str, Any]:
    """VAE and modulation; the peak of the fullest device while it is loaded as it has to be, and the estimate."""
    told: dict[str, Any] = {"vae": form.vae, "modulation": form.modulation, "why": form.why}
    if form.prepared is not None and (devices := _devices(form.prepared)):
        told |= {"load": devices["load"], "peak": max(devices["peaks"][devices["closest"]])}
        told |= {"origin": devices["origin"], "estimate": devices.get("estimate")}
    return told


def refusal(prepared: Prepared) -> str:
    """Why a build would not start; empty where it would."""
    try:
        check_resources(prepared)
    except ResourceError as error:
        return str(error)
    return ""


def list_jobs(prepared: Prepared) -> list[Job]:
    """All jobs of a build."""
    from fluxkiln.build.finish import build_action

    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    toolchain = toolchain_of(plan.target)
    jobs = toolchain.jobs(checkpoint, plan, cache, prepared.settings)
    finished = cache.lookup(build_action(prepared).key) is not None
    parts = plan.at(plan.shapes).parts
    weights = count_elements(ref for part in parts for ref in part_refs(checkpoint, plan, part))
    if prepared.settings.verify:
        largest = max(count_elements(part_refs(checkpoint, plan, part)) for part in plan.parts)
        if toolchain.largest_part:  # the reference runs block by block, and larger parts are not executed
            largest = min(largest, toolchain.largest_part // 4)
        # one part's weights in float32, and the next one's
        jobs.append(Job("record", "reference run", "", "F32", TRACE_MEMORY + 8 * largest, finished, weights))
        jobs.append(Job("verify", "parity ladder", "", "", 2 * TRACE_MEMORY + 8 * largest, finished, weights))
    jobs.append(Job("bundle", prepared.name, "", "", 0, finished, weights))
    return jobs


def check_resources(prepared: Prepared) -> None:
    """Raise ResourceError for a build that the devices, the disk or the memory cannot hold, before it starts."""
    toolchain_of(prepared.plan.target).check(prepared.checkpoint, prepared.plan, prepared.cache)
    jobs = [job for job in list_jobs(prepared) if not job.in_store]
    check_disk(prepared, jobs)
    if not jobs:
        return
    largest = max(jobs, key=lambda job: job.memory_bytes)
    needed, free = TRACE_MEMORY + largest.memory_bytes, available_memory()
    if free < needed:  # even when it runs alone
        raise ResourceError(
            f"{free / 1e9:.1f} GB of memory are available, the smallest that works for this build is "
            f"{needed / 1e9:.1f} GB ({largest.stage} {largest.what}, alone); close other programs, choose a smaller "
            "SIZE, or use a machine with more. Nothing was started"
        )


def check_disk(prepared: Prepared, todo: Iterable[Job]) -> None:
    """Raise ResourceError when fewer bytes are free than these jobs are estimated to write."""
    needed, places = disk_bytes(prepared, todo), _places(prepared)
    free, place = min((free_bytes(place), place) for place in places)
    # On two file systems each gets less than all of it; how much is not worth a second estimate.
    share = needed if _one_disk(prepared) else needed // 2
    if free < share:
        raise ResourceError(
            f"{place}: {free / 1e9:.2f} GB are free, this build needs about {share / 1e9:.2f} GB; make "
            "room, or name folders on a larger disk (--build-dir, --store). Nothing was started"
        )


def _places(prepared: Prepared) -> tuple[Path, Path]:
    """Where a build writes: its folder and the store, or what is there of them."""
    return _existing(prepared.plan.folder), _existing(prepared.cache.store.root)


def _one_disk(prepared: Prepared) -> bool:
    return len({place.stat().st_dev for place in _places(prepared)}) == 1


def free_bytes(place: Path) -> int:
    """Bytes that can be written where `place` is or will be."""
    return shutil.disk_usage(_existing(place)).free


def disk_bytes(prepared: Prepared, todo: Iterable[Job]) -> int:
    """About how many bytes these jobs write: into the store, the bundle, and working folders at their fullest."""
    from fluxkiln.build.prepared import unwritten_bytes

    checkpoint, plan, settings = prepared.checkpoint, prepared.plan, prepared.settings
    todo = list(todo)
    if not todo:
        return 0
    total, working = SMALL_FILES + unwritten_bytes(settings), [0]
    for job in todo:
        if job.stage in ("mould", "compile"):
            stored = stored_bytes(parse_scheme(job.scheme), job.weights)
            # Of a mould instructions and graphs are kept, of a compiled part its weights too, twice: the interpreter's
            # as well. A compile works on four float32 copies.
            total += KERNEL_BYTES + (2 * stored if job.stage == "compile" else 0)
            working.append(16 * job.weights)
        elif job.stage in ("cast", "shard"):
            total += stored_bytes(parse_scheme(job.scheme), job.weights)
        elif job.stage == "combine":
            total += KERNEL_BYTES
    binaries = sum(part_bytes(checkpoint, plan, part) for part in plan.at(plan.shapes).parts)
    stages = {job.stage for job in todo}
    # Graphs lie in the working folder and in the store; a bundle has links to bmodels where it can.
    total += 2 * binaries * ("link" in stages)
    if "link" in stages or not _one_disk(prepared):
        total += binaries * ("bundle" in stages)
    if "verify" in stages:
        if not toolchain_of(plan.target).any_shapes:
            # one part at a time: the weights of the interpreter, and those of a graph in float32
            working.append(8 * max(count_elements(part_refs(checkpoint, plan, part)) for part in plan.parts))
        shapes = replayed_shapes(checkpoint, plan)
        steps = prepared.steps if shapes == plan.shapes else 1
        total += recording_bytes(checkpoint, replace(plan, shapes=shapes), steps)
    return total + _most(working, settings)


def recording_bytes(checkpoint: Checkpoint, plan: Plan, steps: int) -> int:
    """About the bytes of a recorded run: what goes into each part, in float32; most outputs are another's input."""
    total, constants = 0, checkpoint.model.constant_inputs
    for part in plan.at(plan.shapes).parts:
        calls = steps if part.component == "transformer" else 1
        specs = checkpoint.model.part_inputs(part.kind, checkpoint.configs, plan.shapes)
        total += 4 * calls * count_elements(spec for spec in specs if spec.name not in constants)
    return 2 * total


def peak_memory(todo: Iterable[Job], settings: Settings) -> int:
    """The most that jobs hold at once, this process included; stages come one after the other."""
    pooled: list[int] = []
    alone = [0]
    for job in todo:
        (pooled if job.stage in ("mould", "compile", "cast", "shard") else alone).append(job.memory_bytes)
    return max(TRACE_MEMORY * bool(pooled) + _most(pooled, settings), *alone)


def _most(claims: list[int], settings: Settings) -> int:
    """The largest sum of as many claims as there are workers."""
    return sum(sorted(claims, reverse=True)[: _workers(settings)])


def _workers(settings: Settings) -> int:
    return settings.jobs or os.cpu_count() or 1


def _existing(place: Path) -> Path:
    while not place.exists():
        place = place.parent
    return place
