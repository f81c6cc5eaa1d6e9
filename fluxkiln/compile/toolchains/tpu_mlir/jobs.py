"""What a build will do, and what it will take on the devices, before anything is made.

Nothing is traced. Where a template is in the store its keys are the build's own; where it is not, sizes come from the
shapes of the checkpoint's tensors, and everything that follows from the template has yet to be made.
"""

from __future__ import annotations

from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Binary, Job, Plan
from fluxkiln.compile.templates import count_elements, find_template, net_name
from fluxkiln.compile.tensors import part_bytes, part_refs, search_memory
from fluxkiln.compile.toolchain import TRACE_MEMORY
from fluxkiln.compile.toolchains.tpu_mlir.cast_file import CAST_MEMORY, combine_action, part_action
from fluxkiln.compile.toolchains.tpu_mlir.devices import file_of, group_parts
from fluxkiln.compile.toolchains.tpu_mlir.moulds import (
    Mould,
    cast_part,
    compile_action,
    compile_memory,
    compile_part,
    find_mould,
)
from fluxkiln.compile.toolchains.tpu_mlir.proof import needs_proof, proof_part
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.settings import Settings
from fluxkiln.types import Part, Template


def plan_jobs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
    """Templates, moulds, proofs, parts without a mould, combined shells, casts."""
    templates, made, cast = [], [], []
    known: dict[Part, Binary] = {}
    for kind in plan.kinds():
        template, mould = _find_mould(checkpoint, plan, cache, kind)
        what = f"{kind} {plan.target.graph_format}"
        templates.append(Job("template", what, kind, "", TRACE_MEMORY, template is not None))
        parts = [part for part in plan.parts if part.kind == kind]
        weights = count_elements(template.slots if template else part_refs(checkpoint, plan, parts[0]))
        scheme, memory = plan.schemes[kind].name, compile_memory(weights)
        spent: Any = mould.result.facts.get("estimate_ms") if mould else None
        made.append(Job("mould", f"mould {kind}", kind, scheme, memory, mould is not None, weights, spent))
        if mould is not None and not mould.castable:
            compiled = parts
        else:
            compiled = [proof_part(parts, settings.seed)] * (settings.prove or needs_proof(cache, mould))
        for part in compiled:
            in_store = template is not None and _is_compiled(checkpoint, plan, cache, part, template)
            made.append(Job("compile", part.name, kind, scheme, memory, in_store, weights))
        for part in parts:
            binary = _find_binary(checkpoint, plan, cache, part, template, mould)
            in_store = binary is not None and cache.lookup(part_action(checkpoint, plan, cache, binary).key) is not None
            memory = search_memory(checkpoint, plan, part) + CAST_MEMORY
            cast.append(Job("cast", part.name, kind, scheme, memory, in_store, weights))
            known |= {part: binary} if binary is not None else {}
    return [*templates, *made, *_combine_jobs(plan, cache, known), *cast]


def planned_binaries(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> list[Binary]:
    """Every part with the facts of its mould, or with nothing but its weights."""
    moulds = {kind: _find_mould(checkpoint, plan, cache, kind)[1] for kind in plan.kinds()}
    planned = []
    for part in plan.parts:
        mould = moulds[part.kind]
        facts = (
            {"weight_bytes": part_bytes(checkpoint, plan, part), "instruction_bytes": 0, "runtime_bytes": 0}
            if mould is None
            else mould.result.facts
        )
        planned.append(Binary(part, net_name(part), plan.scheme(part), facts, "planned"))
    return planned


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


def _is_compiled(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template) -> bool:
    """Whether the store has a part that was compiled with its own weights."""
    if not checkpoint.digests:
        return False
    return cache.lookup(compile_action(checkpoint, plan, cache, part, template).key) is not None
