"""A build: from what the user asked for to a stored, verified bundle.

`build` and `plan` are the Python interface of the two commands of the same name. Heavy libraries are imported by the
stages that need them, so that a build in which nothing changed costs a few hundred milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.bundle import heal_bundle
from fluxkiln.artifacts.locks import build_lock
from fluxkiln.build.context import Prepared, outline, prepare, unwritten_bytes
from fluxkiln.compile.onnx.linked import link_components
from fluxkiln.compile.plan import Binary, BundleFile, Plan
from fluxkiln.compile.toolchains.tpu_mlir.cast_file import cast_file
from fluxkiln.compile.toolchains.tpu_mlir.compilation import compile_parts
from fluxkiln.compile.toolchains.tpu_mlir.devices import group_parts, plan_devices
from fluxkiln.compile.toolchains.tpu_mlir.proof import prove_cast
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Laps, Progress, Silent
from fluxkiln.settings import Settings


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build did and where it is."""

    name: str
    target: str
    bundle: Path
    report: Path | None
    digest: str
    nothing_to_do: bool
    seconds: float
    compiler_runs: int
    cache: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {
            "name": self.name,
            "target": self.target,
            "bundle": str(self.bundle),
            "manifest": str(self.bundle / "manifest.json"),
            "report": str(self.report) if self.report else None,
            "digest": self.digest,
            "nothing_to_do": self.nothing_to_do,
            "seconds": round(self.seconds, 3),
            "compiler_runs": self.compiler_runs,
            "cache": dict(self.cache),
            "timings": {stage: round(seconds, 3) for stage, seconds in self.timings.items()},
            "parts": dict(self.parts),
            "parity": dict(self.parity),
        }


def build(settings: Settings, progress: Progress | None = None) -> BuildResult:
    """Build, verify and store a bundle.

    Raises:
        UsageError: an option that is not legal. CheckpointError: a damaged checkpoint. ToolchainError: no compiler.
        CompileError: a compile failed or a cast is wrong. ResourceError: disk or memory ran out, or the same build
        runs already. ParityError: a gate was missed; bundle and report are written all the same.
    """
    from fluxkiln.build.finish import finish_bundle
    from fluxkiln.build.plan import check_resources

    progress = progress or Silent()
    laps = Laps()
    prepared = prepare(settings, progress)
    laps.lap("prepare")
    with _folder_locked(prepared):
        heal_bundle(prepared.bundle)
        prepared.cache.store.clean()
        done = _already_done(prepared, laps)
        if done is not None and not settings.prove:
            return done
        check_resources(prepared)
        if prepared.plan.layout is not None:
            return _build_split(prepared, progress, laps)
        graphs: dict[str, Path] = {}
        if prepared.plan.target.toolchain == "tpu_mlir":
            binaries, files = build_files(prepared.checkpoint, prepared.plan, prepared.cache, settings, progress, laps)
        else:
            binaries, files, graphs = link_components(
                prepared.checkpoint, prepared.plan, prepared.cache, prepared.folder / "work", progress
            )
            laps.lap("link")
        return finish_bundle(prepared, binaries, files, graphs, progress, laps)


def _build_split(prepared: Prepared, progress: Progress, laps: Laps) -> BuildResult:
    from fluxkiln.build.finish import finish_bundle
    from fluxkiln.build.parity import Parity, replay
    from fluxkiln.compile.toolchain import find_toolchain
    from fluxkiln.verify.reference import Recording

    settings, toolchain = prepared.settings, find_toolchain("neuron")
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    made = toolchain.make(checkpoint, plan, cache, settings, progress, laps)

    def verify(recording: Recording) -> Parity:
        small = replace(plan, shapes=recording.shapes)
        with toolchain.climb(checkpoint, small, cache, made, prepared.folder / "work", progress) as climb:
            small = replace(small, parts=climb.parts)
            parity = replay(checkpoint, small, cache, settings, recording, climb.rungs, progress)
            climb.finish(parity.ladder)
        return replace(parity, facts=climb.facts)

    result = finish_bundle(
        prepared, made.binaries, made.files, {}, progress, laps, verify, toolchain.report(checkpoint, plan, made),
        made.missing,
    )  # fmt: skip
    if made.missing:
        toolchain.refuse_incomplete(made.missing, prepared.bundle)
    return result


@contextmanager
def _folder_locked(prepared: Prepared) -> Iterator[None]:
    """The build's folder, held against a second build of the same; gone afterwards if nothing was written to it."""
    what = f"the build {prepared.name} for {prepared.plan.target.name}"
    prepared.folder.mkdir(parents=True, exist_ok=True)
    try:
        with build_lock(prepared.folder / ".lock", what):
            yield
    finally:
        for folder in (prepared.folder, prepared.folder.parent):
            with suppress(OSError):  # not empty
                folder.rmdir()


def build_files(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
) -> tuple[tuple[Binary, ...], tuple[BundleFile, ...]]:
    """Every part's binary, in the files of the bundle.

    Moulds first, and parts that cannot be cast compiled; then file by file the shells are combined and every part's
    weights cast into it. One part of each cast kind, chosen by seed, is compiled as well and must come out identical.
    That proves the mould, not the checkpoint: it is not repeated for a mould of the store, unless `settings.prove` asks
    for it.
    """
    parts, proofs = compile_parts(checkpoint, plan, cache, settings, progress)
    groups = group_parts(plan, parts)
    plan_devices(plan, groups)
    laps.lap("compile")
    progress.stage("cast", len(parts))
    binaries: dict[str, Binary] = {}
    files = []
    for name, members in groups.items():
        file, finished = cast_file(checkpoint, plan, cache, name, members, progress, settings.jobs)
        files.append(file)
        binaries |= {binary.part.name: binary for binary in finished}
    for direct, mould in proofs:
        binaries[direct.part.name] = prove_cast(binaries[direct.part.name], direct, checkpoint, plan, cache, mould)
    laps.lap("cast")
    compiled = [binary.part.name for binary in parts if binary.made == "compiled"]
    if not proofs and not compiled:
        progress.note("every part was cast from a mould of the store, without a compiler")
    return tuple(binaries[part.name] for part in plan.parts), tuple(files)


def _already_done(prepared: Prepared, laps: Laps) -> BuildResult | None:
    from fluxkiln.build.finish import finished_result

    return finished_result(prepared, laps)


def plan(settings: Settings) -> dict[str, Any]:
    """The jobs of a build without running them, with memory estimates and which of them the store has already.

    Nothing is written: a checkpoint that is not there yet, synthetic or with LoRAs in it, is planned from its shapes.
    """
    from fluxkiln.build.plan import plan_build

    return plan_build(outline(settings) if unwritten_bytes(settings) else prepare(settings))
