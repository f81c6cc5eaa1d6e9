"""Calibration: what goes into every linear layer while diffusers' own pipeline runs over some prompts and timesteps.

The pipeline holds the weights of one block at a time (`fluxkiln.verify.pipeline`), and the sums of one input are in
memory at a time: they lie in the file that is being made and are read, added to and written back. Layers that are given
the same tensor (query, key and value) share one entry.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.build.make import prepare
from fluxkiln.build.prepared import Prepared
from fluxkiln.compile.weights import calibration_action, component_digest
from fluxkiln.errors import UsageError
from fluxkiln.files import digest_file, disk_full_named
from fluxkiln.patches.pipeline import Sampling, quiet
from fluxkiln.progress import FROM_STORE, Progress, Silent
from fluxkiln.quantize.calibration import DEFAULT_BLOCK, Calibration, Sums, open_calibration
from fluxkiln.settings import Settings

DEFAULT_PROMPTS = Path(__file__).parents[1] / "quantize" / "prompts.txt"


@dataclass(frozen=True, slots=True)
class CalibrationResult:
    """A calibration in the store. `hit`: it was there already. `path` is where it was written to, or None."""

    calibration: Calibration
    size: int
    hit: bool
    seconds: float
    path: Path | None

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        matrices = self.calibration.matrices
        return {
            "digest": self.calibration.digest,
            "size": self.size,
            "matrices": {component: len(entries) for component, entries in matrices.items()},
            "inputs": len({key for entries in matrices.values() for key, _ in entries.values()}),
            "from_store": self.hit,
            "seconds": round(self.seconds, 3),
            "path": str(self.path) if self.path else None,
            **self.calibration.facts,
        }


def calibrate(
    settings: Settings,
    prompts: tuple[str, ...],
    out: Path | None = None,
    block: int = DEFAULT_BLOCK,
    progress: Progress | None = None,
) -> CalibrationResult:
    """Record statistics, store them, and make them the ones that builds of this checkpoint use.

    Args:
        settings: model, size, tokens, steps, seed, components; the i-th prompt runs with seed + i.
        out: a file that gets a copy.
        block: input channels whose products are kept with one another; 0 for all.

    Raises:
        UsageError: neither the transformer nor T5 is among the components. CheckpointError: an input is not finite.
        ResourceError: the disk is full. Whatever preparing a build raises.
    """
    started = time.perf_counter()
    progress = progress or Silent()
    prepared = prepare(settings, progress)
    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    calibrated, built = checkpoint.model.calibrated, list(dict.fromkeys(part.component for part in plan.parts))
    components = [name for name in calibrated if name in built]
    if not components:
        raise UsageError(f"no component of {', '.join(built)} is quantized; {', '.join(calibrated)} are")
    if block and (block < 0 or block % 32):
        raise UsageError(f"block {block}: multiples of 32 input channels are supported, and 0 for all of them")
    digests = {component: component_digest(checkpoint.digests, component) for component in components}
    facts: dict[str, Any] = {
        "prompts": len(prompts),
        "prompts_digest": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "steps": prepared.steps,
        "seed": settings.seed,
        "shapes": list(astuple(plan.shapes)),
        "block": block,
    }
    action = Action(
        stage="calibrate",
        what=f"{checkpoint.name}: {len(prompts)} prompts, {prepared.steps} steps",
        code_version=code_version(_record, model=type(checkpoint.model)),
        inputs=digests,
        settings=facts,
        tools={name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")},
    )
    known = {"components": digests, "facts": facts}

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        target = folder / "calibration.safetensors"
        with disk_full_named(folder):
            _record(prepared, prompts, components, block, known, target, progress)
        return {"calibration": target}, {}

    result = run_action(cache, action, produce)
    if result.hit:
        progress.done("calibrate", checkpoint.name, FROM_STORE)
    blob = result.outputs["calibration"]
    _use(cache, blob, digests)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.unlink(missing_ok=True)
        cache.store.export(blob.digest, out)
    found = open_calibration(cache.path(blob), blob.digest)
    return CalibrationResult(found, blob.size, result.hit, time.perf_counter() - started, out)


def _use(cache: ActionCache, blob: Blob, digests: Mapping[str, str]) -> None:
    for component, digest in digests.items():
        cache.record(calibration_action(component, digest), {"calibration": blob}, {})


def use_calibration(settings: Settings, file: Path, progress: Progress | None = None) -> CalibrationResult:
    """Make a calibration that was written before the one that builds of this checkpoint use.

    SchemeError: it was made with other weights. IntegrityError: it is no calibration, or not as it was recorded.
    """
    started = time.perf_counter()
    prepared = prepare(settings, progress)
    checkpoint, cache = prepared.checkpoint, prepared.cache
    if not file.is_file():
        raise UsageError(f"{file} is no file; fluxkiln calibrate --out writes one")
    found = open_calibration(file, digest_file(file)[0])
    known = [name for name in found.components if name in checkpoint.digests]
    digests = {name: component_digest(checkpoint.digests, name) for name in known}
    if not digests:
        raise UsageError(f"{file} is for {', '.join(found.components)}, of which this model has none")
    for component, digest in digests.items():
        found.check_checkpoint(component, digest)
        for name, ref in checkpoint.tensors[component].items():
            if name in found.matrices.get(component, {}):
                found.statistics(component, name, ref.shape[1])
    found.check_data()
    blob = cache.store.add_file(file)
    _use(cache, blob, digests)
    return CalibrationResult(found, blob.size, True, time.perf_counter() - started, file)


def _record(
    prepared: Prepared,
    prompts: tuple[str, ...],
    components: list[str],
    block: int,
    known: Mapping[str, Any],
    target: Path,
    progress: Progress,
) -> None:
    from torch import nn

    from fluxkiln.verify.pipeline import open_pipeline, weights_in_place

    checkpoint, plan, settings = prepared.checkpoint, prepared.plan, prepared.settings

    def observe(component: str, name: str, _: Any, inputs: tuple[Any, ...], outputs: Any) -> None:
        sums.add(component, name, inputs[0], outputs)

    # an image is not needed; what makes the transformer's inputs is run where it is there
    running = {part.component: part.folder for part in plan.parts if part.component != "vae"}
    with quiet():
        pipe = open_pipeline(checkpoint, running)
    layers = {
        (component, name): module
        for component in components
        for name, module in getattr(pipe, component).named_modules()
        if isinstance(module, nn.Linear)
    }
    progress.stage("calibrate", len(prompts))
    with Sums(target, block, len(layers)) as sums:
        for (component, name), module in layers.items():
            module.register_forward_hook(partial(observe, component, f"{name}.weight"))
        for index, prompt in enumerate(prompts):
            started = time.perf_counter()
            with weights_in_place():
                checkpoint.model.render(pipe, plan.shapes, Sampling(prepared.steps, settings.seed + index, prompt))
            sums.forget_last()
            progress.done("calibrate", f"prompt {index + 1}", f"{time.perf_counter() - started:.1f} s")
        sums.finish(known)
