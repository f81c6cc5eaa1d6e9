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

    What cannot be used is told on standard error and left out: the rest of fluxkiln goes on.
    """
    found: dict[str, Any] = {}
    for entry in sorted(importlib.metadata.entry_points(group=group), key=lambda entry: entry.name):
        who = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
        try:
            made = entry.load()
            fault = _fault(made, protocol, api, {*taken, *found})
        except (Exception, SystemExit) as error:  # whatever a stranger's module raises while it is imported
            fault = f"it cannot be imported ({type(error).__name__}: {error}); mend or uninstall it"
        if fault:
            print(f"warning: {entry.name} of {who} is left out of {group}: {fault}", file=sys.stderr)
        else:
            found[made.name] = made
    return tuple(found.values())


def _fault(made: Any, protocol: Any, api: int | None, taken: Collection[str]) -> str:
    """Why an object cannot be used, and what to do; empty where it can."""
    if isinstance(made, type):
        return f"it is the class {made.__name__}, not an object of it; have the entry point name one"
    if api is not None and getattr(made, "api", None) != api:
        found = getattr(made, "api", None)
        return f"it was written for version {found} of the interface, this has {api}; install versions of both that fit"
    members = {*(name for name in vars(protocol) if not name.startswith("_")), *protocol.__annotations__} - {"api"}
    if lacking := [name for name in sorted(members) if not _has(made, protocol, name)]:
        return f"it lacks {', '.join(lacking)}; ask its makers for a version that has what the interface has"
    if not isinstance(made.name, str):
        return f"its name is {made.name!r}, not a word; ask its makers for a version with one"
    if made.name in taken:
        return f"there is a {made.name} already; uninstall one of them"
    return ""


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
