"""The code version of a stage: a digest over the sources that its function reaches, read and never imported.

From a function the walk goes to every definition that it names, in its own module and in others, and on from there;
imports inside functions count, imports for type checkers alone do not. A module of which anything is reached counts
whole; of one that runs stages only the definitions that are reached. Other stages are not entered: what they make is
among the inputs of a key, by its digest. Of an object that is handed in, a model say, the members count that are named.

What runs in another interpreter or is found by name counts as well, where it is spelt out: a file or folder beside a
module that reads `__file__` and names it; a module whose dotted name is a string; all modules of a package, where one
is found by name: `f"fluxkiln.methods.{name}"`, `f"{__name__}.{name}.model"`.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import resolve_name
from itertools import pairwise
from pathlib import Path

from fluxkiln.errors import FluxkilnError

PACKAGE = Path(__file__).parents[1]
# Entered only where a walk starts there: they decide nothing else, and everything would be made anew with each change.
GROUND: Mapping[str, str] = {
    "fluxkiln": "its version says which release made something, not what",
    "fluxkiln.errors": "what is raised in place of a result",
    "fluxkiln.progress": "what is told meanwhile",
    "fluxkiln.settings": "what is asked for; what of it decides a result stands in the key",
    "fluxkiln.digests": "makes keys: others if it makes them otherwise",
    "fluxkiln.files": "writes bytes as they are",
    "fluxkiln.artifacts.*": "keeps bytes as they are, under these keys",
    "fluxkiln.patches.registry": "finds a checkpoint's model, which counts by itself where it decides something",
    "fluxkiln.patches.model": "says what a model has",
    "fluxkiln.compile.toolchain": "finds toolchains, which count their own code",
    "fluxkiln.compile.targets": "finds targets; what of one decides a result stands in the key",
    "fluxkiln.compile.targets.*": "the same",
    "fluxkiln.plugins": "finds what others add",
    "fluxkiln.quantize.methods": "what one asks of a graph stands in the key; how it rounds counts with `find_method`",
    "fluxkiln.quantize.methods.*": "the same",
}
# A module that imports from these runs stages; a function with one of those is a stage, or makes a key.
_RUNS_STAGES = re.compile(r"^from fluxkiln\.artifacts\.(?:actions|code) import", re.MULTILINE)
_IS_STAGE = re.compile(r"\b(?:Action|run_action)\(|-> Action:")

# Python as far as names and imports go; parsing it takes ten times as long. A test holds the two equal.
_QUOTED = (
    r'"""[^"\\]*(?:(?:\\[\s\S]|"(?!""))[^"\\]*)*"""|"[^"\\]*(?:\\[\s\S][^"\\]*)*"|'
    r"'''[^'\\]*(?:(?:\\[\s\S]|'(?!''))[^'\\]*)*'''|'[^'\\]*(?:\\[\s\S][^'\\]*)*'"
)
_TEXT = re.compile(rf"{_QUOTED}|#.*")
_START = re.compile(rf"^(?=[A-Za-z_@#])|{_QUOTED}|#.*", re.MULTILINE)
_DEFINES = re.compile(r"(?:@.*\n(?:[ \t)].*\n)*)*(?:async def|def|class) (\w+)|((?:\w+, )*\w+)(?:: .*?)? = ")
_IMPORT = re.compile(r"(?:^|[:;])[ \t]*(?:from[ \t]+([\w.]+)[ \t]+)?import[ \t]+(\([^)]*\)|.*)", re.MULTILINE)
_FOR_TYPES = re.compile(r"^([ \t]*)if TYPE_CHECKING:.*\n(?:\1[ \t]+.*\n|[ \t]*\n)*", re.MULTILINE)
_NAME = re.compile(r"(?<![\w.])[A-Za-z_]\w*\b(?!=[^=}])")
_IMPORTED = re.compile(r"([\w.*]+)(?:\s+as\s+(\w+))?")
_EVALUATED = re.compile(r"\{([^{}]*)")
_STRING = re.compile(r"""["']([\w.-]+)["']""")
_BY_NAME = re.compile(r"""f["'](\w+(?:\.\w+)*|\{__name__\})\.\{[^{}"']+\}((?:\.\w+)*)["']""")
_MEMBER = re.compile(r"\b([A-Za-z_]\w*)(?=\.([A-Za-z_]\w*))")
_CLASS = re.compile(r"(?:@.*\n(?:[ \t)].*\n)*)*class (\w+)[\s\S]*?:\n")
_NO_SOURCES = ("__pycache__", "trained")
# under which a module has the statements that run in any case
_ALWAYS = ""

# a module, and the name in it that is meant, or None for all of it
Reached = tuple[str, str | None]
Definition = tuple[str, str]


@cache
def code_version(*functions: Callable[..., object], **objects: type) -> str:
    """A digest over the sources that decide what `functions` make; they are of the top level of their modules.

    Args:
        objects: classes of what they are handed and use members of, a `model` say, by its name in all that is reached.

    Raises FluxkilnError: a function is not of the top level of a module, or has no source.
    """
    classes = [(name, one.__module__, one.__qualname__) for name, last in objects.items() for one in last.__mro__]
    return digest_sources(reached_sources([(one.__module__, one.__qualname__) for one in functions], classes))


@cache
def package_version(package: Path = PACKAGE) -> str:
    """A digest over every file of fluxkiln, TOML and templates included.

    Bytecode and hidden files do not count, nor trained weights, which count by their own digests.
    """
    return digest_sources({path.relative_to(package).as_posix(): path.read_bytes() for path in _files(package)})


def digest_sources(sources: Mapping[str, bytes]) -> str:
    """`sha256:<hex>` over paths and what stands there."""
    digest = hashlib.sha256()
    for path, source in sorted(sources.items()):
        digest.update(f"{path}\0".encode())
        digest.update(hashlib.sha256(source).digest())
    return "sha256:" + digest.hexdigest()


def reached_sources(
    starts: Iterable[Definition],
    classes: Iterable[tuple[str, str, str]] = (),
    root: Path = PACKAGE.parent,
    read: Callable[[Path], bytes] = Path.read_bytes,
) -> dict[str, bytes]:
    """What functions reach: path -> its source, or of a module with stages, the definitions that are reached.

    Args:
        starts: module and name of each function.
        classes: of objects that they are handed: the object's name there, module and name of a class of it.
        root: the folder of the package; paths are relative to it, so that they do not tell where it is installed.
        read: the bytes of a file.

    Raises FluxkilnError: there is no such function.
    """
    starts = frozenset(starts)
    tops = {module.partition(".")[0] for module in (*dict(starts), *(one for _, one, _ in classes))} - {PACKAGE.name}
    walk = _Walk(
        starts,
        frozenset(module for _, module, _ in classes),
        {PACKAGE.name: root, **{top: _home(top) for top in tops}},
        read,
    )
    pending: list[Reached] = list(starts)
    for receiver, module, name in classes:
        walk.open_class(receiver, module, name)
    seen: set[Reached] = set()
    while pending:
        target = pending.pop()
        if target not in seen:
            seen.add(target)
            pending += walk.enter(*target)
        if not pending:
            pending += walk.enter_members()
    return walk.whole | {path: "".join(sorted(found)).encode() for path, found in walk.parts.items() if found}


@dataclass(frozen=True, slots=True)
class _Uses:
    """What a statement refers to: names of its module, its own imports, strings that may name modules and files.

    `members` are those of names, `packages` what modules are found in by name, and what follows that.
    """

    names: frozenset[str]
    imports: frozenset[Reached]
    strings: frozenset[str]
    packages: frozenset[tuple[str, str]]
    members: frozenset[tuple[str, str]]
    is_stage: bool


@dataclass(frozen=True, slots=True)
class _Module:
    """A module's source by statement.

    Attributes:
        path: relative to the folder that its package is in; package: what its relative imports count from.
        defined: name -> the statements that define it; imported: name -> what it stands for.
        beside: what lies in its folder, where it reads `__file__`.
    """

    path: str
    package: str
    source: bytes
    has_stages: bool
    defined: Mapping[str, Sequence[str]]
    imported: Mapping[str, Sequence[Reached]]
    beside: frozenset[str]


@dataclass(slots=True)
class _Walk:
    """What was reached so far.

    Attributes:
        apart: modules with classes of objects, which count by definition as well.
        homes: top-level package -> the folder it is in: fluxkiln, and the plug-in that a function is of.
        whole: path -> source. parts: of modules with stages, path -> statements.
        members: of classes of objects, by the object's name and theirs: module -> statements that are not reached yet.
        used: names and members that statements have used.
    """

    starts: frozenset[Definition]
    apart: frozenset[str]
    homes: Mapping[str, Path]
    read: Callable[[Path], bytes]
    whole: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, set[str]] = field(default_factory=dict)
    modules: dict[str, _Module | None] = field(default_factory=dict)
    members: dict[tuple[str, str], list[tuple[str, str]]] = field(default_factory=dict)
    used: set[tuple[str, str]] = field(default_factory=set)

    def enter(self, name: str, wanted: str | None) -> Iterator[Reached]:
        """Count what is wanted of a module; what that refers to."""
        module, is_start = self.module(name), (name, wanted) in self.starts
        if is_start and (module is None or wanted not in module.defined):
            raise FluxkilnError(f"{name}.{wanted} is not of the top level of a source file, so its code has no version")
        if module is None:
            return
        keys = module.defined.keys() if wanted is None else {wanted, _ALWAYS}
        statements = {one for key in keys for one in module.defined.get(key, ()) if is_start or not _uses(one).is_stage}
        self.count(module, statements)
        for target in module.imported.get(str(wanted), ()):
            yield self.resolve(module, target)
        for statement in statements:
            yield from self.follow(name, module, statement)

    def open_class(self, receiver: str, name: str, wanted: str) -> None:
        """Count a class of the object that is called `receiver`, and keep its members until they are used."""
        module = self.module(name)
        for statement in module.defined.get(wanted, ()) if module else ():
            if module and (head := _CLASS.match(statement)):
                self.count(module, {head[0]})
                members, _ = _top_level(re.sub(r"^    ", "", statement[head.end() :], flags=re.MULTILINE))
                for member, parts in members.items():
                    self.members.setdefault((receiver, member), []).extend((name, part) for part in parts)
                    self.used |= {(receiver, member)} if member == _ALWAYS or member.startswith("__") else set()

    def enter_members(self) -> Iterator[Reached]:
        """What those members of objects refer to that have been used by now."""
        while keys := self.used & self.members.keys():
            key = keys.pop()
            for name, statement in self.members.pop(key):
                if module := self.module(name):
                    self.count(module, {statement})
                    self.used |= {(key[0], member) for owner, member in _uses(statement).members if owner == "self"}
                    yield from self.follow(name, module, statement)

    def count(self, module: _Module, statements: set[str]) -> None:
        """Count these statements, or all of a module that runs no stages."""
        if module.has_stages:
            self.parts.setdefault(module.path, set()).update(statements)
        else:
            self.whole[module.path] = module.source

    def follow(self, name: str, module: _Module, statement: str) -> Iterator[Reached]:
        """What a statement refers to; files of its module's folder that it names are counted."""
        uses = _uses(statement)
        self.used |= uses.members
        yield from ((name, other) for other in uses.names & module.defined.keys())
        imports = {target for other in uses.names & module.imported.keys() for target in module.imported[other]}
        yield from (self.resolve(module, target) for target in imports | uses.imports)
        for string in uses.strings:
            if string in module.beside and string.endswith(".py"):
                yield f"{module.package}.{string.removesuffix('.py')}", None
            elif string in module.beside:
                home = self.homes[name.partition(".")[0]]
                for path in _files(home.joinpath(module.path).with_name(string)):
                    self.whole[path.relative_to(home).as_posix()] = self.read(path)
            elif "." in string:
                yield string, None
        for base, rest in uses.packages:
            base = name if base == "{__name__}" else base
            if place := self.place(base):
                yield from ((f"{base}.{entry.stem}{rest}", None) for entry in Path(*place).parent.iterdir())

    def resolve(self, module: _Module, target: Reached) -> Reached:
        """What an import in a module stands for: a module of that name, or a name in a module."""
        base, name = resolve_name(target[0], module.package), target[1]
        return (f"{base}.{name}", None) if name and self.place(f"{base}.{name}") else (base, name)

    def place(self, module: str) -> tuple[Path, str] | None:
        """The folder that the package of a module is in, and its path from there; None where it has no source here."""
        home, base = self.homes.get(module.partition(".")[0]), module.replace(".", "/")
        for path in (f"{base}.py", f"{base}/__init__.py"):
            if home and os.path.isfile(f"{home}/{path}"):
                return home, path
        return None

    def module(self, name: str) -> _Module | None:
        """The module of this name; None for one of the ground or of another package."""
        if name in self.modules:
            return self.modules[name]
        package = name.rpartition(".")[0]
        started = {module for module, _ in self.starts}
        is_ground = started.isdisjoint((name, package)) and (name in GROUND or f"{package}.*" in GROUND)
        self.modules[name] = None
        if not is_ground and (place := self.place(name)):
            source = self.read(Path(*place))
            text = source.decode()
            has_stages = name in started | self.apart or _RUNS_STAGES.search(text) is not None
            beside = frozenset(os.listdir(Path(*place).parent) if "__file__" in text else ())
            owner = name if place[1].endswith("/__init__.py") else package
            self.modules[name] = _Module(place[1], owner, source, has_stages, *_top_level(text), beside)
        return self.modules[name]


def _home(top: str) -> Path:
    """The folder that a top-level module or package lies in; it has been imported."""
    file = Path(getattr(sys.modules.get(top), "__file__", None) or "")
    return file.parent.parent if file.name == "__init__.py" else file.parent


def _files(base: Path) -> Iterator[Path]:
    """A file, or all of a folder that are sources or data."""
    if base.is_file():
        yield base
    for folder, folders, names in os.walk(base):
        folders[:] = [name for name in folders if name not in _NO_SOURCES and not name.startswith(".")]
        sources = (name for name in names if not (name.startswith((".", "#")) or name.endswith((".pyc", "~"))))
        yield from (Path(folder, name) for name in sources)


@cache
def _top_level(text: str) -> tuple[Mapping[str, list[str]], Mapping[str, list[Reached]]]:
    """A module's statements by the names that they define, and what it imports by the name that it has here."""
    starts = [found.start() for found in _START.finditer(text) if found.start() == found.end()]
    starts = starts[:1] + [start for last, start in pairwise(starts) if text[last] != "@"]  # decorators come before
    defined: dict[str, list[str]] = {}
    imported: dict[str, list[Reached]] = {}
    for start, end in pairwise([*starts, len(text)]):
        statement = text[start:end].rstrip() + "\n"
        if statement.startswith(("from ", "import ")):
            for name, target in _imports(_without_text(statement)):
                imported.setdefault(name, []).append(target)
        elif not statement.startswith(("#", "if TYPE_CHECKING:")):
            found = _DEFINES.match(statement)
            for name in (found[1] or found[2]).split(", ") if found else [_ALWAYS]:
                defined.setdefault(name, []).append(statement)
    return defined, imported


@cache
def _uses(statement: str) -> _Uses:
    code = _FOR_TYPES.sub("", _without_text(statement))
    return _Uses(
        frozenset(_NAME.findall(code)),
        frozenset(target for _, target in _imports(code)),
        frozenset(_STRING.findall(statement)),
        frozenset(_BY_NAME.findall(statement)),
        frozenset(_MEMBER.findall(code)),
        statement.startswith(("def ", "@")) and _IS_STAGE.search(code) is not None,
    )


def _without_text(source: str) -> str:
    """Source without comments and strings; what f-strings evaluate stays."""

    def evaluated(found: re.Match[str]) -> str:
        before = source[max(0, found.start() - 2) : found.start()].lower()
        return " ".join(["", *_EVALUATED.findall(found[0]), ""]) if "f" in before else ""

    return _TEXT.sub(evaluated, source)


def _imports(code: str) -> Iterator[tuple[str, Reached]]:
    """What imports in a piece of code bind: a name, and the module, with its leading dots, and the name in it."""
    for base, listed in _IMPORT.findall(code) if "import" in code else ():
        for name, alias in _IMPORTED.findall(listed):
            target = (base, None if name == "*" else name) if base else (name, None)
            yield alias or (name if base else name.partition(".")[0]), target
