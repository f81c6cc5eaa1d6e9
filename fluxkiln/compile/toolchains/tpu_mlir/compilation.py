"""Everything the compiler has to do for a build, as jobs that share the cores and the memory."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.compile.plan import Binary, Made, Plan
from fluxkiln.compile.process import JobPool
from fluxkiln.compile.templates import count_elements, tell_template
from fluxkiln.compile.tensors import part_refs
from fluxkiln.compile.toolchains.tpu_mlir.cast_file import cast_file, combine_shells
from fluxkiln.compile.toolchains.tpu_mlir.devices import group_parts, plan_devices
from fluxkiln.compile.toolchains.tpu_mlir.moulds import (
    Mould,
    cast_part,
    compile_action,
    compile_memory,
    compile_part,
    find_mould,
    make_mould,
    mould_action,
)
from fluxkiln.compile.toolchains.tpu_mlir.proof import needs_proof, proof_part, prove_cast, prove_mould
from fluxkiln.compile.weights import check_methods
from fluxkiln.errors import CompileError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, Template


def make_files(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
) -> Made:
    """Every part's binary, in the files of the bundle.

    Moulds first, and parts that cannot be cast compiled; then file by file the shells are combined and every part's
    weights cast into it. One part of each cast kind, chosen by seed, is compiled as well and must come out identical.
    That proves the mould, not the checkpoint: it is not repeated for a mould of the store, unless `settings.prove` asks
    for it.
    """
    parts, proofs = compile_parts(checkpoint, plan, cache, settings, progress)
    groups = group_parts(plan, parts)
    plan_devices(plan, groups)
    laps.lap("compile")
    progress.stage("cast", len(parts))
    binaries: dict[str, Binary] = {}
    files = []
    for name, members in groups.items():
        file, finished = cast_file(checkpoint, plan, cache, name, members, progress, settings.jobs)
        files.append(file)
        binaries |= {binary.part.name: binary for binary in finished}
    for direct, mould in proofs:
        binaries[direct.part.name] = prove_cast(binaries[direct.part.name], direct, checkpoint, plan, cache, mould)
    laps.lap("cast")
    if not proofs and not any(binary.made == "compiled" for binary in parts):
        progress.note("every part was cast from a mould of the store, without a compiler")
    return Made(tuple(binaries[part.name] for part in plan.parts), tuple(files))


def prove_moulds(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress
) -> list[Mould]:
    """The mould of every kind, each proven with other probe weights, and the combined shells of their files."""
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
    if all(mould.castable for mould in made.values()):
        groups = group_parts(plan, [cast_part(plan, part, made[part.kind]) for part in plan.parts])
        plan_devices(plan, groups)
        progress.stage("combine", len(groups))
        for name, members in groups.items():
            combine_shells(plan, cache, name, members)
            progress.done("combine", name, f"{len(members)} nets")
    return list(made.values())


def compile_parts(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress
) -> tuple[tuple[Binary, ...], list[tuple[Binary, Mould]]]:
    """What the compiler has to do: moulds, the parts that have none, and proofs (a part with its mould)."""
    check_methods(checkpoint, plan, cache)
    by_kind: dict[str, list[Part]] = {kind: [p for p in plan.parts if p.kind == kind] for kind in plan.kinds()}
    compiled: dict[str, Future[Any]] = {}
    with JobPool[Any](settings.jobs) as pool:
        templates, moulds = submit_moulds(pool, checkpoint, plan, cache, progress)
        found = {kind: find_mould(checkpoint, plan, cache, template) for kind, template in templates.items()}
        unproven = [kind for kind in templates if settings.prove or needs_proof(cache, found[kind])]
        progress.stage("compile", len(by_kind) + len(unproven))
        # behind the moulds, so that the two compiles of the largest kind do not need their memory at once
        for kind in unproven:
            part = proof_part(by_kind[kind], settings.seed)
            compiled[part.name] = _submit_compile(pool, checkpoint, plan, cache, progress, part, templates[kind])
        for kind, future in moulds.items():
            mould: Mould = future.result()
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
                    compiled[part.name] = _submit_compile(
                        pool, checkpoint, plan, cache, progress, part, templates[kind]
                    )
        made = {kind: future.result() for kind, future in moulds.items()}
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
    for kind in sorted(
        first,
        key=lambda kind: (
            not first[kind].traits.convolutional,
            -count_elements(part_refs(checkpoint, plan, first[kind])),
        ),
    ):
        template = templates[kind] = tell_template(
            checkpoint, plan, cache, kind, plan.target.graph_format, progress, "template"
        )
        claim = _claim(cache, mould_action(checkpoint, plan, template), template)
        moulds[kind] = pool.submit(
            f"mould {kind}", claim, _told(progress, make_mould, checkpoint, plan, cache, template)
        )
        pool.check()
    return templates, moulds


def _submit_compile(
    pool: JobPool[Any],
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    progress: Progress,
    part: Part,
    template: Template,
) -> Future[Any]:
    claim = _claim(cache, compile_action(checkpoint, plan, cache, part, template), template)
    return pool.submit(part.name, claim, _told(progress, compile_part, checkpoint, plan, cache, part, template))


def _claim(cache: ActionCache, action: Action, template: Template) -> int:
    """The memory of a compile; nothing for what the store has, so that it is never refused."""
    return 0 if cache.lookup(action.key) else compile_memory(count_elements(template.slots))


def _told(
    progress: Progress, stage: Any, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, *arguments: Any
) -> Any:
    """`stage` as a job that reports what it did."""

    def run() -> Any:
        started = time.perf_counter()
        made = stage(checkpoint, plan, cache, *arguments)
        mould = isinstance(made, Mould)
        what = f"mould {made.kind} {plan.schemes[made.kind].name}" if mould else made.part.name
        hit = made.result.hit if mould else made.hit
        progress.done("compile", what, FROM_STORE if hit else f"compiled in {time.perf_counter() - started:.1f} s")
        return made

    return run
