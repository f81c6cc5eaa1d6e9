"""The rungs of a build's parity ladder: what runs a part at each of them, with one part's weights in memory or on disk.

Every runner takes the parts of the kiln it was made for, at that kiln's shapes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.corrections import part_packers, part_weights
from fluxkiln.compile.plan import Binary, BundleFile, Plan
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.toolchains.tpu_mlir.environment import installed
from fluxkiln.compile.weights import part_rounders
from fluxkiln.export.bindings import bind_part, weight_reader
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounding import as_compiler
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import PartRunner, WeightReader, find_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.runner import Filling, Rewrite
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator
    from fluxkiln.quantize.side_tensors import PackerOf

# rung -> runner, from the bottom of the ladder to its top
Rungs = dict[str, PartRunner]


@contextmanager
def bm1684x_rungs(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    binaries: tuple[Binary, ...],
    files: tuple[BundleFile, ...],
    folder: Path,
    simulated: bool = True,
) -> Iterator[Rungs]:
    """Every rung of a TPU-MLIR build, with the simulator's if `simulated`; without TPU-MLIR those that need none."""
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

    env, chip = installed(), plan.target.chip
    if env is None:
        yield rungs_below(checkpoint, plan, cache)
        return
    with ExitStack() as stack:
        interpreter = stack.enter_context(Simulator(env, chip, plan.logs / "interpreter.log"))
        rungs = rungs_below(checkpoint, plan, cache)
        rungs["interpreter"] = Interpreted(checkpoint, plan, cache, binaries, interpreter, folder / "lowered")
        if simulated:
            simulator = stack.enter_context(Simulator(env, chip, plan.logs / "simulator.log"))
            homes = lay_out_files(cache, files, folder / "bmodels")
            rungs["simulator"] = _net_runner(binaries, homes, simulator)
        yield rungs


@contextmanager
def executed_rung(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    binaries: tuple[Binary, ...],
    graphs: Mapping[str, Path],
    folder: Path,
) -> Iterator[Rungs]:
    """The one rung at which parts of a large model run in their compiled form: the interpreter, or their own graphs."""
    if plan.target.toolchain == "tpu_mlir":
        from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

        env = installed()
        if env is None:
            yield {}
            return
        with Simulator(env, plan.target.chip, plan.logs / "interpreter.log") as interpreter:
            yield {"interpreter": Interpreted(checkpoint, plan, cache, binaries, interpreter, folder / "lowered")}
    else:
        from fluxkiln.compile.onnx.session import OrtRunner

        yield {"executed" if plan.quantized else "onnxruntime": OrtRunner(graphs, most_open=1)}


def stored_rung(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> Rungs:
    """The rung `dequantized` of parts at the shapes of the build, in little memory; none where it says nothing new."""
    from fluxkiln.compile.onnx.runner import attention_by_heads

    if not _stores_otherwise(plan):
        return {}
    return {"dequantized": dequantized_rung(checkpoint, plan, cache, 0, attention_by_heads)}


def _stores_otherwise(plan: Plan) -> bool:
    """Whether weights as the target stores them are others than the checkpoint's."""
    if plan.target.toolchain == "onnxruntime":
        return plan.quantized
    return any(plan.scheme(part).arithmetic != "F32" for part in plan.parts)


def rungs_below(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1) -> Rungs:
    """The rungs that need nothing but the checkpoint: patched, onnxruntime, and dequantized where that is another.

    Args:
        threads: of ONNX Runtime; PyTorch takes all cores.
    """
    from fluxkiln.export.eager import PatchedRunner

    rungs: Rungs = {
        "patched": PatchedRunner(checkpoint, plan.parts),
        "onnxruntime": onnxruntime_rung(checkpoint, plan, cache, threads),
    }
    if _stores_otherwise(plan):
        rungs["dequantized"] = dequantized_rung(checkpoint, plan, cache, threads)
    return rungs


def onnxruntime_rung(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1) -> PartRunner:
    """The templates of opset 23 on ONNX Runtime, fed with the checkpoint's weights."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    return TemplateRunner(partial(_fill, checkpoint, plan, cache), threads=threads)


def dequantized_rung(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, threads: int = 1, rewrite: Rewrite | None = None
) -> PartRunner:
    """The templates of opset 17 fed with the weights as the scheme stores them, float32 arithmetic."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    return TemplateRunner(partial(_fill_stored, checkpoint, plan, cache), rewrite=rewrite, threads=threads)


def _fill(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, name: str) -> Filling:
    from fluxkiln.compile.onnx.runner import Filling

    part = find_part(plan.parts, name)
    template = make_template(checkpoint, plan, cache, part.kind, "onnx23")
    return Filling(template, weight_reader(bind_part(part, template.slots, checkpoint), checkpoint))


def _fill_stored(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, name: str) -> Filling:
    from fluxkiln.compile.onnx.filled import quantized_matmuls
    from fluxkiln.compile.onnx.runner import Filling

    part = find_part(plan.parts, name)
    template, scheme = make_template(checkpoint, plan, cache, part.kind, "onnx17"), plan.scheme(part)
    matmuls = quantized_matmuls(template.path, {spec.name for spec in template.inputs})
    quantized = {slot for slot, _ in matmuls if not scheme.keeps(slot)}
    reader = weight_reader(bind_part(part, template.slots, checkpoint), checkpoint)
    packer_of = part_packers(checkpoint, plan, cache, part)
    if packer_of is not None:
        return Filling(template, partial(_sided, reader, scheme, quantized, packer_of))
    return Filling(template, partial(_stored, reader, scheme, quantized, part_rounders(checkpoint, plan, cache, part)))


def _sided(reader: WeightReader, scheme: Scheme, quantized: set[str], packer_of: PackerOf, slot: str) -> NDArray[Any]:
    if slot not in quantized:
        return _stored(reader, scheme, quantized, as_compiler, slot)
    return packer_of(slot, None)(reader(slot)).dequantize(scheme.group_size)


def _stored(
    reader: WeightReader, scheme: Scheme, quantized: set[str], rounder_of: RounderOf, slot: str
) -> NDArray[Any]:
    from fluxkiln.quantize.stored import stored_weight

    rounder = rounder_of(slot, None) if slot in quantized and scheme.weight_bits else None
    return stored_weight(reader(slot), scheme, slot in quantized, rounder)


class Interpreted:
    """Runs parts in the compiler's interpreter. The last one's lowered graph and its weights lie in `folder`."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        cache: ActionCache,
        binaries: tuple[Binary, ...],
        interpreter: Simulator,
        folder: Path,
    ) -> None:
        self.checkpoint, self.plan, self.cache = checkpoint, plan, cache
        self.binaries = {binary.part.name: binary for binary in binaries}
        self.interpreter = interpreter
        self.folder = folder
        self._laid_out = ""

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32; errors as `Simulator.run`."""
        if part != self._laid_out:
            self.close()
            lay_out_lowered(self.checkpoint, self.plan, self.cache, self.binaries[part], self.folder)
            self._laid_out = part
        outputs = self.binaries[part].part.traits.outputs
        return self.interpreter.run(self.folder / "lowered.mlir", inputs, outputs)

    def close(self) -> None:
        """Remove the files; the runner can be used again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._laid_out = ""


def lay_out_lowered(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, folder: Path) -> None:
    """Write a part's lowered graph as `lowered.mlir` beside the weight file that it names; a cast part's is cast."""
    from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_weight_file
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import weight_file
    from fluxkiln.compile.toolchains.tpu_mlir.lowered import lean_graph

    folder.mkdir(parents=True)
    text = cache.path(binary.blobs["lowered"]).read_text()
    (folder / "lowered.mlir").write_text(lean_graph(text))
    target = folder / weight_file(text)
    if "map" not in binary.blobs:
        shutil.copyfile(cache.path(binary.blobs["weights"]), target)
        return
    reader = part_weights(
        checkpoint, plan, cache, binary.part, make_template(checkpoint, plan, cache, binary.part.kind, "onnx17")
    )
    coefficients = CoefficientMap.from_json(json.loads(cache.path(binary.blobs["map"]).read_text()))
    cast_weight_file(coefficients, reader, target, part_rounders(checkpoint, plan, cache, binary.part))


def lay_out_files(cache: ActionCache, files: tuple[BundleFile, ...], folder: Path) -> dict[str, Path]:
    """Part -> the file of `folder` that holds its net; files by link or copy under their own names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        cache.store.export(file.blob.digest, folder / file.name, link=True)
    return {part: folder / file.name for file in files for part in file.parts}


def _net_runner(
    binaries: tuple[Binary, ...],
    homes: Mapping[str, Path],
    simulator: Any,
) -> PartRunner:
    by_name = {binary.part.name: binary for binary in binaries}

    def run(part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        binary = by_name[part]
        outputs: dict[str, NDArray[Any]] = simulator.run(homes[part], inputs, binary.part.traits.outputs, binary.net)
        return outputs

    return run
