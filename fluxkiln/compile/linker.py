"""What toolchains have in common that run graphs on the checkpoint's own bytes: linking, and sessions by part.

A bundle has a graph for each part. A toolchain adds what opens one and runs it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.bundle import Bundle, refuse_part
from fluxkiln.compile.executor import Executor, Net, bind_net, require_file
from fluxkiln.compile.plan import Binary, BundleFile, Job, Made, Plan
from fluxkiln.compile.templates import count_elements, find_template, make_template, prepare_template
from fluxkiln.compile.tensors import part_refs, search_memory
from fluxkiln.compile.toolchain import TRACE_MEMORY, OpenRungs, Rungs, Toolchain
from fluxkiln.errors import CompileError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings
from fluxkiln.verify.gates import STORED, Rung

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.quantize.schemes import Scheme

GRAPHS = "onnx"
# of the largest weight that is stored transposed, in float32
LINK_MEMORY = 256 << 20
# kept open while parts are verified one after the other
MOST_OPEN = 4
# what the bundle's graphs are run at
EXECUTED = Rung("executed", 4, "the bundle's own graphs, run by the target's runtime",
                "linking: a quantized weight, scale or zero point in the wrong place of the bundle", STORED,
                series=4)  # fmt: skip


class Linker(Toolchain):
    """See `compile.toolchain.Toolchain`."""

    # weights stay as the checkpoint has them, but for codes
    converts = False
    many_sizes = True

    def open_graphs(
        self, nets: Mapping[str, Net], schemes: Mapping[str, Scheme], options: Mapping[str, Any], most_open: int = 0
    ) -> GraphExecutor:
        """What runs these parts.

        Args:
            options: of `compile.toolchain.open_executor`; none where parts are verified, one after the other.
            most_open: sessions kept open, beyond which the least recently used goes; 0 for all.
        """
        raise NotImplementedError

    def rung(self, plan: Plan) -> str:
        """What the rung is called at which the bundle's graphs run."""
        return EXECUTED.name

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        jobs = []
        for piece, kind in plan.each_kind():
            known = find_template(checkpoint, piece, cache, kind, plan.target.graph_format) is not None
            jobs.append(Job("template", f"{kind} {plan.target.graph_format}", kind, "", TRACE_MEMORY, known))
        for part in plan.parts:
            # Linking is not a cached action: it takes the time of a copy.
            memory = search_memory(checkpoint, plan, part) + LINK_MEMORY
            own = part.name == part.base  # those of further sizes are there then
            weights = count_elements(part_refs(checkpoint, plan, part)) if own else 0
            jobs.append(Job("link", part.name, part.kind, plan.scheme(part).name, memory, False, weights))
        return jobs

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        from fluxkiln.compile.onnx.linked import link_parts

        context, folder = (checkpoint, plan, cache), plan.folder / "work" / GRAPHS
        kinds = list(plan.each_kind())
        progress.stage("template", len(kinds))
        for piece, kind in kinds:
            prepare_template(checkpoint, piece, cache, kind, plan.target.graph_format, progress, "template")
        progress.stage("link", len(plan.parts))
        graphs = link_parts(*context, folder)
        binaries = []
        for part in plan.parts:
            template = make_template(checkpoint, plan.of(part), cache, part.kind, plan.target.graph_format)
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
                f"{GRAPHS}/{path.relative_to(folder)}",
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

        own = self._open_made(plan, made, MOST_OPEN)
        rungs: Rungs = {**rungs_below(checkpoint, plan, cache), self.rung(plan): own}
        yield OpenRungs(rungs, plan.parts, facts=own.ran)

    @contextmanager
    def execute(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path
    ) -> Iterator[Rungs]:
        yield {self.rung(plan): self._open_made(plan, made, 1)}

    def _open_made(self, plan: Plan, made: Made, most_open: int) -> GraphExecutor:
        nets = {binary.part.name: bind_net(binary, made.own[binary.net]) for binary in made.binaries}
        return self.open_graphs(nets, {part.name: plan.scheme(part) for part in plan.parts}, {}, most_open)

    def check_parts(self, bundle: Bundle, fresh: Collection[str]) -> None:
        from fluxkiln.compile.onnx.link import external_files, read_interface

        super().check_parts(bundle, fresh)
        weights = {file.path for file in bundle.manifest.files if file.role == "weights"}
        for entry in bundle.manifest.parts:
            if (entry.file, entry.net) != (f"{GRAPHS}/{entry.name}.onnx", entry.name):
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
        nets = bundle.nets
        for net in nets.values():
            require_file(net)
        schemes = {entry.name: parse_scheme(entry.scheme) for entry in bundle.manifest.parts}
        return self.open_graphs(nets, schemes, options)


class GraphExecutor:
    """Runs parts by name. A session is opened at its first use and stays until it, or its component, is let go.

    Args:
        components: part -> component.
        most_open: see `Linker.open_graphs`.

    Attributes:
        ran: facts of a report on what ran how, told while it runs.
    """

    name: str

    def __init__(self, components: Mapping[str, str], most_open: int = 0) -> None:
        self.components, self.most_open = dict(components), most_open
        self.sessions: dict[str, Any] = {}  # the least recently used first
        self.ran: dict[str, str] = {}

    def open(self, part: str) -> Any:
        """What runs a part."""
        raise NotImplementedError

    def run(self, session: Any, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32; errors as `Executor`."""
        raise NotImplementedError

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return self.run(self.session(part), part, inputs)

    def session(self, part: str) -> Any:
        """An open one; CompileError when there is no such part."""
        if part not in self.components:
            raise CompileError(f"there is no part {part!r}; there are {', '.join(self.components)}")
        session = self.sessions.pop(part, None)
        while session is None and self.most_open and len(self.sessions) >= self.most_open:
            del self.sessions[next(iter(self.sessions))]
        self.sessions[part] = session or self.open(part)
        return self.sessions[part]

    def load(self, component: str) -> None:
        for part, other in self.components.items():
            if other == component:
                self.session(part)

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
        raise NotImplementedError
