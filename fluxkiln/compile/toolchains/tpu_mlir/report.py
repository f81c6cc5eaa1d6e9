"""What a build takes on its devices, for the report: memory of every file, and the compiler's own estimate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fluxkiln.compile.plan import Binary, Plan
from fluxkiln.compile.toolchains.tpu_mlir.devices import group_parts, plan_devices
from fluxkiln.compile.toolchains.tpu_mlir.estimate import estimate_pipeline
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.types import Part

_LABEL = (
    "Summed from the schedules that the compiler makes of its own code, net after net; no board ran. It ranks "
    "formulations, it does not measure them."
)


def report_devices(checkpoint: Checkpoint, plan: Plan, binaries: Sequence[Binary]) -> dict[str, Any]:
    """The report's facts `memory`, `devices` and `estimate`; nothing for a target without devices."""
    if not plan.target.device_bytes:
        return {}
    laid = plan_devices(plan, group_parts(plan, binaries)).to_json()
    memory = {
        file["file"]: {what: file[what] for what in ("weights", "instructions", "runtime")} for file in laid["files"]
    }
    devices = {"budget": laid["budget"], "load": laid["load"], "peaks": laid["peaks"]}
    return {"memory": memory, "devices": devices, "estimate": report_estimate(checkpoint, binaries)}


def report_estimate(checkpoint: Checkpoint, binaries: Sequence[Binary]) -> dict[str, Any]:
    """The compiler's estimate per kind, per step and per image, as text for people and as numbers for programs."""
    steps = checkpoint.model.steps[checkpoint.variant]
    parts: dict[Part, float | None] = {binary.part: binary.facts.get("estimate_ms") for binary in binaries}
    found = estimate_pipeline(parts, steps)
    entries = {
        f"{count} x {kind}" if count > 1 else kind: f"{spent / count:.3f} ms" + (" each" if count > 1 else "")
        for kind, (count, spent) in found.by_kind.items()
    }
    entries["one step"] = _duration(found.step_ms)
    entries["once an image"] = _duration(found.once_ms)
    entries[f"an image of {steps} steps"] = _duration(found.image_ms)
    if found.missing:
        entries["without an estimate"] = ", ".join(found.missing)
    values = {
        "steps": steps,
        "step_ms": found.step_ms,
        "once_ms": found.once_ms,
        "image_ms": found.image_ms,
        "by_kind": {kind: {"parts": count, "ms": spent} for kind, (count, spent) in found.by_kind.items()},
    }
    return {"label": _LABEL, "entries": entries, "values": values}


def _duration(ms: float | None) -> str:
    if ms is None:
        return "unknown"
    return f"{ms / 1000:.3f} s" if ms >= 1000 else f"{ms:.3f} ms"
