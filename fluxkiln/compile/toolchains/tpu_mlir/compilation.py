"""Everything the compiler has to do for a build, as jobs that share the cores and the memory."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.compile.jobs import JobPool
from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.templates import count_elements, tell_template
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
from fluxkiln.compile.toolchains.tpu_mlir.proof import needs_proof, proof_part
from fluxkiln.compile.weights import check_methods
from fluxkiln.errors import CompileError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, Template


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
        first, key=lambda kind: (first[kind].component != "vae", -_weights(checkpoint, plan, first[kind]))
    ):
        template = templates[kind] = tell_template(
            checkpoint, plan, cache, kind, plan.target.graph_format, progress, "template"
        )
        claim = claim_memory(cache, mould_action(checkpoint, plan, template), template)
        moulds[kind] = pool.submit(
            f"mould {kind}", claim, _told(progress, make_mould, checkpoint, plan, cache, template)
        )
        pool.check()
    return templates, moulds


def _weights(checkpoint: Checkpoint, plan: Plan, part: Part) -> int:
    from fluxkiln.compile.tensors import part_refs

    return count_elements(part_refs(checkpoint, plan, part))


def _submit_compile(
    pool: JobPool[Any],
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    progress: Progress,
    part: Part,
    template: Template,
) -> Future[Any]:
    claim = claim_memory(cache, compile_action(checkpoint, plan, cache, part, template), template)
    return pool.submit(part.name, claim, _told(progress, compile_part, checkpoint, plan, cache, part, template))


def claim_memory(cache: ActionCache, action: Action, template: Template, known: bool = True) -> int:
    """The memory of a compile; nothing for what the store has (where `known`), so that it is never refused."""
    return 0 if known and cache.lookup(action.key) else compile_memory(count_elements(template.slots))


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
