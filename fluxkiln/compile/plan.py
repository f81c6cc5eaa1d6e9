"""What is built, and what it becomes: the plan that every stage is given, and the values that stages hand on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.targets import Target
from fluxkiln.patches.sizes import as_alone, parts_of_size
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Part, Shapes, list_kinds


@dataclass(frozen=True, slots=True)
class Plan:
    """What is built for which target, of which parts, at which shapes.

    Attributes:
        shapes: the first size. further: all others; see `Part.sizes`.
        schemes: kind -> how its weights are stored; exceptions: base of a part -> how its own are, where otherwise.
        layout: how the target's toolchain spreads a model over cores, a value of its own; None where it does not.
        folder: of the build; logs and unfinished files go below it.
    """

    target: Target
    shapes: Shapes
    schemes: Mapping[str, Scheme]
    parts: tuple[Part, ...]
    folder: Path
    layout: Any = None
    exceptions: Mapping[str, Scheme] = field(default_factory=dict)
    further: tuple[Shapes, ...] = ()

    @property
    def sizes(self) -> tuple[Shapes, ...]:
        return (self.shapes, *self.further)

    @property
    def logs(self) -> Path:
        """Where the compilers' logs go."""
        return self.folder / "logs"

    @property
    def bundle(self) -> Path:
        """Where the bundle goes."""
        return self.folder / "bundle"

    @property
    def quantized(self) -> bool:
        """Whether any part has quantized weights."""
        return any(self.scheme(part).weight_bits for part in self.parts)

    def kinds(self) -> tuple[str, ...]:
        """The kinds of the parts, each once, in the order they run."""
        return tuple(list_kinds(self.parts))

    def scheme(self, part: Part) -> Scheme:
        return self.exceptions.get(part.base, self.schemes[part.kind])

    def scheme_names(self) -> dict[str, str]:
        """Kind -> the name of its scheme, and part -> that of its own, where it has one."""
        own = {part.name: self.scheme(part).name for part in self.parts if part.name in self.exceptions}
        return {kind: self.schemes[kind].name for kind in self.kinds()} | own

    def of(self, part: Part) -> Plan:
        """The piece of `alike` that a part is in: there its kind has its scheme, and its mould's net a name."""
        return next((piece for piece in self.alike() if part in piece.parts), self)

    def each_kind(self) -> Iterator[tuple[Plan, str]]:
        """Every kind in every scheme and size that parts of it have: a piece of `alike`, and a kind that is in it."""
        return ((piece, kind) for piece in self.alike() for kind in piece.kinds())

    def alike(self) -> tuple[Plan, ...]:
        """The plan in as few pieces as it takes to have one scheme and one size for all parts of a kind; itself where
        they have."""
        if not self.exceptions and not self.further:
            return (self,)
        pieces: list[tuple[Shapes, dict[str, Scheme], list[Part]]] = []
        for part in self.parts:
            scheme, shapes = self.scheme(part), part.sizes[0] if part.sizes else self.shapes
            fitting = (piece for piece in pieces if piece[0] == shapes and piece[1].get(part.kind, scheme) == scheme)
            if (piece := next(fitting, None)) is None:
                pieces.append(piece := (shapes, {}, []))
            piece[1][part.kind] = scheme
            piece[2].append(part)
        return tuple(
            replace(
                self, shapes=shapes, further=(), schemes={**self.schemes, **schemes}, parts=tuple(parts), exceptions={}
            )
            for shapes, schemes, parts in pieces
        )

    def first(self, count: int) -> Plan:
        """The plan of its first sizes."""
        sizes = self.sizes[:count]
        kept = ((part, tuple(one for one in part.sizes if one in sizes)) for part in self.parts)
        parts = tuple(replace(part, sizes=own) for part, own in kept if own)
        return replace(self, further=sizes[1:], parts=parts)

    def at(self, shapes: Shapes) -> Plan:
        """The plan of one of the sizes alone."""
        own = tuple(as_alone(part) for part in parts_of_size(self.parts, shapes))
        return replace(self, shapes=shapes, further=(), parts=own)


@dataclass(frozen=True, slots=True)
class Binary:
    """What a part's compiled form is made of, and once it has been made, what it is.

    Attributes:
        net: what it is called in the file of the bundle that holds it.
        facts: `inputs` and `outputs` as [name, dtype, shape], `weight_bytes`, `instruction_bytes`, `runtime_bytes`; and
            what its toolchain adds.
        made: `cast`, `compiled`, `linked`, ..., for people.
        blobs: what its toolchain keeps of it in the store, by names of its own.
        digest, size: of the part's weights as they are stored.
        hit: it was in the store.
    """

    part: Part
    net: str
    scheme: Scheme
    facts: Mapping[str, Any]
    made: str
    blobs: Mapping[str, Blob] = field(default_factory=dict)
    digest: str = ""
    size: int = 0
    hit: bool = False


@dataclass(frozen=True, slots=True)
class BundleFile:
    """A file of the bundle and the names of the parts whose nets it holds, in order."""

    name: str
    blob: Blob
    parts: tuple[str, ...] = ()
    hit: bool = False


@dataclass(frozen=True, slots=True)
class Made:
    """What a toolchain made of a plan.

    Attributes:
        missing: why the bundle is not complete here (a compiler that there is not), or empty.
        own: what its own rungs and report need of it, a value of its own.
        shapes: the one size that it is of, where it was made for several.
    """

    binaries: tuple[Binary, ...]
    files: tuple[BundleFile, ...]
    missing: str = ""
    own: Any = None
    shapes: Shapes | None = None

    def at(self, shapes: Shapes) -> Made:
        """What is there for one of several sizes, as `Plan.at` calls the parts; nets keep their names."""
        by_part = {binary.part: binary for binary in self.binaries}
        own = [by_part[part] for part in parts_of_size(tuple(by_part), shapes)]
        bases = {binary.part.name: binary.part.base for binary in own}
        files = (replace(file, parts=tuple(bases[name] for name in file.parts if name in bases)) for file in self.files)
        binaries = tuple(replace(one, part=as_alone(one.part)) for one in own)
        return replace(self, binaries=binaries, files=tuple(files), shapes=shapes)


@dataclass(frozen=True, slots=True)
class Job:
    """One job of a build. `what` is a part, a kind or a file; `weights` how many numbers it works on.

    `estimate_ms` is how long the compiler expects one run of a mould of the store to take on the chip, `seconds` what
    CPU time such a job took where it was measured.
    """

    stage: str
    what: str
    kind: str
    scheme: str
    memory_bytes: int
    in_store: bool
    weights: int = 0
    estimate_ms: float | None = None
    seconds: float | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "weights"}
