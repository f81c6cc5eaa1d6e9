"""What a build hands on, as tests hold it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Binary, BundleFile, Made, Plan
from fluxkiln.compile.targets import Target
from fluxkiln.compile.toolchain import Rungs, toolchain_of
from fluxkiln.compile.toolchains.tpu_mlir import toolchain as gates
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Silent
from fluxkiln.types import Part
from fluxkiln.verify.ladder import Ladder


@dataclass(frozen=True)
class Build:
    """What a build hands on, and short names of what tests ask of it most."""

    checkpoint: Checkpoint
    plan: Plan
    cache: ActionCache

    @property
    def parts(self) -> tuple[Part, ...]:
        return self.plan.parts

    @property
    def target(self) -> Target:
        return self.plan.target

    def __iter__(self) -> Iterator[Any]:
        return iter((self.checkpoint, self.plan, self.cache))


def altered(build: Build, **changes) -> Build:
    """A build with another plan: other parts, shapes, schemes, ..."""
    return replace(build, plan=replace(build.plan, **changes))


@contextmanager
def opened_rungs(
    build: Build, binaries: tuple[Binary, ...], files: tuple[BundleFile, ...], folder: Path
) -> Iterator[Rungs]:
    """The rungs of a build of these parts."""
    with toolchain_of(build.target).open_rungs(*build, Made(binaries, files), folder, Silent()) as opened:
        yield opened.rungs


def chip_ladder() -> Ladder:
    """A ladder with the rungs and gates of a build for a chip."""
    return Ladder(gates.RUNGS, gates.GATES)
