"""What is fixed for one build, what its stages hand on, and the first of them: templates.

Each stage is a function that takes a `Kiln` and returns a frozen result whose files are blobs of the store. What a
stage depends on is in its key, so a result is only reused for equal inputs, settings, tools and code. The other stages
are in the toolchains' folders.
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

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.target import Target
from fluxkiln.digests import digest_json
from fluxkiln.export.bindings import binding_refs
from fluxkiln.export.checkpoint import Checkpoint, TensorReader
from fluxkiln.patches.pipeline import PipelineFiles
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Binding, GraphFormat, Part, Shapes, Template, TensorRef, TensorSpec

if TYPE_CHECKING:
    from fluxkiln.compile.toolchains.neuron.split import Split
    from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv

EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
# stages in which the compiler runs
COMPILER_STAGES = ("mould", "compile", "combine", "neff")
# how a part of a split model is made
SHARDED = "sharded"


@dataclass(frozen=True, slots=True)
class Kiln:
    """What is fixed for one build.

    Attributes:
        logs: where the compilers' logs go.
        split: how the model is cut over cores, where it is.
    """

    target: Target
    shapes: Shapes
    schemes: Mapping[str, Scheme]
    parts: tuple[Part, ...]
    checkpoint: Checkpoint
    cache: ActionCache
    logs: Path
    tpu_mlir: TpuMlirEnv | None = None
    split: Split | None = None

    def path(self, blob: Blob | None) -> Path:
        """Where a blob lies in the store; what has no blob must not be asked for."""
        assert blob is not None
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
    """What a part's binary is made of, and once it has been made, what it is.

    Attributes:
        made: `cast`, `compiled`, or `cast, compiled: identical`.
        facts: of the compile: sizes, inputs and outputs, the compiler's estimate.
        shell: the bmodel without its weights; for a cast part, that of its mould.
        bmodel: the bmodel with the part's own weights, where it was compiled.
        lowered, weights: what the compiler's interpreter runs; weights of a cast part are cast when they are needed.
        coefficients: the mould's map, for a cast part.
        digest, size: of the part's weights as they are stored: the check code of its net.
        hit: it was in the store.
    """

    part: Part
    net: str
    scheme: Scheme
    facts: Mapping[str, Any]
    made: str
    shell: Blob | None = None
    bmodel: Blob | None = None
    lowered: Blob | None = None
    weights: Blob | None = None
    coefficients: Blob | None = None
    digest: str = ""
    size: int = 0
    hit: bool = False


@dataclass(frozen=True, slots=True)
class CombinedFile:
    """A file of the bundle and the names of the parts whose nets it holds, in order."""

    name: str
    blob: Blob
    parts: tuple[str, ...]
    hit: bool = False


def template_action(kiln: Kiln, kind: str, graph_format: GraphFormat) -> Action:
    """The key of a template: config without depth, shapes, format, the exporter's versions, patches, export code."""
    model, configs = kiln.checkpoint.model, kiln.checkpoint.configs
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
        code_version=code_version(make_template, model=type(kiln.checkpoint.model)),
        inputs={"config": digest_json(config)},
        settings={
            "kind": kind,
            "format": graph_format,
            "inputs": _specs_to_json(model.part_inputs(kind, configs, kiln.shapes)),
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

        checkpoint = kiln.checkpoint
        made = export_template(checkpoint.model, kind, checkpoint.configs, kiln.shapes, graph_format, folder)
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


def net_name(part: Part) -> str:
    """A part's net in the combined file; as long as the mould's own, so that it can be written over it."""
    if "." not in part.name:
        return f"{part.name}_00"
    return part.name.replace(".", "_")


def mould_net(kiln: Kiln, kind: str) -> str:
    """The net of a kind's mould: that of its first part, or of any other, which is as long."""
    return net_name(next(part for part in kiln.parts if part.kind == kind))


def count_elements(specs: Iterable[TensorSpec | TensorRef]) -> int:
    """Elements of all these tensors."""
    return sum(math.prod(spec.shape) for spec in specs)


def weights_digest(kiln: Kiln, binding: Binding) -> str:
    """A digest over the checkpoint tensors that a binding reads, and what it does to them."""
    known = kiln.checkpoint.digests[binding.component]
    refs = [[ref.name, known[ref.name]] for ref in binding_refs(binding, kiln.checkpoint)]
    slots = [[slot.slot, list(slot.sources)] for slot in binding.slots]
    return "sha256:" + hashlib.sha256(json.dumps([refs, slots]).encode()).hexdigest()


def _specs_to_json(specs: tuple[TensorSpec, ...]) -> list[Any]:
    return [[spec.name, list(spec.shape), spec.dtype] for spec in specs]


def _specs_from_json(value: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in value)


def host_constants(kiln: Kiln) -> dict[str, Any]:
    """What the host hands to the parts at run time, by name; see `Model.host_constants`."""
    checkpoint = kiln.checkpoint
    return checkpoint.model.host_constants(
        checkpoint.configs, kiln.shapes, TensorReader(checkpoint), kiln.split is not None
    )


def pipeline_files(kiln: Kiln) -> PipelineFiles:
    """What a pipeline on the parts of a build is made of besides them."""
    return PipelineFiles(kiln.checkpoint.root, kiln.checkpoint.configs, host_constants(kiln))
