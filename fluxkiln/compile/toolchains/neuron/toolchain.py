"""The AWS Neuron toolchain, for models that are cut over the cores of an instance."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Store
from fluxkiln.compile.bundle import Bundle
from fluxkiln.compile.doctor import package_status, runtime_status
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Job, Made, Plan
from fluxkiln.compile.toolchain import API, OpenRungs, Resumed, Toolchain, ToolStatus
from fluxkiln.compile.toolchains.neuron import modules, split
from fluxkiln.compile.toolchains.neuron.frontend import VERSIONS
from fluxkiln.compile.toolchains.neuron.neuronx_cc import compiler_missing, compiler_status
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part
from fluxkiln.verify.findings import PartFindings, Record
from fluxkiln.verify.gates import PIPELINE, Gate, Rung


class Neuron(Toolchain):
    """neuronx-cc behind jax, and nrtpy or XLA's CPU to run what they make."""

    api = API
    name = "neuron"
    executors = ("neuron", "replicas")
    compiler_stages = ("neff",)
    largest_part = split.LARGEST_PART
    any_shapes = True
    many_sizes = True
    unproven = "no Trainium or Inferentia ran"
    resumable = True
    rungs = (
        Rung("split", 5, "the lowered modules of all ranks in float32, executed by XLA on the CPU",
             "splitting or lowering: a weight cut or bound wrongly, a reduction, a gather, or one operator", series=3),
        Rung("unsplit", 6, "the lowered modules on one rank in bfloat16, executed by XLA on the CPU",
             "what bfloat16 costs this model, split or not", series=4),
        Rung("replicas", 7, "the bundle's modules and shards, all ranks executed by XLA on the CPU",
             "a shard, or what bfloat16 loses between the ranks", series=5),
    )  # fmt: skip
    gates = (
        Gate("split|replicas", "*", "*", "ranks", "max_abs", 0.0, "reference",
             "every rank holds the same activations after a reduction, to the bit, or they would drift apart"),
        Gate("split", "*", "part", "*", "relative_l2", 5e-6, "reference",
             "float32 on every rank; partial sums are added in another order than one rank adds them in"),
        Gate("unsplit", "BF16", "part", "*", "relative_l2", 5e-2, "reference",
             "eager PyTorch in bfloat16 leaves 1e-2 behind T5's and the VAE's many layers; a wrong operator leaves 1",
             proposed=True),
        Gate("replicas|device", "BF16", "part", "*", "noise_ratio", 1.25, "previous",
             "two ways to round the same sums lie as far apart as either from the exact sum (8e-3 of 9e-3 was "
             "measured), so what counts is that splitting does not add to it: 1.0 to 1.15 was measured", proposed=True),
        Gate("split", "*", PIPELINE, "latents", "relative_l2", 5e-5, "reference",
             "the per-part 5e-6 adds up over blocks and steps", proposed=True),
        Gate("replicas", "BF16", PIPELINE, "latents", "relative_l2", 6e-2, "reference",
             "ten times what bfloat16 costs one block", proposed=True),
        Gate("replicas", "BF16", PIPELINE, "image", "psnr", 25.0, "reference",
             "the usual limit of a visible difference is about 30 dB; random weights amplify more than trained ones",
             proposed=True),
    )  # fmt: skip

    lay_out = staticmethod(split.plan_split)
    label = staticmethod(split.label)
    facts = staticmethod(split.facts)
    tools = staticmethod(modules.tools)

    def check(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
        split.plan_memory(checkpoint, plan)

    def devices(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> dict[str, Any]:
        return split.core_memory(checkpoint, plan).to_json()

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        return [*modules.lower_jobs(checkpoint, plan, cache), *split.shard_jobs(checkpoint, plan, cache)]

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        from fluxkiln.compile.toolchains.neuron.make import make

        return make(checkpoint, plan, cache, settings, progress, laps)

    def refuse_incomplete(self, missing: str, bundle: Path) -> None:
        raise compiler_missing(missing, bundle)

    def open_rungs(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> AbstractContextManager[OpenRungs]:
        from fluxkiln.compile.toolchains.neuron.rungs import open_rungs

        return open_rungs(checkpoint, plan, cache, made, progress)

    def look(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
    ) -> PartFindings:
        from fluxkiln.compile.toolchains.neuron.look import look

        return look(checkpoint, plan, cache, part, record, progress)

    def report(self, checkpoint: Checkpoint, plan: Plan, made: Made) -> dict[str, Any]:
        from fluxkiln.compile.toolchains.neuron.make import report

        return report(checkpoint, plan, made)

    def check_parts(self, bundle: Bundle, fresh: Collection[str]) -> None:
        from fluxkiln.compile.toolchains.neuron.split_bundle import check_description

        check_description(bundle, fresh)

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        """`neuron` where the modules are compiled, else `replicas`."""
        from fluxkiln.compile.toolchains.neuron.device import NeuronExecutor
        from fluxkiln.compile.toolchains.neuron.replicas import ReplicaExecutor
        from fluxkiln.compile.toolchains.neuron.split_bundle import read_split_bundle, read_weights

        chosen = name or self.executors[not (bundle.folder / "neff").is_dir()]
        described = read_split_bundle(bundle.folder).called({part: net.name for part, net in bundle.nets.items()})
        components = {part.name: part.component for part in bundle.parts}
        weights = read_weights(described)
        if chosen == "neuron":
            return NeuronExecutor(components, described, weights)
        return ReplicaExecutor(components, described.module_of, weights)

    def resume(self, bundle: Path, store: Store, jobs: int | None, progress: Progress) -> Resumed:
        from fluxkiln.compile.toolchains.neuron.make import resume_compile

        return resume_compile(bundle, store, progress, jobs)

    def doctor(self) -> Sequence[ToolStatus]:
        remedy = (
            "the executor neuron needs it, on a Trainium or Inferentia instance: install nrtpy and "
            "aws-neuronx-runtime-lib from the AWS Neuron package index"
        )
        return [
            *(package_status(name, "`make env`, or `pip install 'fluxkiln[trn1]'`") for name in sorted(VERSIONS)),
            compiler_status(),
            runtime_status("nrtpy", "nrtpy", ("nrtpy",), remedy),
        ]


TOOLCHAIN = Neuron()
