"""A build: from what the user asked for to a stored, verified bundle.

`build` and `plan` are the Python interface of the two commands of the same name. Heavy libraries are imported by the
stages that need them, so that a build in which nothing changed costs a few hundred milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fluxkiln.artifacts.bundle import heal_bundle
from fluxkiln.build.context import outline, prepare
from fluxkiln.build.prepared import BuildResult, Prepared, unwritten_bytes
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.files import build_lock
from fluxkiln.progress import Laps, Progress, Silent
from fluxkiln.settings import Settings


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
        toolchain = toolchain_of(prepared.plan.target)
        made = toolchain.make(prepared.checkpoint, prepared.plan, prepared.cache, settings, progress, laps)
        result = finish_bundle(prepared, made, progress, laps)
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


def _already_done(prepared: Prepared, laps: Laps) -> BuildResult | None:
    from fluxkiln.build.finish import finished_result

    return finished_result(prepared, laps)


def plan(settings: Settings) -> dict[str, Any]:
    """The jobs of a build without running them, with memory estimates and which of them the store has already.

    Nothing is written: a checkpoint that is not there yet, synthetic or with LoRAs in it, is planned from its shapes.
    """
    from fluxkiln.build.plan import plan_build

    return plan_build(outline(settings) if unwritten_bytes(settings) else prepare(settings))
