"""The AWS Neuron toolchain, for models that are cut over the cores of an instance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Store
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Job, Made, Plan
from fluxkiln.compile.toolchain import API, Climb, Resumed, Toolchain, ToolStatus
from fluxkiln.compile.toolchains.neuron import gates, modules, split
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part
from fluxkiln.verify.findings import PartFindings, Record


class Neuron(Toolchain):
    """neuronx-cc behind jax, and nrtpy or XLA's CPU to run what they make."""

    api = API
    name = "neuron"
    rungs, gates = gates.RUNGS, gates.GATES
    executors = ("neuron", "replicas")
    compiler_stages = ("neff",)
    travelling = ()
    largest_part = split.LARGEST_PART
    any_shapes = True
    resumable = True

    lay_out = staticmethod(split.plan_split)
    label = staticmethod(split.label)
    facts = staticmethod(split.facts)
    tools = staticmethod(modules.tools)

    def check(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
        split.plan_memory(checkpoint, plan)

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        return [*modules.lower_jobs(checkpoint, plan, cache), *split.shard_jobs(checkpoint, plan, cache)]

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        from fluxkiln.compile.toolchains.neuron.make import make

        return make(checkpoint, plan, cache, settings, progress, laps)

    def refuse_incomplete(self, missing: str, bundle: Path) -> None:
        from fluxkiln.compile.toolchains.neuron.neuronx_cc import compiler_missing

        raise compiler_missing(missing, bundle)

    def climb(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> AbstractContextManager[Climb]:
        from fluxkiln.compile.toolchains.neuron.rungs import climb

        return climb(checkpoint, plan, cache, made, progress)

    def look(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
    ) -> PartFindings:
        from fluxkiln.compile.toolchains.neuron.look import look

        return look(checkpoint, plan, cache, part, record, progress)

    def report(self, checkpoint: Checkpoint, plan: Plan, made: Made) -> dict[str, Any]:
        from fluxkiln.compile.toolchains.neuron.roofline import report

        return report(checkpoint, plan, made)

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        """`neuron` where the modules are compiled, else `replicas`."""
        from fluxkiln.compile.toolchains.neuron.device import NeuronExecutor
        from fluxkiln.compile.toolchains.neuron.replica_executor import ReplicaExecutor
        from fluxkiln.compile.toolchains.neuron.split_bundle import read_split_bundle, read_weights

        chosen = name or self.executors[not (bundle.folder / "neff").is_dir()]
        described = read_split_bundle(bundle.folder)
        components = {part.name: part.component for part in bundle.parts}
        weights = read_weights(described)
        if chosen == "neuron":
            return NeuronExecutor(components, described, weights)
        return ReplicaExecutor(components, described.module_of, weights)

    def resume(self, bundle: Path, store: Store, jobs: int | None, progress: Progress) -> Resumed:
        from fluxkiln.compile.toolchains.neuron.resume import resume_compile

        return resume_compile(bundle, store, progress, jobs)

    def doctor(self) -> Sequence[ToolStatus]:
        from fluxkiln.compile.toolchains.neuron.doctor import doctor

        return doctor()


TOOLCHAIN = Neuron()
