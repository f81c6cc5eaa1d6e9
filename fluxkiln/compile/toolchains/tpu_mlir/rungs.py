"""The rungs of a build: its lowered graphs in the compiler's interpreter, its files on the simulator, its bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.executor import bind_net
from fluxkiln.compile.plan import Binary, BundleFile, Made, Plan
from fluxkiln.compile.rungs import rungs_below
from fluxkiln.compile.templates import make_template
from fluxkiln.compile.tensors import multiplications
from fluxkiln.compile.toolchain import Climb, Rungs
from fluxkiln.compile.toolchains.tpu_mlir import environment
from fluxkiln.compile.toolchains.tpu_mlir.cmodel import MOST_MULTIPLICATIONS, CmodelExecutor
from fluxkiln.compile.weights import part_rounders, part_weights
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.verify.ladder import Ladder, gate_scheme

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator


@contextmanager
def climb(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path) -> Iterator[Climb]:
    """Every rung of a build, the simulator's where a step is not too much for it; without TPU-MLIR, what needs none."""
    with ExitStack() as stack:
        rungs = rungs_below(checkpoint, plan, cache)
        rungs |= stack.enter_context(execute(checkpoint, plan, cache, made, folder))
        env = environment.installed()
        if env is not None and multiplications(checkpoint, plan.shapes) <= MOST_MULTIPLICATIONS:
            homes = lay_out_files(cache, made.files, folder / "bmodels")
            nets = {binary.part.name: bind_net(binary, homes[binary.part.name]) for binary in made.binaries}
            simulator = CmodelExecutor(nets, env, plan.target.chip, log=plan.logs / "simulator.log")
            stack.callback(simulator.close)
            # a function, which is not closed after each part
            rungs["simulator"] = simulator.__call__
        yield Climb(rungs, plan.parts)


@contextmanager
def execute(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, folder: Path) -> Iterator[Rungs]:
    """The interpreter's rung; none without TPU-MLIR."""
    from fluxkiln.compile.toolchains.tpu_mlir.simulator import Simulator

    env = environment.installed()
    if env is None:
        yield {}
        return
    with Simulator(env, plan.target.chip, plan.logs / "interpreter.log") as interpreter:
        yield {"interpreter": Interpreted(checkpoint, plan, cache, made.binaries, interpreter, folder / "lowered")}


def read_back(ladder: Ladder, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made) -> None:
    """One row per cast part: its weights read back from the bundle's own file, against the checkpoint's.

    What a part computes dilutes one wrong scale among thousands of sound ones; its bytes do not.
    """
    import numpy as np

    homes = {part: cache.path(file.blob) for file in made.files for part in file.parts}
    for binary in made.binaries:
        if "map" not in binary.blobs:
            continue
        part = binary.part
        differing = compare_part(checkpoint, plan, cache, binary, homes[part.name])
        worst = max(differing, key=lambda slot: float(differing[slot].max()))
        output = f"weights of {worst}" if differing[worst].any() else "weights"
        equal = np.concatenate([1 - shares for shares in differing.values()])
        scheme, rungs = gate_scheme(binary.scheme), [("stored", equal)]
        ladder.climb(part.name, part.traits, output, -1, np.ones_like(equal), None, rungs, scheme)


def compare_part(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, file: Path
) -> dict[str, NDArray[Any]]:
    """What `compare_stored` says of a cast part, whose net is in `file`."""
    from fluxkiln.compile.toolchains.tpu_mlir.cast import compare_stored

    part = binary.part
    reader = part_weights(checkpoint, plan, cache, part, make_template(checkpoint, plan, cache, part.kind, "onnx17"))
    rounder_of = part_rounders(checkpoint, plan, cache, part)
    return compare_stored(file, binary.net, read_map(cache, binary), reader, rounder_of)


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
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import weight_file
    from fluxkiln.compile.toolchains.tpu_mlir.lowered import lean_graph

    folder.mkdir(parents=True)
    text = cache.path(binary.blobs["lowered"]).read_text()
    (folder / "lowered.mlir").write_text(lean_graph(text))
    target = folder / weight_file(text)
    if "map" not in binary.blobs:
        shutil.copyfile(cache.path(binary.blobs["weights"]), target)
        return
    part = binary.part
    reader = part_weights(checkpoint, plan, cache, part, make_template(checkpoint, plan, cache, part.kind, "onnx17"))
    cast_weight_file(read_map(cache, binary), reader, target, part_rounders(checkpoint, plan, cache, part))


def lay_out_files(cache: ActionCache, files: tuple[BundleFile, ...], folder: Path) -> dict[str, Path]:
    """Part -> the file of `folder` that holds its net; files by link or copy under their own names."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for file in files:
        cache.store.export(file.blob.digest, folder / file.name, link=True)
    return {part: folder / file.name for file in files for part in file.parts}


def read_map(cache: ActionCache, binary: Binary) -> CoefficientMap:
    """Which bytes of a cast part come from which slot."""
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap

    return CoefficientMap.from_json(json.loads(cache.path(binary.blobs["map"]).read_text()))
