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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action, stage_code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.target import Target
from fluxkiln.components import Part, Shapes
from fluxkiln.digests import digest_json
from fluxkiln.export.bindings import binding_refs, tensors_of
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Binding, GraphFormat, Template, TensorRef, TensorSpec

if TYPE_CHECKING:
    from fluxkiln.compile.toolchains.neuron.split import Split
    from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv
    from fluxkiln.export.split import SplitPart

EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnx-ir")
# of no influence on one block's graph: models of another depth share its template and its mould
_DEPTHS = ("num_layers", "num_single_layers")
# stages in which the compiler runs
COMPILER_STAGES = ("mould", "compile", "combine", "neff")
# how a part of a split model is made
SHARDED = "sharded"


@dataclass(frozen=True, slots=True)
class Kiln:
    """What is fixed for one build.

    Attributes:
        digests: component -> tensor name -> sha256 of its bytes.
        shards: weight file -> its size, times and inode when those digests were taken.
        logs: where the compilers' logs go.
        split: how the model is cut over cores, where it is.
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
    shards: Mapping[Path, tuple[int, ...]] = field(default_factory=dict)
    split: Split | None = None

    def path(self, blob: Blob | None) -> Path:
        """Where a blob lies in the store; what has no blob must not be asked for."""
        assert blob is not None
        return self.cache.store.path(blob.digest)

    @property
    def split_parts(self) -> tuple[SplitPart, ...]:
        """The parts as they are cut; of a split model only."""
        assert self.split is not None
        return self.split.parts

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
    known = kiln.digests[binding.component]
    refs = [[ref.name, known[ref.name]] for ref in binding_refs(binding, kiln.checkpoint)]
    slots = [[slot.slot, list(slot.sources)] for slot in binding.slots]
    return "sha256:" + hashlib.sha256(json.dumps([refs, slots]).encode()).hexdigest()


def _specs_to_json(specs: tuple[TensorSpec, ...]) -> list[Any]:
    return [[spec.name, list(spec.shape), spec.dtype] for spec in specs]


def _specs_from_json(value: Any) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in value)
