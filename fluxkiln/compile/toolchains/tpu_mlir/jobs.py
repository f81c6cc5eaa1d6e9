"""What a build has to do: as a list, before anything is made, and as jobs that share the cores and the memory.

For the list nothing is traced. Where a template is in the store its keys are the build's own; where it is not, sizes
come from the shapes of the checkpoint's tensors, and everything that follows from the template has yet to be made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.compile.plan import Binary, Job, Made, Plan
from fluxkiln.compile.process import JobPool
from fluxkiln.compile.templates import count_elements, find_template, net_name, prepare_template
from fluxkiln.compile.tensors import part_bytes, part_refs, search_memory
from fluxkiln.compile.toolchain import TRACE_MEMORY
from fluxkiln.compile.toolchains.tpu_mlir.cast import CAST_MEMORY, cast_file, part_action
from fluxkiln.compile.toolchains.tpu_mlir.devices import file_of, find_owners, group_parts, plan_devices
from fluxkiln.compile.toolchains.tpu_mlir.measured import find_measured
from fluxkiln.compile.toolchains.tpu_mlir.moulds import (
    Mould,
    cast_part,
    compile_action,
    compile_memory,
    compile_part,
    find_mould,
    make_mould,
    mould_action,
    needs_proof,
    proof_part,
    prove_cast,
    prove_mould,
)
from fluxkiln.compile.toolchains.tpu_mlir.shell import combine_action, combine_shells
from fluxkiln.compile.weights import check_methods
from fluxkiln.errors import CompileError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, Template


def plan_jobs(checkpoint: Checkpoint, whole: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
    """Templates, moulds, proofs, parts without a mould, combined shells, casts."""
    templates, made, cast = [], [], []
    known: dict[Part, Binary] = {}
    owners = find_owners(planned_binaries(checkpoint, whole, cache))
    for plan, kind in whole.each_kind():
        template, mould = _find_mould(checkpoint, plan, cache, kind)
        what = f"{kind} {plan.target.graph_format}"
        templates.append(Job("template", what, kind, "", TRACE_MEMORY, template is not None))
        parts = [part for part in plan.parts if part.kind == kind]
        weights = count_elements(template.slots if template else part_refs(checkpoint, plan, parts[0]))
        scheme, memory = plan.schemes[kind].name, compile_memory(weights)
        spent: Any = mould.result.facts.get("estimate_ms") if mould else None
        takes = (find_measured(checkpoint, plan, kind) or {}).get("seconds")
        made.append(Job("mould", f"mould {kind}", kind, scheme, memory, mould is not None, weights, spent, takes))
        proven = [proof_part(parts, settings.seed)] * (settings.prove or needs_proof(cache, mould))
        for part in parts if mould and not mould.castable else proven:
            in_store = _is_compiled(checkpoint, plan, cache, part, template)
            made.append(Job("compile", part.name, kind, scheme, memory, in_store, weights, None, takes))
        for part in parts:
            binary = _find_binary(checkpoint, plan, cache, part, template, mould)
            in_store = binary is not None and cache.lookup(part_action(checkpoint, plan, cache, binary).key) is not None
            known |= {part: binary} if binary is not None else {}
            if owners[net_name(part)] == net_name(part):
                memory = search_memory(checkpoint, plan, part) + CAST_MEMORY
                cast.append(Job("cast", part.name, kind, scheme, memory, in_store, weights))
    return [*templates, *made, *_combine_jobs(whole, cache, known), *cast]


def planned_binaries(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> list[Binary]:
    """Every part with the facts of its mould, of a net that was measured, or with nothing but its weights; `origin` of
    `devices.ORIGINS` says which."""
    planned: dict[Part, Binary] = {}
    for piece, kind in plan.each_kind():
        mould = _find_mould(checkpoint, piece, cache, kind)[1]
        net = None if mould else find_measured(checkpoint, piece, kind)
        for part in (part for part in piece.parts if part.kind == kind):
            facts = mould.result.facts if mould else {**net, "origin": "measured"} if net else {
                "weight_bytes": part_bytes(checkpoint, plan, part), "instruction_bytes": 0, "runtime_bytes": 0,
                "origin": "weights",
            }  # fmt: skip
            planned[part] = Binary(part, net_name(part), plan.scheme(part), facts, "planned")
    return [planned[part] for part in plan.parts]


def _combine_jobs(plan: Plan, cache: ActionCache, known: dict[Part, Binary]) -> list[Job]:
    if len(known) == len(plan.parts):
        groups = group_parts(plan, [known[part] for part in plan.parts])
        made = {name: cache.lookup(combine_action(plan, name, parts).key) is not None for name, parts in groups.items()}
    else:  # into how many files an unquantized transformer is cut depends on measured sizes
        made = {file_of(part): False for part in plan.parts if not part.traits.rows}
    return [Job("combine", name, "", "", 0, in_store) for name, in_store in made.items()]


def _find_mould(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, kind: str
) -> tuple[Template | None, Mould | None]:
    """A kind's template and mould, where they are in the store."""
    template = find_template(checkpoint, plan, cache, kind, plan.target.graph_format)
    return template, find_mould(checkpoint, plan, cache, template) if template else None


def _find_binary(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template | None, mould: Mould | None
) -> Binary | None:
    """What a part's binary is made of, if that is in the store."""
    if template is None or mould is None or not checkpoint.digests:
        return None
    if mould.castable:
        return cast_part(plan, part, mould)
    known = _is_compiled(checkpoint, plan, cache, part, template)
    return compile_part(checkpoint, plan, cache, part, template) if known else None


def _is_compiled(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template | None) -> bool:
    """Whether the store has a part that was compiled with its own weights."""
    if template is None or not checkpoint.digests:
        return False
    return cache.lookup(compile_action(checkpoint, plan, cache, part, template).key) is not None


def make_files(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
) -> Made:
    """Every part's binary, in the files of the bundle.

    Moulds first, and parts that cannot be cast compiled; then file by file the shells are combined and every part's
    weights cast into it. One part of each cast kind, chosen by seed, is compiled as well and must come out identical.
    That proves the mould, not the checkpoint: it is not repeated for a mould of the store, unless `settings.prove` asks
    for it.
    """
    parts: dict[str, Binary] = {}
    proofs: list[tuple[Binary, Mould]] = []
    check_methods(checkpoint, plan, cache)
    for piece in plan.alike():
        compiled, unproven = compile_parts(checkpoint, piece, cache, settings, progress)
        parts |= {binary.part.name: binary for binary in compiled}
        proofs += unproven
    made = [parts[part.name] for part in plan.parts]
    groups = group_parts(plan, made)
    plan_devices(plan, groups)
    laps.lap("compile")
    progress.stage("cast", len(made))
    binaries: dict[str, Binary] = {}
    files = []
    for name, members in groups.items():
        file, finished = cast_file(checkpoint, plan, cache, name, members, progress, settings.jobs)
        files.append(file)
        binaries |= {binary.part.name: binary for binary in finished}
    for direct, mould in proofs:
        binaries[direct.part.name] = prove_cast(
            binaries[direct.part.name], direct, checkpoint, plan.of(direct.part), cache, mould
        )
    laps.lap("cast")
    if not proofs and not any(binary.made == "compiled" for binary in made):
        progress.note("every part was cast from a mould of the store, without a compiler")
    return Made(tuple(binaries[part.name] for part in plan.parts), tuple(files))


def prove_moulds(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress
) -> list[Mould]:
    """The mould of every kind, each proven with other probe weights, and the combined shells of their files."""
    found: list[Mould] = []
    casts: dict[str, Binary] = {}
    for piece in plan.alike():
        made = _prove_alike(checkpoint, piece, cache, settings, progress)
        found += made.values()
        casts |= {part.name: cast_part(piece, part, made[part.kind]) for part in piece.parts}
    if all(mould.castable for mould in found):
        groups = group_parts(plan, [casts[part.name] for part in plan.parts])
        plan_devices(plan, groups)
        progress.stage("combine", len(groups))
        for name, members in groups.items():
            combine_shells(plan, cache, name, members)
            progress.done("combine", name, f"{len(members)} nets")
    return found


def _prove_alike(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress
) -> dict[str, Mould]:
    """The proven moulds of a plan with one scheme a kind."""
    with JobPool[Any](settings.jobs) as pool:
        templates, futures = submit_moulds(pool, checkpoint, plan, cache, progress)
        proofs: list[Future[Any]] = []
        made: dict[str, Mould] = {}
        progress.stage("compile", len(futures))
        progress.stage("prove", len(futures))
        for kind, future in futures.items():
            made[kind] = mould = future.result()
            if not settings.prove and not needs_proof(cache, mould):
                progress.done("prove", kind, FROM_STORE if mould.castable else "nothing can be cast into it")
                continue

            def prove(kind: str = kind, mould: Mould = mould) -> None:
                prove_mould(checkpoint, plan, cache, templates[kind], mould)
                progress.done("prove", kind, "cast and compiled: identical")

            memory = compile_memory(count_elements(templates[kind].slots))
            proofs.append(pool.submit(f"proof of {kind}", memory, prove))
        for proof in proofs:
            proof.result()
    return made


def compile_parts(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress
) -> tuple[tuple[Binary, ...], list[tuple[Binary, Mould]]]:
    """What the compiler has to do for a plan with one scheme a kind: moulds, the parts that have none, and proofs (a
    part with its mould)."""
    by_kind = {kind: [part for part in plan.parts if part.kind == kind] for kind in plan.kinds()}
    compiled: dict[str, Future[Any]] = {}
    made: dict[str, Mould] = {}
    with JobPool[Any](settings.jobs) as pool:
        templates, moulds = submit_moulds(pool, checkpoint, plan, cache, progress)
        found = {kind: find_mould(checkpoint, plan, cache, template) for kind, template in templates.items()}
        unproven = [kind for kind, mould in found.items() if settings.prove or needs_proof(cache, mould)]
        progress.stage("compile", len(by_kind) + len(unproven))

        def submit_compile(part: Part) -> None:
            template = templates[part.kind]
            action = compile_action(checkpoint, plan, cache, part, template)
            make = partial(compile_part, checkpoint, plan, cache, part, template)
            compiled[part.name] = _submit(pool, plan, cache, progress, part.name, action, template, make)

        # behind the moulds, so that the two compiles of the largest kind do not need their memory at once
        for kind in unproven:
            submit_compile(proof_part(by_kind[kind], settings.seed))
        for kind, future in moulds.items():
            made[kind] = mould = future.result()
            if mould.castable:
                continue
            if not plan.schemes[kind].rounds_as_compiler:
                raise CompileError(
                    f"{kind}: {mould.why}, and the compiler rounds by itself alone; ask for "
                    f"{kind}={replace(plan.schemes[kind], method='rtn', symmetric=False).name}"
                )
            progress.note(f"{kind}: {mould.why}")
            for part in by_kind[kind]:
                if part.name not in compiled:
                    submit_compile(part)
        direct = {name: future.result() for name, future in compiled.items()}
    binaries = [
        cast_part(plan, part, made[part.kind]) if made[part.kind].castable else direct[part.name] for part in plan.parts
    ]
    proofs = [(binary, made[binary.part.kind]) for binary in direct.values() if made[binary.part.kind].castable]
    return tuple(binaries), proofs


def submit_moulds(
    pool: JobPool[Any], checkpoint: Checkpoint, plan: Plan, cache: ActionCache, progress: Progress
) -> tuple[dict[str, Template], dict[str, Future[Any]]]:
    """The template of every kind, traced one after the other, and its mould as a job of the pool."""
    first = {part.kind: part for part in reversed(plan.parts)}
    progress.stage("template", len(first))
    templates: dict[str, Template] = {}
    moulds: dict[str, Future[Any]] = {}
    # the slowest first, so that the others fill the gaps
    sizes = {kind: count_elements(part_refs(checkpoint, plan, part)) for kind, part in first.items()}
    for kind in sorted(first, key=lambda kind: (not first[kind].traits.convolutional, -sizes[kind])):
        graph_format = plan.target.graph_format
        template = prepare_template(checkpoint, plan, cache, kind, graph_format, progress, "template")
        action, templates[kind] = mould_action(checkpoint, plan, template), template
        make = partial(make_mould, checkpoint, plan, cache, template)
        moulds[kind] = _submit(pool, plan, cache, progress, f"mould {kind}", action, template, make)
        pool.check()
    return templates, moulds


def _submit(
    pool: JobPool[Any],
    plan: Plan,
    cache: ActionCache,
    progress: Progress,
    what: str,
    action: Action,
    template: Template,
    make: Callable[[], Mould | Binary],
) -> Future[Any]:
    """A compile as a job that tells what it did; what the store has claims no memory, so that it is never refused."""

    def run() -> Mould | Binary:
        started = time.perf_counter()
        made = make()
        hit, scheme = (made.result.hit, plan.schemes[made.kind].name) if isinstance(made, Mould) else (made.hit, "")
        done = FROM_STORE if hit else f"compiled in {time.perf_counter() - started:.1f} s"
        progress.done("compile", f"{what} {scheme}".rstrip(), done)
        return made

    claim = 0 if cache.lookup(action.key) else compile_memory(count_elements(template.slots))
    return pool.submit(what, claim, run)
