"""The end of a build: verify, report, bundle, tag; and the test whether all of that is there already."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln import __version__
from fluxkiln.artifacts.actions import Action
from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.code import package_version
from fluxkiln.artifacts.modelpack import store_bundle
from fluxkiln.artifacts.store import Blob
from fluxkiln.build.prepared import lora_facts
from fluxkiln.compile.bundle import CONFIGS, HOST_CONSTANTS
from fluxkiln.compile.executor import bind_net
from fluxkiln.compile.plan import Binary, Made
from fluxkiln.compile.templates import host_constants
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import ParityError
from fluxkiln.files import digest_file
from fluxkiln.progress import FROM_STORE, Laps, Progress

if TYPE_CHECKING:
    from fluxkiln.artifacts.actions import ActionCache
    from fluxkiln.build.prepared import BuildResult, Prepared
    from fluxkiln.build.verification import Parity
    from fluxkiln.compile.plan import Plan
    from fluxkiln.export.checkpoint import Checkpoint
    from fluxkiln.verify.reference import Recording


def _calibrations(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> dict[str, str]:
    """As `compile.weights.used_calibrations`, which is not imported where no scheme is calibrated."""
    if not any(plan.schemes[kind].calibrated for kind in plan.kinds()):
        return {}
    from fluxkiln.compile.weights import used_calibrations

    return used_calibrations(checkpoint, plan, cache)


def build_action(prepared: Prepared) -> Action:
    """The key of a whole build: the same checkpoint, settings, code and tools give the same bundle."""
    from fluxkiln.compile.templates import EXPORT_TOOLS

    checkpoint, plan, cache, settings = prepared.checkpoint, prepared.plan, prepared.cache, prepared.settings
    tools = {name: _version(name) for name in (*EXPORT_TOOLS, "onnxruntime", "numpy")}
    tools |= toolchain_of(plan.target).tools(plan)
    return Action(
        stage="build",
        what=f"{prepared.name} for {plan.target.name}",
        code_version=package_version(),
        inputs={
            "checkpoint": f"sha256:{prepared.fingerprint}",
            **{
                f"calibration of {component}": digest
                for component, digest in _calibrations(checkpoint, plan, cache).items()
            },
        },
        settings={
            "name": prepared.name,
            "target": plan.target.name,
            "shapes": [plan.shapes.height, plan.shapes.width, plan.shapes.tokens],
            "schemes": {kind: plan.schemes[kind].name for kind in plan.kinds()},
            "vae": settings.vae,
            "seed": settings.seed,
            "steps": settings.steps,
            "prompt": settings.prompt,
            "verify": settings.verify,
            **({"prompts": list(settings.prompts)} if settings.prompts else {}),
            **({"seeds": list(settings.seeds)} if settings.seeds else {}),
            **toolchain_of(plan.target).facts(settings, plan),
        },
        tools=tools,
    )


def finished_result(prepared: Prepared, laps: Laps) -> BuildResult | None:
    """The result of this very build when it is finished, its bundle and report are there and its bundle is whole.

    Raises:
        ParityError: it is finished, and a gate was missed then.
    """
    record = prepared.cache.lookup(build_action(prepared).key)
    if record is None:
        return None
    facts = record.facts
    manifest = prepared.bundle / "manifest.json"
    try:
        if digest_file(manifest)[0] != facts["manifest"]:
            return None
        files = json.loads(manifest.read_bytes())["files"]
        if any(os.stat(prepared.bundle / entry["path"]).st_size != entry["size"] for entry in files):
            return None
    except (OSError, ValueError, KeyError):
        return None
    parity = dict(facts["parity"])  # type: ignore[arg-type]
    if prepared.settings.verify and not (prepared.folder / "report.html").is_file():
        return None
    result = _result(prepared, str(facts["digest"]), dict(facts["parts"]), parity, laps, nothing_to_do=True)  # type: ignore[arg-type]
    if parity.get("failure"):
        error = ParityError(f"{parity['failure']} (as found by the build that made {prepared.bundle})")
        raise _with_places(error, prepared)
    if facts.get("missing"):
        toolchain_of(prepared.plan.target).refuse_incomplete(str(facts["missing"]), prepared.bundle)
    return result


def finish_bundle(prepared: Prepared, made: Made, progress: Progress, laps: Laps) -> BuildResult:
    """Verify, write the report and the bundle, tag it in the store; then raise if a gate was missed."""
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    work = prepared.folder / "work"
    parity: Parity | None = None
    summary: dict[str, Any] = {"verified": False}
    if prepared.settings.verify:
        from fluxkiln.build.verification import verify

        recording = _record(prepared, progress)
        parity = verify(prepared, made, recording, work, progress)
        summary = _write_report(prepared, made, parity, laps)
        laps.lap("verify")
    sources = bundle_files(prepared, made, work)
    manifest = _manifest(prepared, made, summary)
    progress.stage("bundle", 1)
    written = write_bundle(
        prepared.bundle, sources, manifest, cache.store, roles={HOST_CONSTANTS: "constants"},
        build={"machine": _machine(), "fluxkiln": __version__, **lora_facts(checkpoint)},
    )  # fmt: skip
    digest = store_bundle(cache.store, prepared.bundle, f"{prepared.name}:{plan.target.name}")
    _remove_work(work)
    laps.lap("bundle")
    ways = {binary.part.name: binary.made for binary in made.binaries}
    cache.record(
        build_action(prepared),
        {},
        {
            "manifest": digest_file(prepared.bundle / "manifest.json")[0],
            "digest": digest,
            "parts": ways,
            "parity": summary,
            "missing": made.missing,
        },
    )
    progress.done("bundle", str(prepared.bundle), f"{sum(file.size for file in written.files) / 1e6:.0f} MB")
    if parity is not None:
        try:
            parity.ladder.raise_if_failed(prepared.folder / "report.html")
        except ParityError as error:
            raise _with_places(error, prepared) from None
    return _result(prepared, digest, ways, summary, laps, nothing_to_do=False)


def _with_places(error: ParityError, prepared: Prepared) -> ParityError:
    error.bundle, error.report = str(prepared.bundle), str(prepared.folder / "report.html")
    return error


def bundle_files(prepared: Prepared, made: Made, work: Path) -> dict[str, Blob | Path]:
    """Everything a runtime needs, by its path in the bundle."""
    import numpy as np
    from safetensors.numpy import save_file

    checkpoint, plan = prepared.checkpoint, prepared.plan
    sources: dict[str, Blob | Path] = {file.name: file.blob for file in made.files}
    sources.update(checkpoint.sidecars)
    constants = work / HOST_CONSTANTS
    constants.parent.mkdir(parents=True, exist_ok=True)
    # in row order: safetensors takes the bytes of an array as they lie, and a transposed one's lie otherwise
    save_file(
        {name: np.ascontiguousarray(array) for name, array in host_constants(checkpoint, plan).items()},
        constants,
    )
    sources[HOST_CONSTANTS] = constants
    configs = work / CONFIGS
    configs.write_text(json.dumps(checkpoint.configs, indent=1, sort_keys=True))
    sources[CONFIGS] = configs
    sources["LICENSE"] = checkpoint.licence or _licence_note(prepared, work)
    return sources


def licence_id(prepared: Prepared) -> str:
    """The checkpoint's licence, as its model reads it."""
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

    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    rows, pipeline = parity.ladder.rows, parity.pipeline
    loras = lora_facts(checkpoint).get("lora", ())
    facts = {
        "title": prepared.name,
        "target": plan.target.name,
        "reference": f"diffusers {checkpoint.model.pipeline_class} as published, float32",
        "model": {
            "name": checkpoint.name,
            "fingerprint": prepared.fingerprint,
            "variant": checkpoint.variant,
        },
        "shapes": {
            "height": plan.shapes.height,
            "width": plan.shapes.width,
            "tokens": plan.shapes.tokens,
            "steps": prepared.settings.steps,
        },
        "schemes": {kind: plan.schemes[kind].name for kind in plan.kinds()},
        "parts": [_part_row(binary) for binary in made.binaries],
        **(
            {"images": compare_pictures(parity.recording.image, pipeline.image, parity.pipeline_rung)}
            if pipeline
            else {}
        ),
        "heat": parity.ladder.maps.to_json(),
        **({"runs": parity.runs} if parity.runs else {}),
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
            **{
                f"calibration of {component}": digest
                for component, digest in _calibrations(checkpoint, plan, cache).items()
            },
            **parity.facts,
        },
    }
    write_report(prepared.folder, build_report(parity.ladder, facts))
    failure = explain_failure(rows)
    return {
        "verified": True,
        "passed": not failure,
        "failure": failure,
        "rows": len(rows),
        "failed_rows": sum(not row.passed for row in rows),
        "rungs": list(dict.fromkeys(row.rung for row in rows)),
    }


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
    checkpoint, plan, cache, settings = prepared.checkpoint, prepared.plan, prepared.cache, prepared.settings
    home = {part: file.name for file in made.files for part in file.parts}
    return {
        "name": prepared.name,
        "target": plan.target.name,
        "variant": checkpoint.variant,
        "shapes": {"height": plan.shapes.height, "width": plan.shapes.width, "tokens": plan.shapes.tokens},
        "checkpoint": {"source": checkpoint.name, "fingerprint": f"sha256:{prepared.fingerprint}"},
        "licence": {"spdx": licence_id(prepared), "file": "LICENSE"},
        "settings": {
            "vae": settings.vae,
            "seed": settings.seed,
            "steps": settings.steps,
            **toolchain_of(plan.target).facts(settings, plan),
            **lora_facts(checkpoint),
            **({"calibrations": calibrations} if (calibrations := _calibrations(checkpoint, plan, cache)) else {}),
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
        **{
            side: [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]
            for side, specs in (("inputs", net.inputs), ("outputs", net.outputs))
        },
    }


def _result(
    prepared: Prepared,
    digest: str,
    made: Mapping[str, str],
    parity: Mapping[str, Any],
    laps: Laps,
    nothing_to_do: bool,
) -> BuildResult:
    from fluxkiln.build.prepared import BuildResult

    counts = prepared.cache.counts
    return BuildResult(
        name=prepared.name,
        target=prepared.plan.target.name,
        bundle=prepared.bundle,
        report=prepared.folder / "report.html" if prepared.settings.verify else None,
        digest=digest,
        nothing_to_do=nothing_to_do,
        seconds=laps.total,
        timings=laps.seconds,
        compiler_runs=sum(counts.get(stage, [0, 0])[1] for stage in toolchain_of(prepared.plan.target).compiler_stages),
        cache=prepared.cache.summary(),
        parts=made,
        parity=parity,
    )


def _licence_note(prepared: Prepared, work: Path) -> Path:
    path, checkpoint = work / "LICENSE", prepared.checkpoint
    published = f"{checkpoint.model.title}-{checkpoint.variant} is published under {licence_id(prepared)}"
    path.write_text(
        f"The checkpoint {checkpoint.name} came without a licence text.\n{published}; its terms apply to this bundle.\n"
    )
    return path


def _machine() -> dict[str, str]:
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "cores": str(os.cpu_count()),
    }


def _remove_work(work: Path) -> None:
    import shutil

    shutil.rmtree(work, ignore_errors=True)


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)
