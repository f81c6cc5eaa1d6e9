"""Targets as data, one file per chip: each module of this folder has a `TARGET`.

Other distributions add theirs through the entry-point group `fluxkiln.targets`.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TYPE_CHECKING

from fluxkiln.errors import UsageError
from fluxkiln.plugins import find_plugins

if TYPE_CHECKING:
    from fluxkiln.compile.target import Target


GROUP = "fluxkiln.targets"


@cache
def all_targets() -> dict[str, Target]:
    """Those of this package and those that are registered, by name."""
    from fluxkiln.compile.target import Target

    own = {name: _own_target(name) for name in _own_names()}
    found = own | {target.name: target for target in find_plugins(GROUP, Target, None, own)}
    return dict(sorted(found.items()))


def target_names() -> tuple[str, ...]:
    """All targets, in the order of their names."""
    return tuple(all_targets())


def find_target(name: str) -> Target:
    """The target called `name`; UsageError with the legal names otherwise."""
    if name in _own_names():
        return _own_target(name)
    if name not in all_targets():
        raise UsageError(f"no target is called {name!r}; there are {', '.join(all_targets())}")
    return all_targets()[name]


@cache
def _own_names() -> tuple[str, ...]:
    return tuple(module.name for module in pkgutil.iter_modules(__path__))


def _own_target(name: str) -> Target:
    target: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    return target
