"""What fluxkiln rewrites in diffusers, transformers and torch, and the gate in front of each rewrite.

A patch either replaces an attribute while a template is traced (`replacement`), or is a wrapper module that
re-states an upstream `forward` for one part. Both are only valid for the upstream source they were written against, so
every patch carries the sha256 of `inspect.getsource` of each function it stands for.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import inspect
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from fluxkiln.errors import PatchError

# every thread sees a replaced attribute, so they take turns; one thread that nests a patch is refused by its digest
_IN_PLACE = threading.RLock()


@dataclass(frozen=True, slots=True)
class Patch:
    """One rewrite.

    Attributes:
        name: what `fluxkiln patches` calls it.
        replaces: dotted upstream name -> {sha256 of its source: package version it was checked with}.
        reason: why the compiler needs it; until: when it can go.
        kinds: the kinds of part that are traced with it.
        replacement: for attribute patches, dotted name -> the function put there while tracing.
        formats: the graph formats it applies to; empty means all.
    """

    name: str
    replaces: Mapping[str, Mapping[str, str]]
    reason: str
    until: str
    kinds: tuple[str, ...]
    replacement: Mapping[str, Callable[..., Any]] | None = None
    formats: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PatchStatus:
    """A patch as it stands in this environment. `changed` names upstream functions whose source is unknown."""

    patch: Patch
    installed: Mapping[str, str]
    changed: tuple[str, ...]


def patches_for(patches: Iterable[Patch], kind: str, graph_format: str) -> tuple[Patch, ...]:
    """Those that a template of `kind` in `graph_format` is traced with."""
    return tuple(
        patch for patch in patches if kind in patch.kinds and (not patch.formats or graph_format in patch.formats)
    )


def _locate(dotted: str) -> tuple[Any, str]:
    """The object that holds the attribute `dotted` names, and the attribute's own name."""
    pieces = dotted.split(".")
    for cut in range(len(pieces) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(pieces[:cut]))
        except ModuleNotFoundError as error:
            if error.name and ".".join(pieces[:cut]).startswith(error.name):
                continue
            raise
        try:
            for piece in pieces[cut:-1]:
                owner = getattr(owner, piece)
            getattr(owner, pieces[-1])
        except AttributeError:
            break
        return owner, pieces[-1]
    version = _version(pieces[0])
    raise PatchError(
        f"{dotted} does not exist in {pieces[0]} {version}; fluxkiln's patch was written for another version: "
        "install the versions pinned in constraints.txt"
    )


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def source_digest(dotted: str) -> str:
    """sha256 of the source text of the function that `dotted` names now."""
    owner, name = _locate(dotted)
    target = inspect.getattr_static(owner, name)
    function = getattr(target, "__func__", target)
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()


def examine_patches(patch: Patch) -> PatchStatus:
    """Compare what `patch` stands for with what is installed."""
    changed = []
    for dotted, known in patch.replaces.items():
        try:
            if source_digest(dotted) not in known:
                changed.append(dotted)
        except PatchError:
            changed.append(dotted)
    packages = sorted({dotted.split(".")[0] for dotted in patch.replaces})
    return PatchStatus(patch, {package: _version(package) for package in packages}, tuple(changed))


def check_patches(patches: Iterable[Patch]) -> None:
    """Raise PatchError at the first patch whose upstream source is not one it was checked against."""
    for patch in patches:
        status = examine_patches(patch)
        if status.changed:
            dotted = status.changed[0]
            package = dotted.split(".")[0]
            checked = ", ".join(sorted(set(patch.replaces[dotted].values())))
            raise PatchError(
                f"patch {patch.name}: {dotted} of {package} {status.installed[package]} is not the source it was "
                f"written for (checked with {checked}); install the versions pinned in constraints.txt, or compare "
                "the two sources and add the new digest to the patch"
            )


@contextmanager
def apply_patches(patches: Iterable[Patch]) -> Iterator[None]:
    """Check the patches, put their replacements in place, and put the very same objects back on the way out.

    Other threads that apply patches wait meanwhile.

    Raises:
        PatchError: an upstream function is not the one the patch was checked against.
    """
    patches = tuple(patches)
    with _IN_PLACE, ExitStack() as stack:
        check_patches(patches)
        for patch in patches:
            for dotted, function in (patch.replacement or {}).items():
                owner, name = _locate(dotted)
                if name not in vars(owner):
                    raise PatchError(
                        f"patch {patch.name}: {dotted} is inherited, not defined where the patch expects it; "
                        "install the versions pinned in constraints.txt"
                    )
                # the raw dictionary entry, so that static and class methods come back as they were
                stack.callback(setattr, owner, name, vars(owner)[name])
                setattr(owner, name, function)
        yield
