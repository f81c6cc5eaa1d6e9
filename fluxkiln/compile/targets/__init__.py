"""Targets as data, one file per chip: each module of this folder has a `TARGET`."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from fluxkiln.errors import UsageError

if TYPE_CHECKING:
    from fluxkiln.compile.target import Target


def target_names() -> tuple[str, ...]:
    """All targets, by the names of the files here."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def find_target(name: str) -> Target:
    """The target called `name`; UsageError with the legal names otherwise."""
    if name not in target_names():
        raise UsageError(f"no target is called {name!r}; there are {', '.join(target_names())}")
    target: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    return target
