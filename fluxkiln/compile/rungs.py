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

from fluxkiln.compile.corrections import part_packers, part_weights
from fluxkiln.compile.templates import BinaryPart, CombinedFile, Kiln, make_template
from fluxkiln.compile.weights import part_rounders
from fluxkiln.export.bindings import WeightReader, bind_part, weight_reader
from fluxkiln.quantize.pack import RounderOf
from fluxkiln.quantize.rounding import as_compiler
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import PartRunner, find_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.runner import Filling, Rewrite
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator
    from fluxkiln.quantize.side_tensors import PackerOf

# rung -> runner, from the bottom of the ladder to its top
Rungs = dict[str, PartRunner]


@contextmanager
def bm1684x_rungs(
    kiln: Kiln, binaries: tuple[BinaryPart, ...], files: tuple[CombinedFile, ...], folder: Path, simulated: bool = True
) -> Iterator[Rungs]:
    """Every rung of a TPU-MLIR build, with the simulator's if `simulated`; without TPU-MLIR those that need none."""
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

    env, chip = kiln.tpu_mlir, kiln.target.chip
    if env is None:
        yield rungs_below(kiln)
        return
    with ExitStack() as stack:
        interpreter = stack.enter_context(Simulator(env, chip, kiln.logs / "interpreter.log"))
        rungs = rungs_below(kiln)
        rungs["interpreter"] = Interpreted(kiln, binaries, interpreter, folder / "lowered")
        if simulated:
            simulator = stack.enter_context(Simulator(env, chip, kiln.logs / "simulator.log"))
            homes = lay_out_files(kiln, files, folder / "bmodels")
            rungs["simulator"] = _net_runner(kiln, binaries, homes, simulator)
        yield rungs


@contextmanager
def cpu_rungs(kiln: Kiln, graphs: Mapping[str, Path]) -> Iterator[Rungs]:
    """Every rung of an ONNX Runtime build, whose graphs are `graphs`; the bundle's own graphs are the top one."""
    from fluxkiln.compile.onnx.session import OrtRunner

    # without quantization the bundle's own graphs are the exported templates
    yield {**rungs_below(kiln), "executed" if kiln.quantized else "onnxruntime": OrtRunner(graphs)}


@contextmanager
def executed_rung(
    kiln: Kiln, binaries: tuple[BinaryPart, ...], graphs: Mapping[str, Path], folder: Path
) -> Iterator[Rungs]:
    """The one rung at which parts of a large model run in their compiled form: the interpreter, or their own graphs."""
    if kiln.target.toolchain == "tpu_mlir":
        from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

        env = kiln.tpu_mlir
        if env is None:
            yield {}
            return
        with Simulator(env, kiln.target.chip, kiln.logs / "interpreter.log") as interpreter:
            yield {"interpreter": Interpreted(kiln, binaries, interpreter, folder / "lowered")}
    else:
        from fluxkiln.compile.onnx.session import OrtRunner

        yield {"executed" if kiln.quantized else "onnxruntime": OrtRunner(graphs, most_open=1)}


def stored_rung(kiln: Kiln) -> Rungs:
    """The rung `dequantized` of parts at the shapes of the build, in little memory; none where it says nothing new."""
    from fluxkiln.compile.onnx.runner import attention_by_heads

    if not _stores_otherwise(kiln):
        return {}
    return {"dequantized": dequantized_rung(kiln, 0, attention_by_heads)}


def _stores_otherwise(kiln: Kiln) -> bool:
    """Whether weights as the target stores them are others than the checkpoint's."""
    if kiln.target.toolchain == "onnxruntime":
        return kiln.quantized
    return any(kiln.scheme(part).arithmetic != "F32" for part in kiln.parts)


def rungs_below(kiln: Kiln, threads: int = 1) -> Rungs:
    """The rungs that need nothing but the checkpoint: patched, onnxruntime, and dequantized where that is another.

    Args:
        threads: of ONNX Runtime; PyTorch takes all cores.
    """
    from fluxkiln.export.eager import PatchedRunner

    rungs: Rungs = {
        "patched": PatchedRunner(kiln.checkpoint, kiln.parts),
        "onnxruntime": onnxruntime_rung(kiln, threads),
    }
    if _stores_otherwise(kiln):
        rungs["dequantized"] = dequantized_rung(kiln, threads)
    return rungs


def onnxruntime_rung(kiln: Kiln, threads: int = 1) -> PartRunner:
    """The templates of opset 23 on ONNX Runtime, fed with the checkpoint's weights."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    return TemplateRunner(partial(_fill, kiln), threads=threads)


def dequantized_rung(kiln: Kiln, threads: int = 1, rewrite: Rewrite | None = None) -> PartRunner:
    """The templates of opset 17 fed with the weights as the scheme stores them, float32 arithmetic."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    return TemplateRunner(partial(_fill_stored, kiln), rewrite=rewrite, threads=threads)


def _fill(kiln: Kiln, name: str) -> Filling:
    from fluxkiln.compile.onnx.runner import Filling

    part = find_part(kiln.parts, name)
    template = make_template(kiln, part.kind, "onnx23")
    return Filling(template, weight_reader(bind_part(part, template.slots, kiln.checkpoint), kiln.checkpoint))


def _fill_stored(kiln: Kiln, name: str) -> Filling:
    from fluxkiln.compile.onnx.filled import quantized_matmuls
    from fluxkiln.compile.onnx.runner import Filling

    part = find_part(kiln.parts, name)
    template, scheme = make_template(kiln, part.kind, "onnx17"), kiln.scheme(part)
    matmuls = quantized_matmuls(template.path, {spec.name for spec in template.inputs})
    quantized = {slot for slot, _ in matmuls if not scheme.keeps(slot)}
    reader = weight_reader(bind_part(part, template.slots, kiln.checkpoint), kiln.checkpoint)
    packer_of = part_packers(kiln, part)
    if packer_of is not None:
        return Filling(template, partial(_sided, reader, scheme, quantized, packer_of))
    return Filling(template, partial(_stored, reader, scheme, quantized, part_rounders(kiln, part)))


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

    def __init__(self, kiln: Kiln, binaries: tuple[BinaryPart, ...], interpreter: Simulator, folder: Path) -> None:
        self.kiln = kiln
        self.binaries = {binary.part.name: binary for binary in binaries}
        self.interpreter = interpreter
        self.folder = folder
        self._laid_out = ""

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32; errors as `Simulator.run`."""
        if part != self._laid_out:
            self.close()
            lay_out_lowered(self.kiln, self.binaries[part], self.folder)
            self._laid_out = part
        outputs = self.binaries[part].part.traits.outputs
        return self.interpreter.run(self.folder / "lowered.mlir", inputs, outputs)

    def close(self) -> None:
        """Remove the files; the runner can be used again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self._laid_out = ""


def lay_out_lowered(kiln: Kiln, binary: BinaryPart, folder: Path) -> None:
    """Write a part's lowered graph as `lowered.mlir` beside the weight file that it names; a cast part's is cast."""
    from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_weight_file
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import weight_file
    from fluxkiln.compile.toolchains.tpu_mlir.lowered import lean_graph

    folder.mkdir(parents=True)
    text = kiln.path(binary.lowered).read_text()
    (folder / "lowered.mlir").write_text(lean_graph(text))
    target = folder / weight_file(text)
    if binary.coefficients is None:
        shutil.copyfile(kiln.path(binary.weights), target)
        return
    reader = part_weights(kiln, binary.part, make_template(kiln, binary.part.kind, "onnx17"))
    coefficients = CoefficientMap.from_json(json.loads(kiln.path(binary.coefficients).read_text()))
    cast_weight_file(coefficients, reader, target, part_rounders(kiln, binary.part))


def lay_out_files(kiln: Kiln, files: tuple[CombinedFile, ...], folder: Path) -> dict[str, Path]:
    """Part -> the file of `folder` that holds its net; files by link or copy under their own names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        kiln.cache.store.export(file.blob.digest, folder / file.name, link=True)
    return {part: folder / file.name for file in files for part in file.parts}


def _net_runner(kiln: Kiln, binaries: tuple[BinaryPart, ...], homes: Mapping[str, Path], simulator: Any) -> PartRunner:
    by_name = {binary.part.name: binary for binary in binaries}

    def run(part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        binary = by_name[part]
        outputs: dict[str, NDArray[Any]] = simulator.run(homes[part], inputs, binary.part.traits.outputs, binary.net)
        return outputs

    return run
