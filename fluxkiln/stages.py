"""The stages of a build as cached actions: template, mould, cast, compile, combine.

Each function takes a `Kiln` (what is fixed for one build) and returns a frozen result whose files are blobs of the
store. What a stage depends on is in its key, so a result is only reused for equal inputs, settings, tools and code.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action, stage_code_version
from fluxkiln.artifacts.canonical import digest_json
from fluxkiln.artifacts.store import Blob
from fluxkiln.artifacts.types import Binding, GraphFormat, Template, TensorRef, TensorSpec
from fluxkiln.compile.target import Target
from fluxkiln.components import Part, Shapes
from fluxkiln.errors import CompileError
from fluxkiln.export.bindings import bind_part, binding_refs, tensors_of, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.quantize.schemes import Scheme

if TYPE_CHECKING:
    from fluxkiln.compile.tpu_mlir_env import TpuMlirEnv

EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
# of no influence on one block's graph: models of another depth share its template and its mould
_DEPTHS = ("num_layers", "num_single_layers")
_SHARED_CODE = (
    "fluxkiln.compile.bmodel",
    "fluxkiln.compile.forms",
    "fluxkiln.quantize.pack",
    "fluxkiln.export.bindings",
)
CAST_CODE = ("fluxkiln.compile.cast", *_SHARED_CODE)
_COMPILE_CODE = (
    "fluxkiln.compile.pour",
    "fluxkiln.compile.tpu_mlir",
    "fluxkiln.compile.tpu_mlir_transform",
    "fluxkiln.compile.mould",
    *_SHARED_CODE,
)
# a cast holds one slot's weight in a few forms
CAST_MEMORY = 512 << 20
# stages in which the compiler runs
COMPILER_STAGES = ("mould", "compile", "combine")


@dataclass(frozen=True, slots=True)
class Kiln:
    """What is fixed for one build.

    Attributes:
        digests: component -> tensor name -> sha256 of its bytes.
        logs: where the compilers' logs go.
    """

    target: Target
    shapes: Shapes
    schemes: Mapping[str, Scheme]
    parts: tuple[Part, ...]
    checkpoint: Checkpoint
    digests: Mapping[str, Mapping[str, str]]
    cache: ActionCache
    logs: Path
    tpu_mlir: TpuMlirEnv | None = None

    def path(self, blob: Blob) -> Path:
        return self.cache.store.path(blob.digest)

    def kinds(self) -> tuple[str, ...]:
        """The kinds of this model's parts, each once, in the order they run."""
        return tuple(dict.fromkeys(part.kind for part in self.parts))

    @property
    def quantized(self) -> bool:
        """Whether any part has quantized weights."""
        return any(self.schemes[part.kind].weight_bits for part in self.parts)

    def scheme(self, part: Part) -> Scheme:
        return self.schemes[part.kind]


@dataclass(frozen=True, slots=True)
class Mould:
    """A compiled kind. `why` is empty, or why its bytes could not be traced back to weights and nothing can be cast."""

    kind: str
    result: ActionResult
    why: str

    @property
    def castable(self) -> bool:
        return not self.why


@dataclass(frozen=True, slots=True)
class BinaryPart:
    """A part's binary. `made` is `cast`, `compiled`, or `cast, compiled: identical`; `hit` if it was in the store."""

    part: Part
    net: str
    scheme: Scheme
    bmodel: Blob
    facts: Mapping[str, Any]
    made: str
    lowered: Blob
    weights: Blob
    coefficients: Blob | None = None
    hit: bool = False


@dataclass(frozen=True, slots=True)
class CombinedFile:
    """A bmodel file of the bundle and the names of the parts whose nets it holds, in order."""

    name: str
    blob: Blob
    parts: tuple[str, ...]
    hit: bool = False


def template_action(kiln: Kiln, kind: str, graph_format: GraphFormat) -> Action:
    """The key of a template: config without depth, shapes, format, the exporter's versions, patches, export code."""
    from fluxkiln.export.trace import part_inputs

    component = next(tensors_of(part) for part in kiln.parts if part.kind == kind)
    config = {
        name: value
        for name, value in kiln.checkpoint.configs[component].items()
        if not name.startswith("_") and (name not in _DEPTHS)
    }
    return Action(
        stage="template",
        what=f"{kind} {graph_format}",
        code_version=stage_code_version("fluxkiln.patches", "fluxkiln.export.trace", "fluxkiln.export.graph"),
        inputs={"config": digest_json(config)},
        settings={
            "kind": kind,
            "format": graph_format,
            "inputs": _specs_to_json(part_inputs(kind, kiln.checkpoint.configs, kiln.shapes)),
        },
        tools={name: importlib.metadata.version(name) for name in EXPORT_TOOLS},
    )


def find_template(kiln: Kiln, kind: str, graph_format: GraphFormat) -> Template | None:
    """The template of a kind if it is in the store."""
    result = kiln.cache.lookup(template_action(kiln, kind, graph_format).key)
    return None if result is None else _template(kiln, kind, graph_format, result)


def make_template(kiln: Kiln, kind: str, graph_format: GraphFormat) -> Template:
    """The template of a kind: from the store, or traced now."""

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        from fluxkiln.export.trace import export_template

        made = export_template(kind, kiln.checkpoint.configs, kiln.shapes, graph_format, folder)
        facts = {name: _specs_to_json(getattr(made, name)) for name in ("inputs", "outputs", "slots")}
        return {"graph": made.path}, facts

    return _template(
        kiln, kind, graph_format, run_action(kiln.cache, template_action(kiln, kind, graph_format), produce)
    )


def tell_template(kiln: Kiln, kind: str, graph_format: GraphFormat, progress: Progress, stage: str) -> Template:
    """The template of a kind, told as a job of `stage`."""
    started = time.perf_counter()
    found = find_template(kiln, kind, graph_format)
    template = make_template(kiln, kind, graph_format)
    progress.done(stage, kind, FROM_STORE if found else f"traced in {time.perf_counter() - started:.1f} s")
    return template


def _template(kiln: Kiln, kind: str, graph_format: GraphFormat, result: ActionResult) -> Template:
    graph = result.outputs["graph"]
    specs = {name: _specs_from_json(result.facts[name]) for name in ("inputs", "outputs", "slots")}
    return Template(kind, graph_format, kiln.path(graph), graph.digest, **specs)


def make_mould(kiln: Kiln, template: Template) -> Mould:
    """A kind compiled with probe weights, and the map of its bytes; or the reason why it has none."""
    from fluxkiln.compile.mould import learn_map, probe_reader

    scheme = kiln.schemes[template.kind]
    net = f"{template.kind}_00"

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        import numpy as np

        reader = probe_reader(template.slots)
        compiled = _compile(kiln, template, net, reader, folder, f"mould.{template.kind}")
        outputs = {"bmodel": compiled.bmodel, "lowered": compiled.lowered, "weights": compiled.weights}
        try:
            with np.load(compiled.weights) as arrays:
                found = learn_map(
                    compiled.bmodel,
                    arrays,
                    [spec.name for spec in template.slots],
                    reader,
                    scheme.group_size,
                    scheme.weight_bits,
                )
        except CompileError as error:
            return outputs, {**compiled.facts, "why": str(error)}
        outputs["map"] = folder / "map.json"
        outputs["map"].write_text(json.dumps(found.to_json()))
        return outputs, {**compiled.facts, "why": ""}

    result = run_action(kiln.cache, mould_action(kiln, template), produce)
    return Mould(template.kind, result, str(result.facts["why"]))


def mould_action(kiln: Kiln, template: Template) -> Action:
    """The key of a mould: no checkpoint is in it."""
    return _compile_action(kiln, "mould", template, f"{template.kind}_00", {"template": template.digest})


def find_mould(kiln: Kiln, template: Template) -> Mould | None:
    """The mould of a kind if it is in the store."""
    result = kiln.cache.lookup(mould_action(kiln, template).key)
    return None if result is None else Mould(template.kind, result, str(result.facts["why"]))


def compile_part(kiln: Kiln, part: Part, template: Template) -> BinaryPart:
    """A part compiled with its own weights."""
    binding = bind_part(part, template.slots, kiln.checkpoint)

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        reader = weight_reader(binding, kiln.checkpoint)
        compiled = _compile(kiln, template, net_name(part), reader, folder, part.name)
        outputs = {"bmodel": compiled.bmodel, "lowered": compiled.lowered, "weights": compiled.weights}
        return outputs, dict(compiled.facts)

    result = run_action(kiln.cache, compile_action(kiln, part, template), produce)
    outputs = result.outputs
    return BinaryPart(
        part, net_name(part), kiln.scheme(part), outputs["bmodel"], result.facts, "compiled", outputs["lowered"],
        outputs["weights"], hit=result.hit,
    )  # fmt: skip


def compile_action(kiln: Kiln, part: Part, template: Template) -> Action:
    """The key of a part compiled with its own weights."""
    binding = bind_part(part, template.slots, kiln.checkpoint)
    inputs = {"template": template.digest, "weights": weights_digest(kiln, binding)}
    return _compile_action(kiln, "compile", template, net_name(part), inputs)


def cast_part(kiln: Kiln, part: Part, template: Template, mould: Mould) -> BinaryPart:
    """A part cast from its kind's mould: no compiler."""
    binding = bind_part(part, template.slots, kiln.checkpoint)
    mould_blobs = mould.result.outputs

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        from fluxkiln.compile.cast import cast_bmodel
        from fluxkiln.compile.mould import CoefficientMap

        coefficients = CoefficientMap.from_json(json.loads(kiln.path(mould_blobs["map"]).read_text()))
        target = folder / f"{net_name(part)}.bmodel"
        reader = weight_reader(binding, kiln.checkpoint)
        cast_bmodel(kiln.path(mould_blobs["bmodel"]), coefficients, reader, net_name(part), target)
        return {"bmodel": target}, {}

    result = run_action(kiln.cache, cast_action(kiln, part, template, mould), produce)
    return BinaryPart(
        part, net_name(part), kiln.scheme(part), result.outputs["bmodel"], mould.result.facts, "cast",
        mould_blobs["lowered"], mould_blobs["weights"], mould_blobs["map"], result.hit,
    )  # fmt: skip


def cast_action(kiln: Kiln, part: Part, template: Template, mould: Mould) -> Action:
    """The key of a cast."""
    return Action(
        stage="cast",
        what=f"{part.name} {kiln.scheme(part).name}",
        code_version=stage_code_version(*CAST_CODE),
        inputs={
            "mould": mould.result.outputs["bmodel"].digest,
            "map": mould.result.outputs["map"].digest,
            "weights": weights_digest(kiln, bind_part(part, template.slots, kiln.checkpoint)),
        },
        settings={"net": net_name(part)},
    )


def combine_parts(kiln: Kiln, name: str, parts: list[BinaryPart]) -> CombinedFile:
    """One bmodel file with every part's net, in order; its check codes verified."""
    from fluxkiln.compile.bmodel import check_codes
    from fluxkiln.compile.tpu_mlir import combine

    env = _require_env(kiln)

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        target = folder / name
        combine(env, kiln.target.chip, [kiln.path(part.bmodel) for part in parts], target, kiln.logs / f"{name}.log")
        check_codes(target)
        return {"bmodel": target}, {}

    result = run_action(kiln.cache, combine_action(kiln, name, parts), produce)
    return CombinedFile(name, result.outputs["bmodel"], tuple(part.part.name for part in parts), result.hit)


def combine_action(kiln: Kiln, name: str, parts: list[BinaryPart]) -> Action:
    """The key of a combined file: its nets in order."""
    return Action(
        stage="combine",
        what=name,
        code_version=stage_code_version("fluxkiln.compile.tpu_mlir", "fluxkiln.compile.bmodel"),
        inputs={f"{index:03d}": part.bmodel.digest for index, part in enumerate(parts)},
        settings={"chip": kiln.target.chip},
        tools={"tpu_mlir": _require_env(kiln).version},
    )


def net_name(part: Part) -> str:
    """A part's net in the combined file; as long as the mould's own, so that it can be written over it."""
    if "." not in part.name:
        return f"{part.kind}_00"
    return part.name.replace(".", "_")


def compile_memory(elements: int) -> int:
    """Peak bytes of compiling a graph with so many weights: the compiler, and 1.4 times the weights in float32.

    Measured on a double block of FLUX.1's width: 2.5 GB with 1.36 GB of weights.
    """
    return (700 << 20) + int(1.4 * 4 * elements)


def count_elements(specs: Iterable[TensorSpec | TensorRef]) -> int:
    """Elements of all these tensors."""
    return sum(math.prod(spec.shape) for spec in specs)


def weights_digest(kiln: Kiln, binding: Binding) -> str:
    """A digest over the checkpoint tensors that a binding reads, and what it does to them."""
    known = kiln.digests[binding.component]
    refs = [[ref.name, known[ref.name]] for ref in binding_refs(binding, kiln.checkpoint)]
    slots = [[slot.slot, list(slot.sources)] for slot in binding.slots]
    return "sha256:" + hashlib.sha256(json.dumps([refs, slots]).encode()).hexdigest()


def _compile_action(kiln: Kiln, stage: str, template: Template, net: str, inputs: Mapping[str, str]) -> Action:
    scheme = kiln.schemes[template.kind]
    return Action(
        stage=stage,
        what=f"{net} {scheme.name}",
        code_version=stage_code_version(*_COMPILE_CODE),
        inputs=inputs,
        settings={
            "net": net,
            "scheme": scheme.name,
            "chip": kiln.target.chip,
            "narrow": [template.kind in kiln.target.narrow_inputs, template.kind in kiln.target.narrow_outputs],
        },
        tools={"tpu_mlir": _require_env(kiln).version},
    )


def _compile(kiln: Kiln, template: Template, net: str, read_weight: Any, folder: Path, log_name: str) -> Any:
    from fluxkiln.compile.pour import pour
    from fluxkiln.compile.tpu_mlir import CompileJob, compile_graph

    activations = {spec.name for spec in template.inputs}
    graph = folder / f"{net}.onnx"
    pour(template.path, activations, read_weight, graph)
    work = folder / "work"
    work.mkdir()
    job = CompileJob(
        net=net,
        kind=template.kind,
        graph=graph,
        template=template.path,
        activations=frozenset(activations),
        scheme=kiln.schemes[template.kind],
        chip=kiln.target.chip,
        narrow_inputs=template.kind in kiln.target.narrow_inputs,
        narrow_outputs=template.kind in kiln.target.narrow_outputs,
    )
    return compile_graph(_require_env(kiln), job, work, kiln.logs / f"{log_name}.log")


def _require_env(kiln: Kiln) -> TpuMlirEnv:
    if kiln.tpu_mlir is None:
        raise CompileError(f"target {kiln.target.name} needs TPU-MLIR's environment; run make env-tpu-mlir")
    return kiln.tpu_mlir


def _specs_to_json(specs: tuple[TensorSpec, ...]) -> list[Any]:
    return [[spec.name, list(spec.shape), spec.dtype] for spec in specs]


def _specs_from_json(value: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in value)
