"""The ONNX project's interpreter as a toolchain: one graph for each kind, one file of weights for each part."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, ActionCache, ActionResult, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor, Net, require_file
from fluxkiln.compile.plan import Binary, BundleFile, Job, Made, Plan
from fluxkiln.compile.rungs import rungs_below
from fluxkiln.compile.templates import (
    count_elements,
    find_template,
    make_template,
    prepare_template,
    weights_digest,
)
from fluxkiln.compile.toolchain import API, TRACE_MEMORY, OpenRungs, Rungs, Toolchain, ToolStatus, Work
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import FROM_STORE, Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import TRANSPOSED, Part, Template
from fluxkiln.verify.gates import STORED, Gate, Rung

if TYPE_CHECKING:
    from toy_target.interpreter import Interpreter

# numpy multiplies this often in a minute, more or less
MOST_MULTIPLICATIONS = 1e12


class OnnxReference(Toolchain):
    """See `fluxkiln.compile.toolchain.Toolchain`."""

    api = API
    name = "onnx-reference"
    rungs = (
        Rung("interpreted", 4, "the bundle's graphs and weights, interpreted by the ONNX project's own evaluator",
             "a weight in the wrong slot, or an operator that ONNX Runtime reads otherwise", STORED, series=4),
    )  # fmt: skip
    gates = (
        Gate("interpreted", "*", "part", "*", "relative_l2", 5e-6, "previous",
             "the same numbers in float32 on both sides, which numpy sums in another order: 9e-7 was measured"),
    )  # fmt: skip
    executors = ("interpreter",)

    def tools(self, plan: Plan) -> dict[str, str]:
        return {"safetensors": importlib.metadata.version("safetensors")}

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        templates = {kind: find_template(checkpoint, plan, cache, kind, "onnx17") for kind in plan.kinds()}
        jobs = [
            Job("template", f"{kind} onnx17", kind, "", TRACE_MEMORY, template is not None)
            for kind, template in templates.items()
        ]
        for part in plan.parts:
            template = templates[part.kind]
            numbers = count_elements(template.slots) if template else 0
            known = template is not None and cache.lookup(weights_action(checkpoint, plan, part, template).key)
            # as they are read, and in float32
            jobs.append(Job("weights", part.name, part.kind, plan.scheme(part).name, 8 * numbers, bool(known), numbers))
        return jobs

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        context = checkpoint, plan, cache
        progress.stage("template", len(plan.kinds()))
        templates = {kind: prepare_template(*context, kind, "onnx17", progress, "template") for kind in plan.kinds()}
        files = [BundleFile(f"graphs/{kind}.onnx", cache.store.add_file(t.path)) for kind, t in templates.items()]
        progress.stage("weights", len(plan.parts))
        binaries = []
        for part in plan.parts:
            template = templates[part.kind]
            found = store_weights(*context, part, template)
            blob = found.outputs["weights"]
            facts = {
                "inputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in template.inputs],
                "outputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in template.outputs],
                "weight_bytes": blob.size,
                "instruction_bytes": 0,
                "runtime_bytes": 0,
            }
            binaries.append(
                Binary(part, part.name, plan.scheme(part), facts, "written", {"weights": blob}, blob.digest, blob.size)
            )
            files.append(BundleFile(f"weights/{part.name}.safetensors", blob, (part.name,), found.hit))
            progress.done("weights", part.name, FROM_STORE if found.hit else "written")
        laps.lap("weights")
        return Made(tuple(binaries), tuple(files))

    @contextmanager
    def open_rungs(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> Iterator[OpenRungs]:
        with self.execute(checkpoint, plan, cache, made, folder) as own:
            yield OpenRungs({**rungs_below(checkpoint, plan, cache), **own}, plan.parts)

    @contextmanager
    def execute(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path
    ) -> Iterator[Rungs]:
        templates = {kind: make_template(checkpoint, plan, cache, kind, "onnx17") for kind in plan.kinds()}
        nets = {}
        for binary in made.binaries:
            part, template = binary.part, templates[binary.part.kind]
            weights = cache.path(binary.blobs["weights"])
            nets[part.name] = Net(part.name, part.traits, weights, binary.net, template.inputs, template.outputs)
        yield {"interpreted": open_interpreter(nets, {kind: template.path for kind, template in templates.items()})}

    def can_execute(self, work: Work) -> bool:
        return work.multiplications < MOST_MULTIPLICATIONS

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        nets = bundle.nets
        for net in nets.values():
            require_file(net)
        kinds = {net.kind.name for net in nets.values()}
        return open_interpreter(nets, {kind: bundle.folder / "graphs" / f"{kind}.onnx" for kind in kinds})

    def doctor(self) -> Sequence[ToolStatus]:
        return (ToolStatus("onnx.reference", True, importlib.metadata.version("onnx"), "", ""),)


def weights_action(checkpoint: Checkpoint, plan: Plan, part: Part, template: Template) -> Action:
    """The key of a part's weights: the tensors that it reads, and how they are stored."""
    binding = bind_part(part, template.slots, checkpoint)
    return Action(
        stage="toy weights",
        what=f"weights of {part.name}",
        code_version=code_version(store_weights),
        inputs={"weights": weights_digest(checkpoint, binding)},
        settings={"scheme": plan.scheme(part).name},
    )


def store_weights(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, template: Template
) -> ActionResult:
    """A part's weights by slot as the scheme stores them, as float32 in a safetensors file; from the store or made."""

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        import numpy as np
        from safetensors.numpy import save_file

        from fluxkiln.quantize.rounders import stored_weight

        read = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
        weights = {}
        for slot in (spec.name for spec in template.slots):
            weight = stored_weight(read(slot), plan.scheme(part))
            weights[slot] = np.ascontiguousarray(weight.T if slot.endswith(TRANSPOSED) else weight)
        save_file(weights, folder / "weights.safetensors")
        return {"weights": folder / "weights.safetensors"}, {}

    return run_action(cache, weights_action(checkpoint, plan, part, template), produce)


def open_interpreter(nets: Mapping[str, Net], graphs: Mapping[str, Path]) -> Interpreter:
    """The one runner of verification and images; imports onnx."""
    from toy_target.interpreter import Interpreter

    return Interpreter(nets, graphs)


TOOLCHAIN = OnnxReference()
