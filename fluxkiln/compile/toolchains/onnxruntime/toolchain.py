"""ONNX Runtime as a toolchain: graphs linked to the checkpoint's own bytes, which any CPU runs in float32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Binary, BundleFile, Job, Made, Plan
from fluxkiln.compile.templates import count_elements, find_template, make_template, tell_template
from fluxkiln.compile.tensors import part_refs, search_memory
from fluxkiln.compile.toolchain import API, TRACE_MEMORY, Climb, Rungs, Toolchain
from fluxkiln.compile.toolchains.onnxruntime.gates import GATES, RUNGS
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part
from fluxkiln.verify.findings import PartFindings, Record

_GRAPHS = "onnx"
# of the largest weight that is stored transposed, in float32
LINK_MEMORY = 256 << 20


class OnnxRuntime(Toolchain):
    """See `compile.toolchain.Toolchain`."""

    api = API
    name = "onnxruntime"
    rungs = RUNGS
    gates = GATES
    executors = ("ort",)
    fast = True
    # weights stay as the checkpoint has them, but for codes
    converts = False

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        jobs = []
        for kind in plan.kinds():
            known = find_template(checkpoint, plan, cache, kind, plan.target.graph_format) is not None
            jobs.append(Job("template", f"{kind} {plan.target.graph_format}", kind, "", TRACE_MEMORY, known))
        for part in plan.parts:
            # Linking is not a cached action: it takes the time of a copy.
            memory = search_memory(checkpoint, plan, part) + LINK_MEMORY
            weights = count_elements(part_refs(checkpoint, plan, part))
            jobs.append(Job("link", part.name, part.kind, plan.scheme(part).name, memory, False, weights))
        return jobs

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        from fluxkiln.compile.onnx.linked import link_parts

        context, folder = (checkpoint, plan, cache), plan.folder / "work" / _GRAPHS
        progress.stage("template", len(plan.kinds()))
        for kind in plan.kinds():
            tell_template(*context, kind, plan.target.graph_format, progress, "template")
        progress.stage("link", len(plan.parts))
        graphs = link_parts(*context, plan.schemes, folder)
        binaries = []
        for part in plan.parts:
            template = make_template(*context, part.kind, plan.target.graph_format)
            blob = cache.store.add_file(graphs[part.name])
            facts = {
                "inputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in template.inputs],
                "outputs": [[spec.name, spec.dtype, list(spec.shape)] for spec in template.outputs],
                **dict.fromkeys(("weight_bytes", "instruction_bytes", "runtime_bytes"), 0),
            }
            scheme = plan.scheme(part)
            binaries.append(Binary(part, part.name, scheme, facts, "linked", digest=blob.digest, size=blob.size))
            progress.done("link", part.name, f"{len(part.traits.inputs)} inputs, weights in place")
        names = {path: part for part, path in graphs.items()}
        files = tuple(
            BundleFile(
                f"{_GRAPHS}/{path.relative_to(folder)}",
                cache.store.add_file(path),
                (names[path],) if path in names else (),
            )
            for path in sorted(path for path in folder.rglob("*") if path.is_file())
        )
        laps.lap("link")
        return Made(tuple(binaries), files, own=graphs)

    @contextmanager
    def climb(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> Iterator[Climb]:
        from fluxkiln.compile.rungs import rungs_below

        with self.execute(checkpoint, plan, cache, made, folder, most_open=4) as own:
            yield Climb({**rungs_below(checkpoint, plan, cache), **own}, plan.parts)

    @contextmanager
    def execute(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, most_open: int = 1
    ) -> Iterator[Rungs]:
        from fluxkiln.compile.toolchains.onnxruntime.executor import OrtExecutor

        components = {part.name: part.component for part in plan.parts}
        # without quantization the bundle's own graphs are the exported templates
        rung = "executed" if plan.quantized else "onnxruntime"
        yield {rung: OrtExecutor(made.own, components, spin=True, most_open=most_open)}

    def look(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
    ) -> PartFindings:
        from fluxkiln.compile.toolchains.onnxruntime.look import look

        return look(checkpoint, plan, cache, part, record, progress)

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        from fluxkiln.compile.executor import require_file
        from fluxkiln.compile.toolchains.onnxruntime.executor import OrtExecutor

        nets = bundle.nets
        for net in nets.values():
            require_file(net)
        graphs = {part: net.file for part, net in nets.items()}
        components = {part: net.component for part, net in nets.items()}
        return OrtExecutor(graphs, components, threads=int(options.get("threads") or 0), fast=bool(options.get("fast")))


TOOLCHAIN = OnnxRuntime()
