"""ONNX Runtime as a toolchain: graphs linked to the checkpoint's own bytes, which any CPU runs in float32."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.bundle import Bundle, refuse_part
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Binary, BundleFile, Job, Made, Plan
from fluxkiln.compile.templates import count_elements, find_template, make_template, prepare_template
from fluxkiln.compile.tensors import part_refs, search_memory
from fluxkiln.compile.toolchain import API, TRACE_MEMORY, OpenRungs, Rungs, Toolchain
from fluxkiln.errors import CompileError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part
from fluxkiln.verify.findings import PartFindings, Record
from fluxkiln.verify.gates import STORED, Gate, Rung

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GRAPHS = "onnx"
# of the largest weight that is stored transposed, in float32
LINK_MEMORY = 256 << 20
# of all sessions together; those that do not work sleep, but systems limit their number
MOST_THREADS = 4000


RUNGS: tuple[Rung, ...] = (
    Rung("executed", 4, "the bundle's own graphs, run by the target's runtime",
         "linking: a quantized weight, scale or zero point in the wrong place of the bundle", STORED, series=4),
)  # fmt: skip

GATES: tuple[Gate, ...] = (
    Gate("executed", "F32", "part", "*", "relative_l2", 5e-6, "reference",
         "float32 by ONNX Runtime's kernels, as at its own rung"),
    Gate("executed", "*", "part", "*", "relative_l2", 2e-3, "previous",
         "the same codes in float32 on both sides; norm weights are rounded to 16 bits before or after the softmax "
         "factor is in them: 5e-4 was measured"),
)  # fmt: skip


class OnnxRuntime(Toolchain):
    """See `compile.toolchain.Toolchain`."""

    api = API
    name = "onnxruntime"
    rungs = RUNGS
    gates = GATES
    executors = ("ort",)
    takes: Mapping[str, tuple[str, ...]] = {"ort": ("threads", "fast")}
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
            prepare_template(*context, kind, plan.target.graph_format, progress, "template")
        progress.stage("link", len(plan.parts))
        graphs = link_parts(*context, folder)
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
    def open_rungs(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> Iterator[OpenRungs]:
        from fluxkiln.compile.rungs import rungs_below

        with self.execute(checkpoint, plan, cache, made, folder, most_open=4) as own:
            yield OpenRungs({**rungs_below(checkpoint, plan, cache), **own}, plan.parts)

    @contextmanager
    def execute(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, most_open: int = 1
    ) -> Iterator[Rungs]:
        components = {part.name: part.component for part in plan.parts}
        # without quantization the bundle's own graphs are the exported templates
        rung = "executed" if plan.quantized else "onnxruntime"
        yield {rung: OrtExecutor(made.own, components, spin=True, most_open=most_open)}

    def look(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
    ) -> PartFindings:
        from fluxkiln.compile.toolchains.onnxruntime.look import look

        return look(checkpoint, plan, cache, part, record, progress)

    def check_parts(self, bundle: Bundle, fresh: Collection[str]) -> None:
        from fluxkiln.compile.onnx.link import external_files, read_interface

        super().check_parts(bundle, fresh)
        weights = {file.path for file in bundle.manifest.files if file.role == "weights"}
        for entry in bundle.manifest.parts:
            if (entry.file, entry.net) != (f"{_GRAPHS}/{entry.name}.onnx", entry.name):
                raise refuse_part(bundle, entry.name, f"is said to be the graph {entry.net} in {entry.file}")
            if entry.file not in fresh:
                continue
            graph = bundle.folder / entry.file
            if (found := read_interface(graph)) != (entry.inputs, entry.outputs):
                raise refuse_part(bundle, entry.name, f"takes and gives {found} by its graph, the manifest differs")
            for file in external_files(graph):
                path = os.path.relpath(file, bundle.folder)
                if path not in weights:
                    raise refuse_part(bundle, entry.name, f"reads {path}, which is none of the manifest's weights")

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        from fluxkiln.compile.executor import require_file

        nets = bundle.nets
        for net in nets.values():
            require_file(net)
        graphs = {part: net.file for part, net in nets.items()}
        components = {part: net.component for part, net in nets.items()}
        return OrtExecutor(graphs, components, threads=int(options.get("threads") or 0), fast=bool(options.get("fast")))


class OrtExecutor:
    """Runs parts by name. A session is opened at its first use and stays until it, or its component, is let go.

    Args:
        graphs: part -> graph; components: part -> component.
        threads: for one operation; 0 for one on each core.
        most_open: sessions kept open, beyond which the least recently used goes; 0 for all.
        spin: threads that wait for work keep their core busy: faster for one session, slower for many in turn.
        fast: products with packed weights round their activations to 8 bits (see `onnx.products`); its name says so.
    """

    def __init__(
        self,
        graphs: Mapping[str, Path],
        components: Mapping[str, str],
        *,
        threads: int = 0,
        most_open: int = 0,
        spin: bool = False,
        fast: bool = False,
    ) -> None:
        self.graphs, self.components, self.most_open = dict(graphs), dict(components), most_open
        # 0 lets ONNX Runtime take all cores, unless that many sessions would have too many threads
        most = max(1, MOST_THREADS // max(1, most_open or len(graphs)))
        self.threads = threads or (0 if (os.cpu_count() or 1) <= most else most)
        self.options = {"spin": spin, "fast": fast}
        self.name = "ort, fast" if fast else "ort"
        self.sessions: dict[str, Any] = {}  # the least recently used first

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32; errors as `Executor`."""
        from fluxkiln.compile.onnx.session import run_session

        return run_session(self._session(part), part, inputs)

    def load(self, component: str) -> None:
        for part in self.graphs:
            if self.components[part] == component:
                self._session(part)

    def release(self, component: str) -> None:
        for part in [part for part in self.sessions if self.components[part] == component]:
            del self.sessions[part]

    def drop(self, part: str) -> None:
        self.sessions.pop(part, None)

    def close(self) -> None:
        """Close all sessions; the executor can be used again."""
        self.sessions.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        import onnxruntime

        fast = self.options["fast"]
        arithmetic = "8-bit products of packed weights, float32 otherwise" if fast else "float32 arithmetic"
        return {"runtime": f"ONNX Runtime {onnxruntime.__version__}", "device": f"CPU, {arithmetic}"}

    def _session(self, part: str) -> Any:
        from fluxkiln.compile.onnx.session import open_session

        if part not in self.graphs:
            raise CompileError(f"there is no part {part!r}; there are {', '.join(self.graphs)}")
        session = self.sessions.pop(part, None)
        while session is None and self.most_open and len(self.sessions) >= self.most_open:
            del self.sessions[next(iter(self.sessions))]
        self.sessions[part] = session or open_session(self.graphs[part], threads=self.threads, **self.options)
        return self.sessions[part]


TOOLCHAIN = OnnxRuntime()
