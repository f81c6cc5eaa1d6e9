"""What a split model costs a step on its cores, by its modules alone: for the report."""

from __future__ import annotations

from typing import Any

from fluxkiln.compile.plan import Made, Plan
from fluxkiln.compile.toolchains.neuron.make import SplitModel
from fluxkiln.compile.toolchains.neuron.modules import Module, module_name
from fluxkiln.compile.toolchains.neuron.split import plan_memory
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.verify.report.page import size

_LABEL = (
    "Counted in the modules that the compiler is given. The roofline is the least that arithmetic, reading the weights "
    "and moving the collectives' bytes can take at the published peaks of the instance, each part's largest of the "
    "three; no accelerator ran."
)
_ALL_REDUCE_PASSES = 2  # a ring moves every byte to all others twice: once to add, once to give the sum


def report(checkpoint: Checkpoint, plan: Plan, made: Made) -> dict[str, Any]:
    """The report's facts `lowering` and `memory`."""
    own: SplitModel = made.own
    instance, degree = plan.layout.instance, plan.layout.degree
    modules, neffs, memory = own.modules, own.neffs, plan_memory(checkpoint, plan)
    step = [modules[module_name(part)] for part in plan.parts if part.component == "transformer"]
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
