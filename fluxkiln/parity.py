"""Verification of a build: record the reference, replay it at every rung, run the whole pipeline on compiled parts."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import Action, run_action, stage_code_version
from fluxkiln.artifacts.types import PartRunner
from fluxkiln.components import KINDS, Part
from fluxkiln.export.bindings import WeightReader, bind_part, weight_reader
from fluxkiln.export.checkpoint import TensorReader
from fluxkiln.linking import link_parts
from fluxkiln.progress import Progress
from fluxkiln.quantize.schemes import Scheme, parse_scheme
from fluxkiln.settings import Settings
from fluxkiln.stages import BinaryPart, CombinedFile, Kiln, make_template

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder
    from fluxkiln.verify.pipeline import PipelineResult
    from fluxkiln.verify.record import Recording

# The simulator computes some 5e7 multiplications a second on two cores: beyond this it would take longer than 5 minutes
SIMULATED_MACS = 15e9


# rung -> runner, from the bottom of the ladder to its top
Rungs = dict[str, PartRunner]


@dataclass(frozen=True, slots=True)
class Parity:
    """A climbed ladder and the reference it was climbed from; `pipeline` is the image made by compiled parts."""

    ladder: Ladder
    recording: Recording
    pipeline: PipelineResult
    pipeline_rung: str
    seconds: Mapping[str, float]


def record(kiln: Kiln, settings: Settings, print_: str, folder: Path) -> Recording:
    """The recorded reference run, from the store or made now, laid out in `folder`."""
    from fluxkiln.verify.record import INDEX, read_recording, record_reference

    def produce(work: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        record_reference(
            kiln.checkpoint.root, kiln.parts, kiln.shapes, work, TensorReader(kiln.checkpoint),
            steps=settings.steps, seed=settings.seed, prompt=settings.prompt,
        )  # fmt: skip
        files = [path for path in work.rglob("*") if path.is_file()]
        return {str(path.relative_to(work)): path for path in files}, {}

    shapes = kiln.shapes
    action = Action(
        stage="record",
        what=f"reference run of {kiln.checkpoint.name}",
        code_version=stage_code_version(
            "fluxkiln.verify.record",
            "fluxkiln.verify.observe",
            "fluxkiln.verify.pipeline",
            "fluxkiln.verify.streaming",
        ),
        inputs={"checkpoint": f"sha256:{print_}"},
        settings={
            "shapes": [shapes.height, shapes.width, shapes.tokens],
            "steps": settings.steps,
            "seed": settings.seed,
            "prompt": settings.prompt,
            "vae": settings.vae,
        },
        tools={
            "torch": _version("torch"),
            "diffusers": _version("diffusers"),
            "transformers": _version("transformers"),
        },
    )
    result = run_action(kiln.cache, action, produce)
    for name, blob in result.outputs.items():
        if not (folder / name).is_file() or name == INDEX:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).unlink(missing_ok=True)
            kiln.cache.store.export(blob.digest, folder / name)
    return read_recording(folder)


def verify_build(kiln: Kiln, settings: Settings, recording: Recording, rungs: Rungs, progress: Progress) -> Parity:
    """Replay the recording at every rung of every part, and run the whole pipeline on the top rung.

    Args:
        rungs: bottom to top. The top one has a thread of its own: a simulator keeps two cores busy by itself.
    """
    from fluxkiln.verify.ladder import Ladder

    started = time.perf_counter()
    calls = [(part, step) for part in kiln.parts for step in range(len(recording.calls[part.name]))]
    progress.stage("verify", len(calls) + 1)
    ladder = Ladder()
    *_, top = rungs
    below = {rung: runner for rung, runner in rungs.items() if rung != top}
    with ThreadPoolExecutor(1, "below") as lower, ThreadPoolExecutor(1, "top") as upper:
        lower_parts = {part.name: lower.submit(_replay, below, recording, part) for part in kiln.parts}
        upper_parts = {part.name: upper.submit(_replay, {top: rungs[top]}, recording, part) for part in kiln.parts}
        whole = upper.submit(run_pipeline, kiln, settings, rungs[top])
        try:
            for part, step in calls:
                made = {**lower_parts[part.name].result()[step], **upper_parts[part.name].result()[step]}
                _climb(ladder, kiln, recording, part, step, made)
                progress.done("verify", part.name, f"{len(rungs)} rungs, step {step}")
            pipeline = whole.result()
        except BaseException:
            lower.shutdown(wait=False, cancel_futures=True)
            upper.shutdown(wait=False, cancel_futures=True)
            raise
    scheme = _base_name(kiln.schemes["double"])
    ladder.climb_latents(settings.steps - 1, recording.latents, [(top, pipeline.latents)], scheme)
    ladder.climb_image(-1, recording.image, [(top, pipeline.image)], scheme)
    progress.done("verify", "whole pipeline", f"{settings.steps} steps")
    return Parity(ladder, recording, pipeline, top, {"verify": time.perf_counter() - started, **recording.seconds})


def climb_stored(ladder: Ladder, kiln: Kiln, binaries: tuple[BinaryPart, ...], files: tuple[CombinedFile, ...]) -> None:
    """One row per cast part: its weights read back from the bundle's own file, against the checkpoint's.

    What a part computes dilutes one wrong scale among thousands of sound ones; its bytes do not.
    """
    import numpy as np

    from fluxkiln.compile.cast import compare_stored
    from fluxkiln.compile.mould import CoefficientMap

    homes = {part: kiln.path(file.blob) for file in files for part in file.parts}
    for binary in binaries:
        if binary.coefficients is None:
            continue
        template = make_template(kiln, binary.part.kind, "onnx17")
        reader = weight_reader(bind_part(binary.part, template.slots, kiln.checkpoint), kiln.checkpoint)
        coefficients = CoefficientMap.from_json(json.loads(kiln.path(binary.coefficients).read_text()))
        differing = compare_stored(homes[binary.part.name], binary.net, coefficients, reader)
        worst = max(differing, key=lambda slot: float(differing[slot].max()))
        output = f"weights of {worst}" if differing[worst].any() else "weights"
        equal = np.concatenate([1 - shares for shares in differing.values()])
        scheme = _base_name(binary.scheme)
        ladder.climb(
            binary.part.name, binary.part.kind, output, -1, np.ones_like(equal), None, [("stored", equal)], scheme
        )


def run_pipeline(kiln: Kiln, settings: Settings, runner: PartRunner) -> PipelineResult:
    """diffusers' own loop with `runner` in place of every model."""
    from fluxkiln.export.host import host_constants, pooled_row
    from fluxkiln.verify.pipeline import run_with_parts

    return run_with_parts(
        kiln.checkpoint.root, kiln.checkpoint.configs, kiln.shapes, kiln.parts,
        host_constants(kiln.checkpoint, kiln.shapes), pooled_row, runner,
        steps=settings.steps, seed=settings.seed, prompt=settings.prompt,
    )  # fmt: skip


@contextmanager
def bm1684x_rungs(
    kiln: Kiln, binaries: tuple[BinaryPart, ...], files: tuple[CombinedFile, ...], folder: Path
) -> Iterator[Rungs]:
    """Every rung of a TPU-MLIR build."""
    from fluxkiln.compile.simulate import Simulator
    from fluxkiln.export.eager import PatchedRunner

    env, chip = kiln.tpu_mlir, kiln.target.chip
    assert env is not None
    homes = lay_out_files(kiln, files, folder / "bmodels")
    with ExitStack() as stack:
        interpreter = stack.enter_context(Simulator(env, chip, kiln.logs / "interpreter.log"))
        lowered = lay_out_lowered(kiln, binaries, folder / "lowered")
        rungs: Rungs = {
            "patched": PatchedRunner(kiln.checkpoint, kiln.parts),
            "onnxruntime": onnxruntime_rung(kiln, folder / "unquantized"),
        }
        if any(kiln.scheme(part).arithmetic != "F32" for part in kiln.parts):
            rungs["dequantized"] = dequantized_rung(kiln, folder / "dequantized")
        rungs["interpreter"] = lambda part, inputs: interpreter.run(
            lowered[part], inputs, KINDS[_kind(kiln, part)].outputs
        )
        if multiplications(kiln) <= SIMULATED_MACS:
            simulator = stack.enter_context(Simulator(env, chip, kiln.logs / "simulator.log"))
            rungs["simulator"] = _net_runner(kiln, binaries, homes, simulator)
        yield rungs


def multiplications(kiln: Kiln) -> float:
    """About how many multiplications one image step takes: every weight of a block once for every token."""
    refs = kiln.checkpoint.tensors["transformer"].values()
    return float(kiln.shapes.joint_tokens) * sum(math.prod(ref.shape) for ref in refs if len(ref.shape) == 2)


@contextmanager
def cpu_rungs(kiln: Kiln, graphs: Mapping[str, Path], folder: Path) -> Iterator[Rungs]:
    """Every rung of an ONNX Runtime build, whose graphs are `graphs`; the bundle's own graphs are the top one."""
    from fluxkiln.compile.ort_session import OrtRunner
    from fluxkiln.export.eager import PatchedRunner

    top = OrtRunner(graphs)
    rungs: Rungs = {"patched": PatchedRunner(kiln.checkpoint, kiln.parts)}
    if kiln.quantized:
        rungs["onnxruntime"] = onnxruntime_rung(kiln, folder / "unquantized")
        rungs["dequantized"] = dequantized_rung(kiln, folder / "dequantized")
        rungs["executed"] = top
    else:
        rungs["onnxruntime"] = top
    yield rungs


def lay_out_files(kiln: Kiln, files: tuple[CombinedFile, ...], folder: Path) -> dict[str, Path]:
    """Part -> the file of `folder` that holds its net; files by reflink or copy under their own names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        kiln.cache.store.export(file.blob.digest, folder / file.name)
    return {part: folder / file.name for file in files for part in file.parts}


def lay_out_lowered(kiln: Kiln, binaries: tuple[BinaryPart, ...], folder: Path) -> dict[str, Path]:
    """Part -> its lowered graph beside the weight file it names; cast parts get theirs cast."""
    import numpy as np

    from fluxkiln.compile.cast import cast_interpreter_weights
    from fluxkiln.compile.mould import CoefficientMap
    from fluxkiln.compile.tpu_mlir import weight_file

    shutil.rmtree(folder, ignore_errors=True)
    paths = {}
    for binary in binaries:
        place = folder / binary.part.name
        place.mkdir(parents=True)
        text = kiln.path(binary.lowered).read_text()
        paths[binary.part.name] = place / "lowered.mlir"
        paths[binary.part.name].write_text(text)
        target = place / weight_file(text)
        if binary.coefficients is None:
            shutil.copyfile(kiln.path(binary.weights), target)
            continue
        template = make_template(kiln, binary.part.kind, "onnx17")
        reader = weight_reader(bind_part(binary.part, template.slots, kiln.checkpoint), kiln.checkpoint)
        coefficients = CoefficientMap.from_json(json.loads(kiln.path(binary.coefficients).read_text()))
        with np.load(kiln.path(binary.weights)) as arrays:
            cast_interpreter_weights(coefficients, reader, arrays, target)
    return paths


def onnxruntime_rung(kiln: Kiln, folder: Path) -> PartRunner:
    """The exported graphs of opset 23 on ONNX Runtime, weights read from the checkpoint's own bytes."""
    from fluxkiln.compile.ort_session import OrtRunner

    unquantized = dict.fromkeys(kiln.schemes, parse_scheme("F32"))
    return OrtRunner(link_parts(kiln, unquantized, folder), threads=1, most_open=1)


def dequantized_rung(kiln: Kiln, folder: Path) -> PartRunner:
    """The exported graphs of opset 17 with the weights as the scheme stores them, float32 arithmetic."""
    from fluxkiln.compile.ort_session import OrtRunner
    from fluxkiln.compile.pour import pour, quantized_matmuls

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    poured = {}
    for part in kiln.parts:
        template = make_template(kiln, part.kind, "onnx17")
        activations = {spec.name for spec in template.inputs}
        quantized = {slot for slot, _ in quantized_matmuls(template.path, activations)}
        reader = weight_reader(bind_part(part, template.slots, kiln.checkpoint), kiln.checkpoint)

        stored = partial(_stored, reader, kiln.scheme(part), quantized)
        poured[part.name] = folder / f"{part.name}.onnx"
        pour(template.path, activations, stored, poured[part.name])
    return OrtRunner(poured, threads=1, most_open=1)


def _stored(reader: WeightReader, scheme: Scheme, quantized: set[str], slot: str) -> NDArray[Any]:
    from fluxkiln.quantize.stored import stored_weight

    return stored_weight(reader(slot), scheme, slot in quantized)


def _net_runner(kiln: Kiln, binaries: tuple[BinaryPart, ...], homes: Mapping[str, Path], simulator: Any) -> PartRunner:
    nets = {binary.part.name: binary.net for binary in binaries}

    def run(part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        outputs: dict[str, NDArray[Any]] = simulator.run(
            homes[part], inputs, KINDS[_kind(kiln, part)].outputs, nets[part]
        )
        return outputs

    return run


def _replay(rungs: Rungs, recording: Recording, part: Part) -> list[dict[str, Mapping[str, NDArray[Any]]]]:
    """Step -> rung -> outputs. A rung lets go of the part's weights before the next one loads them."""
    steps: list[dict[str, Mapping[str, NDArray[Any]]]] = [{} for _ in recording.calls[part.name]]
    for rung, runner in rungs.items():
        for step, made in enumerate(steps):
            made[rung] = runner(part.name, recording.inputs(part.name, step))
        close = getattr(runner, "close", None)
        if close is not None:
            close()
    return steps


def _climb(
    ladder: Ladder, kiln: Kiln, recording: Recording, part: Part, step: int, made: Mapping[str, Mapping[str, Any]]
) -> None:
    inputs, expected = recording.inputs(part.name, step), recording.outputs(part.name, step)
    residual = dict(KINDS[part.kind].residual)
    shown = step if part.component == "transformer" else -1
    for output, reference in expected.items():
        base = inputs[residual[output]] if output in residual else None
        rungs = [(rung, outputs[output].reshape(reference.shape)) for rung, outputs in made.items()]
        ladder.climb(part.name, part.kind, output, shown, reference, base, rungs, _base_name(kiln.scheme(part)))


def _base_name(scheme: Scheme) -> str:
    """The scheme as the gates know it: without the group size."""
    return scheme.name.split("-")[0]


def _kind(kiln: Kiln, name: str) -> str:
    return next(part.kind for part in kiln.parts if part.name == name)


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)
