"""Executing compiled parts off the device: TPU-MLIR's simulator and its interpreter, in one long-lived process."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.process import stop
from fluxkiln.compile.tpu_mlir_env import TpuMlirEnv, tpu_mlir_environ
from fluxkiln.errors import CompileError, ResourceError

_WORKER = Path(__file__).with_name("simulator_worker.py")


class Simulator:
    """A process of TPU-MLIR's environment that runs nets one at a time.

    Args:
        chip: whose simulator is loaded.
        log: what the libraries print goes there.
    """

    def __init__(self, env: TpuMlirEnv, chip: str, log: Path) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.seconds = 0.0
        self._scratch = tempfile.TemporaryDirectory(prefix="fluxkiln-simulator-")
        self._log_file = log.open("ab")
        self._process = subprocess.Popen(
            [str(env.python), str(_WORKER)], cwd=self._scratch.name, env=tpu_mlir_environ(env, chip),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log_file, start_new_session=True,
        )  # fmt: skip

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
        scratch = Path(self._scratch.name)
        arrays: dict[str, Any] = dict(inputs)
        np.savez(scratch / "in.npz", **arrays)
        request = {"file": str(file.absolute()), "net": net, "inputs": "in.npz", "outputs": "out.npz", "values": values}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            code = self._process.wait()
            raise ResourceError(
                f"simulating {file.name} {net}: the process ended with code {code} (-9: killed for memory); "
                f"log: {self.log}"
            )
        answer = json.loads(line)
        if not answer["ok"]:
            raise CompileError(f"simulating {file.name} {net} failed: {answer['error']}; log: {self.log}")
        self.seconds += float(answer["seconds"])
        with np.load(scratch / "out.npz") as results:
            return {name: results[name] for name in results.files}

    def close(self) -> None:
        """End the process; its scratch files go with it."""
        stop(self._process)
        for stream in (self._process.stdin, self._process.stdout, self._log_file):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):  # a request that the process did not live to read
                    stream.close()
        self._scratch.cleanup()

    def __enter__(self) -> Simulator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
