"""Where inside a part the error starts: its values compared one by one, rung by rung, and what to do about the first.

The rungs are those of the ladder that can be looked into: the template against diffusers' own modules, the stored
weights against the checkpoint's, and the compiled form (the compiler's lowered graph, or the graph of a cpu bundle)
against the template with the stored weights. A chip's binary shows its outputs only; the weights in it, where the
bundle is there, are read back byte by byte. For a model cut over cores see `fluxkiln.verify.debug.split_probe`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.build.budget import name_shapes
from fluxkiln.build.context import Prepared
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import find_template, make_template
from fluxkiln.compile.toolchains.tpu_mlir.environment import installed
from fluxkiln.compile.toolchains.tpu_mlir.moulds import cast_part, compile_part, find_mould, make_mould
from fluxkiln.compile.toolchains.tpu_mlir.rungs import lay_out_lowered
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress, Silent
from fluxkiln.types import Part, find_part
from fluxkiln.verify.debug.probe import (
    Culprit,
    Inside,
    RungFindings,
    Values,
    check_binary,
    check_linked,
    check_lowered,
    check_stored,
    check_template,
    look_inside,
)
from fluxkiln.verify.debug.split_probe import check_can_be_debugged, look_on_ranks


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All rungs of a part, from the bottom; `culprit` is that of the lowest bad one."""

    part: str
    kind: str
    scheme: str
    step: int
    rungs: tuple[RungFindings, ...]
    facts: Mapping[str, str] = field(default_factory=dict)

    @property
    def culprit(self) -> Culprit | None:
        return next((rung.culprit for rung in self.rungs if rung.culprit is not None), None)

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain JSON."""
        found = self.culprit
        return {
            "part": self.part,
            "kind": self.kind,
            "scheme": self.scheme,
            "step": self.step,
            **self.facts,
            "culprit": None if found is None else asdict(found),
            "rungs": [
                {"rung": rung.rung, "against": rung.against, "values": [asdict(finding) for finding in rung.findings]}
                for rung in self.rungs
            ],
        }


def debug_part(prepared: Prepared, name: str, step: int = 0, progress: Progress | None = None) -> Diagnosis:
    """Look into the part called `name` at every rung, on what it is given at denoising step `step`.

    Raises:
        UsageError: no such part or step, or a target whose parts cannot be looked into.
        Whatever recording or compiling raises.
    """
    progress = progress or Silent()
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    part = find_part(plan.parts, name)
    if plan.layout is not None:
        check_can_be_debugged(checkpoint, part)
    inputs, outputs, plan = _recorded(prepared, part, step, progress)
    if plan.layout is not None:
        rungs = look_on_ranks(checkpoint, plan, cache, part, inputs, outputs, prepared.bundle, progress)
        executed = {"executed on": "XLA CPU replicas", "ranks": str(plan.layout.ranks(part))}
        return _diagnosis(plan, part, step, rungs, executed)
    with tempfile.TemporaryDirectory(prefix="fluxkiln-debug-") as scratch:
        rungs = _look(prepared, checkpoint, plan, cache, part, inputs, Path(scratch), progress)
    facts = {}
    if plan.target.toolchain == "tpu_mlir" and installed() is None:
        facts["lowered graph"] = "not looked into: its interpreter is TPU-MLIR's, which is not installed here"
    return _diagnosis(plan, part, step, rungs, facts)


def _diagnosis(
    plan: Plan,
    part: Part,
    step: int,
    rungs: tuple[RungFindings, ...],
    facts: Mapping[str, str],
) -> Diagnosis:
    shown = step if part.traits.each_step else -1
    shapes = {"shapes": name_shapes(plan.shapes)}
    return Diagnosis(part.name, part.kind, plan.scheme(part).name, shown, rungs, {**shapes, **facts})


def _recorded(prepared: Prepared, part: Part, step: int, progress: Progress) -> tuple[Values, Values, Plan]:
    """What the part was given and made, and the plan at the shapes of the recording; what runs once has one step."""
    from fluxkiln.build.verification import record
    from fluxkiln.patches.pipeline import fill_rows

    progress.stage("record", 1)
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    recording = record(checkpoint, plan, cache, prepared.settings, prepared.fingerprint, prepared.folder / "recording")
    progress.done("record", "reference run", f"{recording.steps} step(s)")
    if not 0 <= step < recording.steps:
        raise UsageError(
            f"step {step} was not recorded, there are 0 to {recording.steps - 1}; --steps gives the reference run more "
            "of them"
        )
    place = step if part.traits.each_step else 0
    inputs, _ = fill_rows(part, recording.inputs(part.name, place))
    return inputs, recording.outputs(part.name, place), replace(plan, shapes=recording.shapes)


def _look(
    prepared: Prepared,
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    part: Part,
    inputs: Values,
    scratch: Path,
    progress: Progress,
) -> tuple[RungFindings, ...]:
    tpu_mlir = plan.target.toolchain == "tpu_mlir"
    progress.stage("look inside", 3)
    inside = look_inside(checkpoint, plan, cache, part, inputs, "onnx17" if tpu_mlir else "onnx23")
    rungs = [check_template(inside, checkpoint)]
    progress.done("look inside", "onnxruntime", f"{len(inside.operations)} operations")
    scheme = plan.scheme(part).name.split("-")[0]
    if tpu_mlir or plan.scheme(part).weight_bits:
        rungs.append(check_stored(inside, scheme))
        progress.done("look inside", "dequantized", f"{len(rungs[-1].findings)} values")
    if tpu_mlir:
        from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

        env = installed()
        if env is not None:
            folder = scratch / "lowered"
            template = make_template(checkpoint, plan, cache, part.kind, "onnx17")
            mould = make_mould(checkpoint, plan, cache, template)
            binary = (
                cast_part(plan, part, mould)
                if mould.castable
                else compile_part(checkpoint, plan, cache, part, template)
            )
            lay_out_lowered(checkpoint, plan, cache, binary, folder)
            # as the compiler wrote it: in groups of heads the scores have names of their own
            (folder / "lowered.mlir").write_text(cache.path(binary.blobs["lowered"]).read_text())
            with Simulator(env, plan.target.chip, plan.logs / "debug.log") as simulator:
                rungs.append(check_lowered(inside, folder / "lowered.mlir", simulator, scheme))
        stored = _read_back(prepared, part, inside)
        if stored is not None:
            rungs.append(stored)
    else:
        from fluxkiln.compile.onnx.linked import link_parts

        (graph,) = link_parts(
            checkpoint, replace(plan, parts=(part,)), cache, plan.schemes, scratch / "graphs"
        ).values()
        rungs.append(check_linked(inside, graph, scheme))
    progress.done("look inside", rungs[-1].rung, f"{len(rungs[-1].findings)} values")
    return tuple(rungs)


def _read_back(prepared: Prepared, part: Part, inside: Inside) -> RungFindings | None:
    """The part's weights in the build's own bundle; None where there is no bundle, or nothing was cast."""
    from fluxkiln.artifacts.bundle import read_manifest

    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    if not (prepared.bundle / "manifest.json").is_file():
        return None
    entry = next((one for one in read_manifest(prepared.bundle).parts if one.name == part.name), None)
    template = find_template(checkpoint, plan, cache, part.kind, "onnx17")
    mould = None if template is None else find_mould(checkpoint, plan, cache, template)
    if entry is None or mould is None or not mould.castable:
        return None
    return check_binary(
        inside,
        checkpoint,
        plan,
        cache,
        cast_part(plan, part, mould),
        prepared.bundle / entry.file,
        entry.net,
    )
