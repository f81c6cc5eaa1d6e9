"""Executing compiled parts off the device: TPU-MLIR's simulator and its interpreter, in one long-lived process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.process import Worker
from fluxkiln.compile.toolchains.tpu_mlir.environment import TpuMlirEnv, tpu_mlir_environ
from fluxkiln.errors import CompileError, ResourceError

_WORKER = Path(__file__).with_name("simulator_worker.py")


class Simulator(Worker):
    """A process of TPU-MLIR's environment that runs nets one at a time.

    Args:
        chip: whose simulator is loaded.
        log: what the libraries print goes there.
    """

    def __init__(self, env: TpuMlirEnv, chip: str, log: Path) -> None:
        super().__init__([str(env.python), str(_WORKER)], tpu_mlir_environ(env, chip), "simulator", log)
        self.seconds = 0.0

    def run(
        self, file: Path, inputs: Mapping[str, NDArray[Any]], outputs: tuple[str, ...], net: str = ""
    ) -> dict[str, NDArray[Any]]:
        """Run one net.

        Args:
            file: a `.bmodel` (simulator) or a `*_tpu.mlir` beside its weight file (interpreter).
            inputs: by the net's input names, float32 or integer.
            outputs: what to call its outputs, in order.
            net: which net of a combined bmodel; the first by default.

        Raises:
            CompileError: the net does not exist, or the run failed. ResourceError: the process was killed.
        """
        made = list(self._ask(file, inputs, net, ()).values())
        if len(made) != len(outputs):
            raise CompileError(f"{file.name} {net} has {len(made)} outputs, {len(outputs)} are expected")
        return dict(zip(outputs, made, strict=True))

    def look(self, file: Path, inputs: Mapping[str, NDArray[Any]], values: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        """Values on the way through a lowered graph, by its own names, float32; all of them stay in memory meanwhile.

        Raises: as `run`.
        """
        return self._ask(file, inputs, "", values)

    def _ask(
        self, file: Path, inputs: Mapping[str, NDArray[Any]], net: str, values: tuple[str, ...]
    ) -> dict[str, NDArray[Any]]:
        arrays: dict[str, Any] = dict(inputs)
        np.savez(self.folder / "in.npz", **arrays)
        request = {"file": str(file.absolute()), "net": net, "inputs": "in.npz", "outputs": "out.npz", "values": values}
        answer = self.request(request)
        if isinstance(answer, int):
            raise ResourceError(
                f"simulating {file.name} {net}: the process ended with code {answer} (-9: killed for memory); "
                f"log: {self.log}"
            )
        if not answer["ok"]:
            raise CompileError(f"simulating {file.name} {net} failed: {answer['error']}; log: {self.log}")
        self.seconds += float(answer["seconds"])
        with np.load(self.folder / "out.npz") as results:
            return {name: results[name] for name in results.files}
