"""How long about a build takes, from rates that were measured on two cores, for as many as are here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from fluxkiln.build.budget import LIMITS, replayed_shapes
from fluxkiln.compile.plan import Job
from fluxkiln.compile.tensors import multiplications
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Kind

if TYPE_CHECKING:
    from fluxkiln.build.prepared import Prepared

SOURCE = "rates measured on two cores of an AMD EPYC"
# Seconds of one core where nothing else is said, by `python -m bench full tiny quantize`. START is of the whole
# process: the interpreter, imports, checks.
START = 5.0
TRACE = {"onnx17": 0.5, "torchscript": 0.5, "onnx23": 1.0, "pt2": 1.0}
# of a compile that was not measured itself: `bench full`, `bench tiny`
COMPILE, COMPILE_PER_WEIGHT, COMPILE_PER_TOKEN = 2.0, 5.7e-8, 1.1e-3
CAST_PER_WEIGHT, BUNDLE_PER_WEIGHT = 3.4e-9, 2.9e-9
# to find codes by methods that search: `bench quantize`
SEARCH_PER_WEIGHT = {"ls": 4e-9, "mse": 4e-9, "svd": 3.3e-8, "awq": 9e-8, "gptq": 1.7e-7}
# multiplications a second of two cores, of diffusers' run and of a rung
RECORDED, REPLAYED = 5e10, 7e10


def estimate_seconds(prepared: Prepared, jobs: Iterable[Job]) -> dict[str, float | None]:
    """Seconds of a build, by what of it is there already.

    Returns:
        `now`, verification included: of the jobs that the store has not; `cold`: of all, `verify`: of those that
        compare, apart; `with_moulds`: of what is left where no compiler runs, None where there is none; `second_size`:
        of `jobs_of_second_size`.
    """
    jobs, toolchain = list(jobs), toolchain_of(prepared.plan.target)
    second = jobs_of_second_size(prepared, jobs)
    comparing = [job for job in jobs if job.stage in ("record", "verify")]
    making = [job for job in jobs if job not in comparing]
    casting = [job for job in making if job.stage not in (*toolchain.travelling, *toolchain.compiler_stages)]
    todo = [job for job in jobs if not job.in_store]
    return {
        "now": _sum(prepared, todo, START),
        "cold": _sum(prepared, making, START),
        "with_moulds": _sum(prepared, casting, START) if toolchain.travelling else None,
        "verify": _sum(prepared, comparing, 0.0),
        "second_size": _sum(prepared, [job for job in making if job in second], START),
    }


def jobs_of_second_size(prepared: Prepared, jobs: Iterable[Job]) -> list[Job]:
    """What one more size takes when this one is made: kinds that take the same inputs are there, and where a bundle may
    have several the weights are too, but for convolutions'.

    Nothing where no stage depends on inputs: such a bundle has no size.
    """
    several, kinds = toolchain_of(prepared.plan.target).many_sizes, prepared.checkpoint.model.kinds
    checkpoint, shapes = prepared.checkpoint, prepared.plan.shapes
    other, inputs = replace(shapes, width=shapes.width + 16), checkpoint.model.part_inputs
    shared = {
        kind for kind in prepared.plan.kinds()
        if inputs(kind, checkpoint.configs, shapes) == inputs(kind, checkpoint.configs, other)
    }  # fmt: skip
    sized = any(job.stage in _OF_KINDS for job in jobs)
    left = [job for job in jobs if sized and not (job.kind in shared and job.stage in _OF_KINDS)]
    if not several:
        return left
    return [job for job in left if job.stage not in ("cast", "link", "bundle") or _is_sized(kinds.get(job.kind))]


def _is_sized(kind: Kind | None) -> bool:
    """Whether compiled forms of a kind at two sizes have weights of their own."""
    return kind is not None and kind.convolutional


def _sum(prepared: Prepared, jobs: list[Job], start: float) -> float:
    workers = prepared.settings.jobs or os.cpu_count() or 1
    spread = sum(_ACROSS[job.stage](prepared, job) for job in jobs if job.stage in _ACROSS)
    alone = sum(_ALONE[job.stage](prepared, job) for job in jobs if job.stage in _ALONE)
    return round(start + alone + spread / workers, 1) if jobs else 0.0


def _compile(prepared: Prepared, job: Job) -> float:
    if job.seconds is not None:
        return job.seconds
    return COMPILE + COMPILE_PER_WEIGHT * job.weights + COMPILE_PER_TOKEN * prepared.plan.shapes.image_tokens


def _cast(prepared: Prepared, job: Job) -> float:
    scheme = parse_scheme(job.scheme)
    search = SEARCH_PER_WEIGHT.get(scheme.method, 0.0) if scheme.weight_bits else 0.0
    moved = 0.0 if job.stage == "link" else CAST_PER_WEIGHT
    return (moved + search) * job.weights


def _record(prepared: Prepared, _: Job) -> float:
    return _calculated(prepared) / RECORDED


def _verify(prepared: Prepared, _: Job) -> float:
    """Every rung calculates the same; behind it stands what a call of a part costs whatever its size."""
    plan, toolchain = prepared.plan, toolchain_of(prepared.plan.target)
    steps = _steps(prepared)
    calls = sum(steps if part.component == "transformer" else 1 for part in plan.at(plan.shapes).parts)
    # of a further size an image, and a part of each kind
    calls *= 1 + len(plan.further)
    rungs = 3 + len(toolchain.rungs)
    executed = 0.0
    if not _is_whole(prepared):  # some blocks in full: by the reference, in float32, and as they were compiled
        blocks = [part for part in plan.parts if part.traits.is_block]
        kinds = len({part.kind for part in blocks})
        each = multiplications(prepared.checkpoint, plan.shapes) / max(len(blocks), 1)
        executed = 3 * LIMITS.blocks * kinds * each / REPLAYED
    traced = 0.0 if plan.target.graph_format == "onnx23" else TRACE["onnx23"] * len(plan.kinds())
    return executed + traced + toolchain.call_seconds * calls + rungs * _calculated(prepared) / REPLAYED


def _calculated(prepared: Prepared) -> float:
    shapes = replayed_shapes(prepared.checkpoint, prepared.plan)
    return multiplications(prepared.checkpoint, shapes) * _steps(prepared)


def _steps(prepared: Prepared) -> int:
    return prepared.steps if _is_whole(prepared) else 1


def _is_whole(prepared: Prepared) -> bool:
    """Whether it is replayed at its own shapes; else it is at smaller ones, for one step."""
    return replayed_shapes(prepared.checkpoint, prepared.plan) == prepared.plan.shapes


# whose results depend on a kind and its inputs, or are one part compiled for them
_OF_KINDS = ("template", "lower", "mould", "compile")
_Rate = Callable[["Prepared", Job], float]
_ACROSS: dict[str, _Rate] = {
    "mould": _compile,
    "compile": _compile,
    "cast": _cast,
    "shard": _cast,
    "link": _cast,
    "bundle": lambda _, job: BUNDLE_PER_WEIGHT * job.weights,
}
_ALONE: dict[str, _Rate] = {
    "template": lambda prepared, _: TRACE[prepared.plan.target.graph_format],
    "lower": lambda *_: TRACE["pt2"],
    "record": _record,
    "verify": _verify,
}
