"""What a toolchain is: an adapter around a compiler or runtime that lives elsewhere, and everything it alone knows.

A toolchain is a folder of `compile/toolchains`, with a module `toolchain` whose `TOOLCHAIN` is an object as described
here, or a package of somebody else's that is registered under the entry-point group `fluxkiln.toolchains`. It is found
by name when a target asks for it; nothing outside of its folder names it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Store
from fluxkiln.compile import toolchains
from fluxkiln.compile.bundle import Bundle, refuse_part
from fluxkiln.compile.executor import Executor
from fluxkiln.compile.plan import Job, Made, Plan
from fluxkiln.compile.targets import Target
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.plugins import find_plugins
from fluxkiln.progress import Laps, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, PartRunner
from fluxkiln.verify.gates import Gate, Rung

if TYPE_CHECKING:
    from fluxkiln.verify.findings import PartFindings, Record
    from fluxkiln.verify.ladder import Ladder

# torch, diffusers and the exporter in one process
TRACE_MEMORY = 1 << 30
# Of this protocol; raised when a method is added or changes its meaning.
API = 2
GROUP = "fluxkiln.toolchains"

# rung -> runner, from the bottom of the ladder to its top
Rungs = dict[str, PartRunner]


@dataclass(frozen=True, slots=True)
class ToolStatus:
    """A tool: whether it is usable as it stands, where it lies, what helps if not (`remedy`), and whether builds need
    it; else it helps to run their bundles. `makes` is what alone a build lacks without it, where it makes the rest."""

    name: str
    found: bool
    version: str
    path: str
    remedy: str
    needed: bool = True
    makes: str = ""


@dataclass(frozen=True, slots=True)
class OpenRungs:
    """What runs the parts of a build at each rung.

    Attributes:
        rungs: bottom to top; parts: those that are run, where some are too large for this machine.
        finish: adds rows that can be told when all parts were run. facts: of the report, on what ran where.
    """

    rungs: Rungs
    parts: tuple[Part, ...]
    finish: Callable[[Ladder], None] = lambda ladder: None
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What a template computes: multiplications, products' and convolutions', and the latters' most elements."""

    multiplications: float
    widest_convolution: int


@dataclass(frozen=True, slots=True)
class Resumed:
    """A bundle that its compiler completed, and the modules compiled now and `taken` as they were compiled before."""

    bundle: Path
    command: str
    compiler: str
    compiled: tuple[str, ...]
    taken: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        modules = {"compiled": list(self.compiled), "taken": list(self.taken)}
        return {"bundle": str(self.bundle), "compiler": self.compiler, **modules}


class Toolchain(Protocol):
    """One compiler or runtime. `checkpoint`, `plan` and `cache` are what a build hands on.

    What is inherited from here stands for a toolchain that has nothing of the kind.

    Attributes:
        rungs: those of the ladder that are its own, in order; gates: theirs.
        executors: what runs its bundles, the default first; none where other programs do. takes: executor -> names of
            the options that it uses, of those of `open_executor`.
        compiler_stages: stages of actions in which the compiler runs; travelling: those whose results `mould export`
            carries to machines that have no compiler; proven: those of them that a proof vouches for, made where they
            are used.
        call_seconds: about what running a part at all its rungs costs verification, whatever the part's size.
        largest_part: bytes of float32 weights of the largest part that its rungs execute; 0 for any.
        most_convolved: elements of a convolution up to which `open_rungs` runs it in seconds; 0 for any.
        converts: weights are stored in the arithmetic of their scheme; else all but codes are as the checkpoint has
            them.
        any_shapes: `open_rungs` runs parts of any size at smaller shapes than those of the build.
        unproven: what its rungs leave open, for reports: that no device ran, say; empty where they leave nothing.
        many_sizes: `make` takes plans of several sizes, and stores what they have in common once.
        resumable: a bundle may lack what the compiler makes, and `resume` adds it where there is one.
    """

    api: int
    name: str
    rungs: tuple[Rung, ...] = ()
    gates: tuple[Gate, ...] = ()
    executors: tuple[str, ...] = ()
    takes: Mapping[str, tuple[str, ...]] = MappingProxyType({})
    compiler_stages: tuple[str, ...] = ()
    travelling: tuple[str, ...] = ()
    proven: tuple[str, ...] = ()
    converts: bool = True
    any_shapes: bool = False
    unproven: str = ""
    many_sizes: bool = False
    resumable: bool = False
    largest_part: int = 0
    most_convolved: int = 0
    call_seconds: float = 0.05

    # Before anything is made.

    def lay_out(self, settings: Settings, target: Target, checkpoint: Checkpoint) -> Any:
        """The plan's `layout`; None for a toolchain that spreads nothing. UsageError for settings that cannot be."""
        return None

    def label(self, settings: Settings) -> str:
        """What the settings that are its own add to the name of a build's folder."""
        return ""

    def facts(self, settings: Settings, plan: Plan) -> dict[str, Any]:
        """The same in keys and in the manifest's `settings`."""
        return {}

    def tools(self, plan: Plan) -> dict[str, str]:
        """What a bundle's bytes depend on besides the packages that every build uses: name -> version."""
        return {}

    def check(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> None:
        """Raise ResourceError where the devices cannot hold the model, SchemeError where the compiler refuses."""
        return

    def jobs(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings) -> list[Job]:
        """What `make` will do, and which of it the store has."""

    def devices(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> dict[str, Any]:
        """What every file will take on its device, for `plan`; empty where that is not planned.

        `files`: `file`, `device`, `phase`, bytes of `weights`, `instructions`, `runtime` and in `total`, None for what
        is not known; `budget` of a device and how many `devices` there may be; `peaks`: way to load -> bytes on each
        device, the least where something is not known; `load`: the way that fits with the fewest loads, None if none
        does; `closest`: that, or the one that takes least; `origin` of the figures: `weights` alone, `shapes`,
        `measured` nets or `compiled` ones; maybe an `estimate`: `steps`, `step_ms`, `once_ms`, `image_ms`, None for
        what is not known.
        """
        return {}

    # Making and judging.

    def make(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress, laps: Laps
    ) -> Made:
        """Everything that is in the bundle besides sidecars, from the store or made now."""

    def build_moulds(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, settings: Settings, progress: Progress
    ) -> set[str]:
        """Compile and prove what builds of any such checkpoint take from the store; the keys of the moulds."""
        raise UsageError(f"target {plan.target.name} has no moulds: {self.name} compiles nothing ahead of its weights")

    def check_record(self, record: Mapping[str, Any], outputs: Mapping[str, Path]) -> None:
        """Raise IntegrityError unless what a record of a travelling stage says is true of its outputs, as far as that
        can be told without a compiler."""
        return

    def open_rungs(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path, progress: Progress
    ) -> AbstractContextManager[OpenRungs]:
        """The rungs of all parts at the shapes of the plan, maybe smaller than `made`'s; `folder` takes their files."""

    def execute(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path
    ) -> AbstractContextManager[Rungs]:
        """The one rung at which some parts of a large model run in their compiled form; empty where none can here."""
        return nullcontext({})

    def can_execute(self, work: Work) -> bool:
        """Whether what a part computes is no more than `execute` can be asked for."""
        return True

    def read_back(self, ladder: Ladder, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made) -> None:
        """Rows on what is stored in the bundle's files, where it can be read back without being run."""
        return

    def look(
        self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
    ) -> PartFindings:
        """Values inside a part at the generic rungs and at its own, for `debug`.

        Args:
            record: makes or reads the reference run, whose shapes may be other than the plan's.

        Raises:
            UsageError: the part cannot be looked into; said before anything is recorded.
        """
        raise UsageError(f"{part.name}: no part of a build for {plan.target.name} can be looked into")

    def report(self, checkpoint: Checkpoint, plan: Plan, made: Made) -> dict[str, Any]:
        """Facts of the report that are its own: memory, devices, estimates."""
        return {}

    # Bundles and machines.

    def refuse_incomplete(self, missing: str, bundle: Path) -> None:
        """Raise ToolchainError with the next step, at the end of a build that lacks what is `missing` here."""
        return

    def resume(self, bundle: Path, store: Store, jobs: int | None, progress: Progress) -> Resumed:
        """Compile what a bundle lacks, without its checkpoint; UsageError where bundles lack nothing."""
        raise UsageError(f"{bundle} is complete: what {self.name} makes is all made by the build")

    def open_executor(self, bundle: Bundle, name: str | None, options: Mapping[str, Any]) -> Executor:
        """What runs a bundle's parts; UsageError where it cannot, ToolchainError where something is not installed."""

    def check_parts(self, bundle: Bundle, fresh: Collection[str]) -> None:
        """Raise IntegrityError unless what the manifest says of every part is true of its file: net, digest and size,
        inputs and outputs; and unless the files that running it opens are all among the manifest's.

        As it stands: every part has a file of its own, and its digest is that file's.

        Args:
            fresh: paths of the files whose bytes may be new. The others were found right before, by the same manifest.
        """
        files = {file.path: file for file in bundle.manifest.files}
        for entry in bundle.manifest.parts:
            file = files[entry.file]
            if (entry.digest, entry.size) != (file.digest, file.size):
                raise refuse_part(
                    bundle, entry.name,
                    f"has the digest {entry.digest} ({entry.size} bytes), its file {entry.file} {file.digest} "
                    f"({file.size} bytes)",
                )  # fmt: skip

    def doctor(self) -> Sequence[ToolStatus]:
        """What is installed of what it takes, without starting anything."""
        return ()


def all_toolchains() -> dict[str, Toolchain]:
    """Those of this package and those that are registered, by name. Imports none of their compilers."""
    return {name: _own_toolchain(name) for name in _own_names()} | _plugins()


def find_toolchain(name: str) -> Toolchain:
    """The toolchain called `name`; UsageError with those that there are otherwise."""
    if name in _own_names():
        return _own_toolchain(name)
    if name not in _plugins():
        raise UsageError(
            f"no toolchain is called {name!r}; there are {', '.join((*_own_names(), *_plugins()))}: install the "
            "distribution that the target belongs to"
        )
    return _plugins()[name]


@cache
def _own_names() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(toolchains.__path__))


@cache
def _plugins() -> dict[str, Toolchain]:
    return {found.name: found for found in find_plugins(GROUP, Toolchain, API, _own_names())}


def _own_toolchain(name: str) -> Toolchain:
    toolchain: Toolchain = importlib.import_module(f"{toolchains.__name__}.{name}.toolchain").TOOLCHAIN
    return toolchain


def toolchain_of(target: Target) -> Toolchain:
    """The toolchain that compiles for a target."""
    return find_toolchain(target.toolchain)


def open_executor(bundle: Bundle, name: str | None = None, **options: Any) -> Executor:
    """What runs a bundle's parts.

    Args:
        name: of its toolchain's executors, the default for the bundle if None.
        options: `threads` of one operation, 0 for what the runtime thinks best; `device`, the number of a board or
            what a runtime calls one; `fast`: activations of packed weights are rounded to 8 bits; `quantize`: weights
            are packed now; `no-t5-padding`: text may have fewer tokens than the bundle. None and False stand for what
            was not given.

    Raises:
        UsageError: it cannot run this bundle, or not so. ToolchainError: its library, device or compiled files are
        missing.
    """
    toolchain = toolchain_of(bundle.target)
    legal = toolchain.executors
    if not legal:
        return toolchain.open_executor(bundle, name, options)
    if name is not None and name not in legal:
        known = [one for other in all_toolchains().values() for one in other.executors]
        rule = f"a bundle for {bundle.target.name} is run by {' or '.join(legal)}"
        raise UsageError(
            f"executor {name}: {rule}" + ("" if name in known else f"; there are {', '.join(known)} in all")
        )
    chosen = name or legal[0]
    taken = toolchain.takes.get(chosen, ())
    for option, value in options.items():
        if option != "fast" and value is not None and value is not False and option not in taken:
            given = f"--{option}" if value is True else f"--{option} {value}"
            raise UsageError(f"{given}: the executor {chosen} does not use it; leave it out")
    if options.get("fast") and not ("fast" in taken and any("W" in part.scheme for part in bundle.manifest.parts)):
        schemes = ", ".join(dict.fromkeys(part.scheme for part in bundle.manifest.parts))
        raise UsageError(
            f"--fast: it is for packed weights (W4BF16) on a CPU, and this is {chosen} with {schemes}; leave it out"
        )
    return toolchain.open_executor(bundle, name, options)
