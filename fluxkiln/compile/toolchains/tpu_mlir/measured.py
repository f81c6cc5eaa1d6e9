"""Nets that were compiled and measured once, shipped as a table: what a plan takes where a build's own moulds are not.

`measured.json`: `command` that wrote it and its `conditions`; `nets`: what `net_key` has of each, the facts of the
compiled net, and `seconds` of CPU time of its compile where they were measured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import count_elements
from fluxkiln.compile.tensors import part_refs
from fluxkiln.export.checkpoint import Checkpoint

TABLE = Path(__file__).with_name("measured.json")
KEY = ("chip", "scheme", "kind", "key")
NET_FACTS = ("weight_bytes", "instruction_bytes", "runtime_bytes", "estimate_ms")


def net_key(checkpoint: Checkpoint, plan: Plan, kind: str) -> tuple[str, str, str, str]:
    """What two nets have in common that take the same time and memory: chip, scheme, kind; weights, inputs' shapes."""
    part = next(part for part in reversed(plan.parts) if part.kind == kind)
    specs = checkpoint.model.part_inputs(kind, checkpoint.configs, plan.shapes)
    inputs = " ".join("x".join(map(str, spec.shape)) for spec in specs)
    weights = count_elements(part_refs(checkpoint, plan, part))
    return plan.target.chip, plan.schemes[kind].compiled_name, kind, f"{weights} {inputs}"


def find_measured(checkpoint: Checkpoint, plan: Plan, kind: str) -> Mapping[str, Any] | None:
    """The facts of a net of this kind, and `seconds` of its compile; None where none such was measured."""
    return _nets().get(net_key(checkpoint, plan, kind))


def describe_table() -> dict[str, str]:
    """Where the table comes from: `command` and `conditions`."""
    return {name: str(_table()[name]) for name in ("command", "conditions")}


@cache
def _table() -> Mapping[str, Any]:
    found: Mapping[str, Any] = json.loads(TABLE.read_bytes())
    return found


@cache
def _nets() -> Mapping[tuple[str, ...], Mapping[str, Any]]:
    return {tuple(net[name] for name in KEY): net for net in _table()["nets"]}
