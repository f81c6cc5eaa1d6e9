"""The end of a build: verify, report, bundle, tag; and the test whether all of that is there already."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln import __version__
from fluxkiln.artifacts.about import describe_weights
from fluxkiln.artifacts.actions import Action
from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.code import package_version
from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.modelpack import store_bundle
from fluxkiln.artifacts.store import Blob, legal_tag
from fluxkiln.build.budget import name_shapes
from fluxkiln.build.prepared import Prepared, choose_components
from fluxkiln.compile.bundle import CONFIGS, HOST_CONSTANTS, further_facts
from fluxkiln.compile.executor import bind_net
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.plan import Binary, Made
from fluxkiln.compile.templates import encoder_facts, host_constants
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import FluxkilnError, ParityError, ToolchainError
from fluxkiln.export.lora import lora_facts
from fluxkiln.progress import FROM_STORE, Laps, Progress

if TYPE_CHECKING:
    from fluxkiln.build.verification import Parity
    from fluxkiln.verify.reference import Recording


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build did and where it is. `paints`: executors of this package make images from its bundle."""

    name: str
    target: str
    bundle: Path
    report: Path | None
    digest: str
    nothing_to_do: bool
    seconds: float
    compiler_runs: int
    cache: Mapping[str, Any] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)
    paints: bool = False

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {
            **asdict(self),
            "bundle": str(self.bundle),
            "manifest": str(self.bundle / "manifest.json"),
            "report": str(self.report) if self.report else None,
            "seconds": round(self.seconds, 3),
            "timings": {stage: round(seconds, 3) for stage, seconds in self.timings.items()},
        }


def _calibrations(prepared: Prepared) -> dict[str, str]:
    """As `compile.weights.used_calibrations`, which is not imported where no scheme is calibrated."""
    plan = prepared.plan
    if not any(plan.scheme(part).calibrated for part in plan.parts):
        return {}
    from fluxkiln.compile.weights import used_calibrations

    return used_calibrations(prepared.checkpoint, plan, prepared.cache)


def _named_calibrations(prepared: Prepared) -> dict[str, str]:
    return {f"calibration of {component}": digest for component, digest in _calibrations(prepared).items()}


def build_action(prepared: Prepared) -> Action:
    """The key of a whole build: the same checkpoint, settings, code and tools give the same bundle."""
    import importlib.metadata

    from fluxkiln.compile.templates import EXPORT_TOOLS

    plan, settings = prepared.plan, prepared.settings
    tools = {name: importlib.metadata.version(name) for name in (*EXPORT_TOOLS, "onnxruntime", "numpy")}
    tools |= toolchain_of(plan.target).tools(plan)
    return Action(
        stage="build",
        what=f"{prepared.name} for {plan.target.name}",
        code_version=package_version(),
        inputs={"checkpoint": f"sha256:{prepared.fingerprint}", **_named_calibrations(prepared)},
        settings={
            "name": prepared.name,
            "target": plan.target.name,
            "sizes": [list(astuple(shapes)) for shapes in plan.sizes],
            "schemes": plan.scheme_names(),
            "vae": settings.vae,
            "seed": settings.seed,
            "steps": prepared.steps,
            "prompt": settings.prompt,
            "verify": settings.verify,
            **{name: list(given) for name in ("recording", "prompts", "seeds") if (given := getattr(settings, name))},
            **toolchain_of(plan.target).facts(settings, plan),
        },
        tools=tools,
    )


def finished_result(prepared: Prepared, laps: Laps) -> BuildResult | None:
    """The result of this very build when it is finished, its bundle and report are there and its bundle is whole;
    ParityError when a gate was missed then."""
    record = prepared.cache.lookup(build_action(prepared).key)
    if record is None:
        return None
    facts: Mapping[str, Any] = record.facts
    try:
        if read_bundle(prepared.plan.bundle).digest != facts["manifest"]:
            return None
    except (FluxkilnError, OSError):
        return None
    if prepared.settings.verify and not (prepared.plan.folder / "report.html").is_file():
        return None
    if failure := facts["parity"].get("failure"):
        raise _with_places(ParityError(f"{failure} (as found by the build that made {prepared.plan.bundle})"), prepared)
    result = _result(prepared, facts, laps, nothing_to_do=True)
    refuse_incomplete(prepared, facts.get("missing", ""), result)
    return result


def refuse_incomplete(prepared: Prepared, missing: str, result: BuildResult) -> None:
    """Raise ToolchainError, with the result, for a bundle that lacks what is `missing` here."""
    if missing:
        try:
            toolchain_of(prepared.plan.target).refuse_incomplete(missing, prepared.plan.bundle)
        except ToolchainError as error:
            error.result = result
            raise


def finish_bundle(prepared: Prepared, made: Made, progress: Progress, laps: Laps) -> BuildResult:
    """Verify, write the report and the bundle, tag it in the store; then raise if a gate was missed."""
    import shutil

    store, work = prepared.cache.store, prepared.plan.folder / "work"
    parity: Parity | None = None
    summary: dict[str, Any] = {"verified": False, "about": {"weights": _weights(prepared)}}
    if prepared.settings.verify:
        from fluxkiln.build.further import verify_sizes

        recording = _record(prepared, progress)
        parity = verify_sizes(prepared, made, recording, work, progress)
        summary = _write_report(prepared, made, parity, laps)
        laps.lap("verify")
    sources = _bundle_files(prepared, made, work)
    if parity is not None and parity.carried is not None:
        estimates = {binary.part.name: binary.facts.get("estimate_ms") for binary in made.binaries}
        known = {name: float(spent) for name, spent in estimates.items() if spent}
        sources |= parity.carried.finish(prepared.fingerprint, known)
        progress.note(
            f"{len(parity.carried.names)} of {len(made.binaries)} parts take their recording along, "
            f"{parity.carried.nbytes / 1e6:.1f} MB"
        )
    manifest = _manifest(prepared, made, summary)
    progress.stage("bundle", 1)
    written = write_bundle(
        prepared.plan.bundle, sources, manifest, store,
        build={"machine": _machine(), "fluxkiln": __version__, **lora_facts(prepared.checkpoint)},
    )  # fmt: skip
    digest = store_bundle(store, prepared.plan.bundle, legal_tag(f"{prepared.name}:{prepared.plan.target.name}"))
    opened = open_bundle(prepared.plan.bundle, progress)
    shutil.rmtree(work, ignore_errors=True)
    laps.lap("bundle")
    facts: dict[str, Any] = {
        "manifest": opened.digest,
        "digest": digest,
        "parts": {binary.part.name: binary.made for binary in made.binaries},
        "parity": summary,
        "missing": made.missing,
    }
    prepared.cache.record(build_action(prepared), {}, facts)
    progress.done("bundle", str(prepared.plan.bundle), f"{sum(file.size for file in written.files) / 1e6:.0f} MB")
    if parity is not None:
        try:
            parity.ladder.raise_if_failed(prepared.plan.folder / "report.html")
        except ParityError as error:
            raise _with_places(error, prepared) from None
    return _result(prepared, facts, laps, nothing_to_do=False)


def _with_places(error: ParityError, prepared: Prepared) -> ParityError:
    error.bundle, error.report = str(prepared.plan.bundle), str(prepared.plan.folder / "report.html")
    return error


def _bundle_files(prepared: Prepared, made: Made, work: Path) -> dict[str, Blob | Path]:
    """Everything a runtime needs, by its path in the bundle."""
    import numpy as np
    from safetensors.numpy import save_file

    checkpoint = prepared.checkpoint
    constants, configs, licence = work / HOST_CONSTANTS, work / CONFIGS, checkpoint.licence
    constants.parent.mkdir(parents=True, exist_ok=True)
    arrays = host_constants(checkpoint, prepared.plan)
    # in row order: safetensors takes the bytes of an array as they lie, and a transposed one's lie otherwise
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, constants)
    configs.write_text(json.dumps(checkpoint.configs, indent=1, sort_keys=True))
    if licence is None:
        licence = work / "LICENSE"
        licence.write_text(
            f"The checkpoint {checkpoint.name} came without a licence text.\n{checkpoint.model.title}-"
            f"{checkpoint.variant} is published under {_licence_id(prepared)}; its terms apply to this bundle.\n"
        )
    made_files = {file.name: file.blob for file in made.files}
    return {**made_files, **checkpoint.sidecars, HOST_CONSTANTS: constants, CONFIGS: configs, "LICENSE": licence}


def _licence_id(prepared: Prepared) -> str:
    checkpoint = prepared.checkpoint
    text = checkpoint.licence.read_text(errors="replace") if checkpoint.licence else ""
    return checkpoint.model.licence(text, checkpoint.variant)


def _record(prepared: Prepared, progress: Progress) -> Recording:
    from fluxkiln.build.verification import record

    began, known = time.perf_counter(), prepared.cache.misses
    progress.stage("record", 1)
    recording = record(prepared)
    took = f"recorded in {time.perf_counter() - began:.1f} s"
    progress.done("record", "reference run", took if prepared.cache.misses > known else FROM_STORE)
    return recording


def _write_report(prepared: Prepared, made: Made, parity: Parity, laps: Laps) -> dict[str, Any]:
    from fluxkiln.verify.ladder import explain_failure
    from fluxkiln.verify.report.document import build_report, compare_pictures, write_report

    checkpoint, plan = prepared.checkpoint, prepared.plan
    rows, pipeline = parity.ladder.rows, parity.pipeline
    loras = lora_facts(checkpoint).get("lora", ())
    facts = {
        "title": prepared.name,
        "target": plan.target.name,
        "reference": f"diffusers {checkpoint.model.pipeline_class} as published, float32",
        "model": {"name": checkpoint.name, "fingerprint": prepared.fingerprint, "variant": checkpoint.variant},
        "shapes": {**asdict(plan.shapes), "steps": prepared.steps},
        "schemes": plan.scheme_names(),
        "parts": [_part_row(binary) for binary in made.binaries],
        "heat": parity.ladder.maps.to_json(),
        "timings": [
            {"name": name, "seconds": seconds}
            for name, seconds in {**parity.seconds, **laps.seconds, "all": laps.total}.items()
        ],
        **toolchain_of(plan.target).report(checkpoint, plan, made),
        "tools": build_action(prepared).tools,
        "machine": _machine(),
        "provenance": {
            "checkpoint": f"sha256:{prepared.fingerprint}",
            "prompt": prepared.settings.prompt,
            "seed": str(prepared.settings.seed),
            **{f"LoRA {lora['file']}": f"sha256:{lora['sha256']} x {lora['strength']}" for lora in loras},
            **_named_calibrations(prepared),
            **parity.facts,
        },
    }
    if lines := prepared.lora_lines():
        facts["loras"] = lines
    facts["about"] = about = _about(prepared, parity, facts)
    if pipeline:
        facts["images"] = compare_pictures(parity.recording.image, pipeline.image, parity.pipeline_rung)
    if parity.runs:
        facts["runs"] = parity.runs
    if parity.judged:
        facts["judged"] = parity.judged
    write_report(prepared.plan.folder, build_report(parity.ladder, facts))
    failure = explain_failure(rows)
    return {
        "verified": True,
        "passed": not failure,
        "failure": failure,
        "rows": len(rows),
        "failed_rows": sum(not row.passed for row in rows),
        "rungs": list(dict.fromkeys(row.rung for row in rows)),
        "about": about,
    }


def _weights(prepared: Prepared) -> str:
    licence = prepared.checkpoint.licence
    return describe_weights(licence.read_bytes() if licence else b"", prepared.checkpoint.name)


def _about(prepared: Prepared, parity: Parity, facts: Mapping[str, Any]) -> dict[str, str]:
    """What the comparisons are about, for people: whose weights, what ran, which size; how fast an image would be."""
    toolchain, shapes = toolchain_of(prepared.plan.target), prepared.plan.shapes
    at = {row.at for row in parity.ladder.rows}
    top = max(at, key=lambda rung: rung.order, default=None)
    ran = f"{top.name}: {top.meaning}" if top else "nothing"
    where = "".join(f"; {what}: {value}" for what, value in parity.facts.items())
    found = {
        "weights": _weights(prepared),
        "ran": f"{ran}; {toolchain.unproven}" if toolchain.unproven else ran,
        "size": f"{name_shapes(shapes)}, {prepared.steps} step{'s' * (prepared.steps != 1)}{where}",
    }
    values = facts.get("estimate", {}).get("values", {})
    if image := values.get("image_ms"):
        found["speed"] = f"an image of {values['steps']} steps: about {image / 1000:.3g} s by the compiler's estimate"
    return found


def _part_row(binary: Binary) -> dict[str, Any]:
    facts = binary.facts
    return {
        "name": binary.part.name,
        "kind": binary.part.kind,
        "scheme": binary.scheme.name,
        "bytes": binary.size,
        "device_memory": sum(int(facts[name]) for name in ("weight_bytes", "instruction_bytes", "runtime_bytes")),
        "estimate_ms": binary.facts.get("estimate_ms"),
        "made": binary.made,
    }


def _manifest(prepared: Prepared, made: Made, summary: Mapping[str, Any]) -> dict[str, Any]:
    checkpoint, plan, settings = prepared.checkpoint, prepared.plan, prepared.settings
    calibrations = _calibrations(prepared)
    home = {part: file.name for file in made.files for part in file.parts}
    return {
        "name": prepared.name,
        "target": plan.target.name,
        "model": checkpoint.model.name,
        "variant": checkpoint.variant,
        "shapes": asdict(plan.shapes),
        "checkpoint": {"source": checkpoint.name, "fingerprint": f"sha256:{prepared.fingerprint}"},
        "licence": {"spdx": _licence_id(prepared), "file": "LICENSE"},
        "settings": {
            "vae": settings.vae,
            "seed": settings.seed,
            "steps": prepared.steps,
            **further_facts(plan.further),
            "components": list(choose_components(checkpoint.model, settings)),
            **({"modulation": settings.modulation} if plan.layout is None else {"granularity": settings.granularity}),
            **toolchain_of(plan.target).facts(settings, plan),
            **lora_facts(checkpoint),
            **encoder_facts(checkpoint),
            **({"calibrations": calibrations} if calibrations else {}),
        },
        "parity": dict(summary),
        "tools": dict(build_action(prepared).tools),
        "parts": [_part_entry(binary, home[binary.part.name]) for binary in made.binaries],
    }


def _part_entry(binary: Binary, file: str) -> dict[str, Any]:
    net = bind_net(binary, Path(file))
    return {
        "name": net.part,
        "kind": net.kind.name,
        "scheme": binary.scheme.name,
        "file": file,
        "net": net.name,
        "digest": binary.digest,
        "size": net.size,
        "inputs": [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in net.inputs],
        "outputs": [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in net.outputs],
    }


def _result(prepared: Prepared, facts: Mapping[str, Any], laps: Laps, nothing_to_do: bool) -> BuildResult:
    counts, model = prepared.cache.counts, prepared.checkpoint.model
    whole = choose_components(model, prepared.settings) == model.components
    return BuildResult(
        name=prepared.name,
        target=prepared.plan.target.name,
        bundle=prepared.plan.bundle,
        report=prepared.plan.folder / "report.html" if prepared.settings.verify else None,
        digest=facts["digest"],
        nothing_to_do=nothing_to_do,
        seconds=laps.total,
        timings=laps.seconds,
        compiler_runs=sum(counts.get(stage, [0, 0])[1] for stage in toolchain_of(prepared.plan.target).compiler_stages),
        cache=prepared.cache.summary(),
        parts=facts["parts"],
        parity=facts["parity"],
        paints=whole and bool(toolchain_of(prepared.plan.target).executors),
    )


def _machine() -> dict[str, str]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
    }
