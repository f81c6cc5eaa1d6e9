"""Templates, the first stage of a build, and what stages hand on.

What a stage depends on is in its key, so a result is only reused for equal inputs, settings, tools and code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.bundle import ENCODERS
from fluxkiln.compile.plan import Plan
from fluxkiln.digests import digest_json
from fluxkiln.export.bindings import binding_refs
from fluxkiln.export.checkpoint import Checkpoint, TensorReader
from fluxkiln.patches.pipeline import PipelineFiles
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.types import SIZE_MARK, Binding, GraphFormat, Part, Shapes, Template, TensorRef, TensorSpec

EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")


def template_action(checkpoint: Checkpoint, plan: Plan, kind: str, graph_format: GraphFormat) -> Action:
    """The key of a template: config without depth, shapes, format, the exporter's versions, patches, export code."""
    model, configs = checkpoint.model, checkpoint.configs
    traits = model.kinds[kind]
    depths = model.whole_numbers.get(traits.component, ())
    config = {
        name: value
        for name, value in configs[traits.folder or traits.component].items()
        if not name.startswith("_") and name not in depths
    }
    return Action(
        stage="template",
        what=f"{kind} {graph_format}",
        code_version=code_version(make_template, model=type(checkpoint.model)),
        inputs={"config": digest_json(config)},
        settings={
            "kind": kind,
            "format": graph_format,
            "inputs": specs_to_json(model.part_inputs(kind, configs, plan.shapes)),
            **({"joined": True} if _is_joined(plan, kind, graph_format) else {}),
        },
        tools=dict(_export_tools()),
    )


@cache
def _export_tools() -> Mapping[str, str]:
    return {name: importlib.metadata.version(name) for name in EXPORT_TOOLS}


def find_template(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, kind: str, graph_format: GraphFormat
) -> Template | None:
    """The template of a kind if it is in the store."""
    result = cache.lookup(template_action(checkpoint, plan, kind, graph_format).key)
    return None if result is None else _template(cache, kind, graph_format, result)


def make_template(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, kind: str, graph_format: GraphFormat
) -> Template:
    """The template of a kind: from the store, or traced now."""

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        from fluxkiln.export.join import join_halves
        from fluxkiln.export.trace import export_template

        made = export_template(checkpoint.model, kind, checkpoint.configs, plan.shapes, graph_format, folder)
        if _is_joined(plan, kind, graph_format):
            made = join_halves(made, folder / "joined.onnx")
        facts = {name: specs_to_json(getattr(made, name)) for name in ("inputs", "outputs", "slots")}
        return {"graph": made.path}, facts

    result = run_action(cache, template_action(checkpoint, plan, kind, graph_format), produce)
    return _template(cache, kind, graph_format, result)


def _is_joined(plan: Plan, kind: str, graph_format: GraphFormat) -> bool:
    """Whether feed-forwards are in one piece: those whose products are in integers, as a compiler gets them."""
    return graph_format == "onnx17" and plan.schemes[kind].integer


def prepare_template(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    kind: str,
    graph_format: GraphFormat,
    progress: Progress,
    stage: str,
) -> Template:
    """The template of a kind, from the store or traced now, reported as a job of `stage`."""
    started = time.perf_counter()
    found = find_template(checkpoint, plan, cache, kind, graph_format)
    template = make_template(checkpoint, plan, cache, kind, graph_format)
    progress.done(stage, kind, FROM_STORE if found else f"traced in {time.perf_counter() - started:.1f} s")
    return template


def _template(cache: ActionCache, kind: str, graph_format: GraphFormat, result: ActionResult) -> Template:
    graph = result.outputs["graph"]
    specs = {name: specs_from_json(result.facts[name]) for name in ("inputs", "outputs", "slots")}
    return Template(kind, graph_format, cache.path(graph), graph.digest, **specs)


def net_name(part: Part) -> str:
    """A part's net in the combined file; at the first size as long as the mould's own, which it is written over."""
    size = part.name.removeprefix(part.base)
    return base_net(part) + size.replace(SIZE_MARK, "_").replace("-", "_")


def base_net(part: Part) -> str:
    """What its net is called where it is compiled, whatever its size."""
    return part.base.replace(".", "_") if "." in part.base else f"{part.base}_00"


def mould_net(plan: Plan, kind: str) -> str:
    """The net of a kind's mould, whatever its size: that of its first part, or of any other, which is as long."""
    return base_net(next(part for part in plan.parts if part.kind == kind))


def count_elements(specs: Iterable[TensorSpec | TensorRef]) -> int:
    """Elements of all these tensors."""
    return sum(math.prod(spec.shape) for spec in specs)


def weights_digest(checkpoint: Checkpoint, binding: Binding) -> str:
    """A digest over the checkpoint tensors that a binding reads, and what it does to them."""
    known = checkpoint.digests[binding.component]
    refs = [[ref.name, known[ref.name]] for ref in binding_refs(binding, checkpoint)]
    slots = [[slot.slot, list(slot.sources)] for slot in binding.slots]
    return "sha256:" + hashlib.sha256(json.dumps([refs, slots]).encode()).hexdigest()


def encoder_facts(checkpoint: Checkpoint) -> dict[str, str]:
    """What the manifest's settings say of the text encoders, if all of them are there; see `Bundle.encoders`."""
    digests = {name: dict(checkpoint.digests.get(name, {})) for name in checkpoint.model.tokenizers}
    return {ENCODERS: digest_json(digests)} if all(digests.values()) else {}


def specs_to_json(specs: Iterable[TensorSpec]) -> list[Any]:
    """[name, shape, dtype] of each."""
    return [[spec.name, list(spec.shape), spec.dtype] for spec in specs]


def specs_from_json(value: Any) -> tuple[TensorSpec, ...]:
    """What `specs_to_json` was made of."""
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in value)


def host_constants(checkpoint: Checkpoint, plan: Plan) -> dict[str, Any]:
    """What the host hands to the parts at run time, by name; see `Model.host_constants`.

    What is another at a further size stands there once more: `rotary_cos@768x1344-512`.
    """

    def at(shapes: Shapes) -> dict[str, Any]:
        return checkpoint.model.host_constants(
            checkpoint.configs, shapes, TensorReader(checkpoint), plan.layout is not None
        )

    first = at(plan.shapes)
    made = dict(first)
    for shapes in plan.further:
        own = at(shapes)
        made |= {
            f"{name}{SIZE_MARK}{shapes.label}": array
            for name, array in own.items()
            if array.shape != first[name].shape or (array != first[name]).any()
        }
    return made


def pipeline_files(checkpoint: Checkpoint, plan: Plan) -> PipelineFiles:
    """What a pipeline on the parts of a build is made of besides them."""
    return PipelineFiles(checkpoint.root, checkpoint.configs, host_constants(checkpoint, plan))
