"""What other distributions add through entry points: found lazily, checked, and left out with a sentence if unsound."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import sys
from collections.abc import Collection
from functools import cache
from typing import Any


def find_plugins(group: str, protocol: Any, api: int | None, taken: Collection[str]) -> tuple[Any, ...]:
    """The objects that entry points of `group` name, each with all that `protocol` has and of this API.

    Args:
        api: that of `protocol`; None for plain data, which this package's own class has checked.
        taken: names that exist already.

    What cannot be used is told on standard error, once, and left out: the rest of fluxkiln goes on.
    """
    found: list[Any] = []
    names = set(taken)
    for entry in sorted(importlib.metadata.entry_points(group=group), key=lambda entry: entry.name):
        who = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        try:
            made = entry.load()
        except Exception as error:  # whatever a stranger's module raises while it is imported
            _leave_out(entry, who, f"it cannot be imported ({type(error).__name__}: {error})", "mend or uninstall it")
            continue
        lacking = [name for name in _members(protocol) if not _has(made, protocol, name)]
        if api is not None and getattr(made, "api", None) != api:
            why = f"it was written for version {getattr(made, 'api', None)} of the interface, this has {api}"
            _leave_out(entry, who, why, "install versions of both that fit")
        elif lacking:
            _leave_out(entry, who, f"it lacks {', '.join(lacking)}", "ask its makers for what the interface has")
        elif made.name in names:
            _leave_out(entry, who, f"there is a {made.name} already", "uninstall one of them")
        else:
            names.add(made.name)
            found.append(made)
    return tuple(found)


def _members(protocol: Any) -> list[str]:
    """What a protocol asks for: its annotations and its methods."""
    own = [name for name in vars(protocol) if not name.startswith("_") and name != "api"]
    return sorted({*own, *getattr(protocol, "__annotations__", {})} - {"api"})


def _has(made: Any, protocol: Any, name: str) -> bool:
    """Whether an object has a member; what it inherits from the protocol itself counts where that does something."""
    inherited = getattr(type(made), name, None)
    return hasattr(made, name) and not (name in _holes(protocol) and inherited is vars(protocol)[name])


@cache
def _holes(protocol: Any) -> frozenset[str]:
    """The methods of a protocol that have a docstring and no body."""
    (tree,) = ast.parse(inspect.getsource(protocol)).body
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return frozenset(one.name for one in functions if all(isinstance(line, ast.Expr) for line in one.body))


def _leave_out(entry: importlib.metadata.EntryPoint, who: str, why: str, remedy: str) -> None:
    print(f"warning: {entry.name} of {who} is left out: {why}; {remedy}", file=sys.stderr)
