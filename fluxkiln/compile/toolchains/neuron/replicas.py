"""Executing HLO modules off the device: every rank a replica on a virtual CPU device, in one long-lived process."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.toolchains.neuron.frontend import require_versions
from fluxkiln.compile.toolchains.neuron.hlo_proto import entry_parameters
from fluxkiln.compile.worker import Worker
from fluxkiln.errors import CompileError, ResourceError
from fluxkiln.types import TensorSpec

Array = NDArray[Any]

_WORKER = Path(__file__).with_name("replica_worker.py")
# arithmetic as the module states it; and a rank may be slow on a loaded machine without being stuck
_XLA_FLAGS = (
    "--xla_cpu_enable_fast_math=false",
    "--xla_allow_excess_precision=false",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
)


@dataclass(frozen=True, slots=True)
class Program:
    """A module that a `Replicas` has compiled; `parameters` in order, named after their number."""

    number: int
    parameters: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Kept:
    """Arrays that a `Replicas` holds for later runs; `parameters` as the last ones of a program."""

    number: int
    parameters: tuple[TensorSpec, ...]


class Replicas(Worker):
    """A process with as many virtual CPU devices as there are ranks; executes canonical modules, once or many times.

    Threads may share it; they take turns.

    Float32 is computed in float32 and every bfloat16 result is rounded: XLA's faster ways are off.

    Args:
        log: what XLA prints goes there; into a file of the process's own if left out.

    Raises:
        ToolchainError: jax or jaxlib is missing or of another version. CompileError: XLA does not take a module or its
        arguments. ResourceError: the process was killed.
    """

    def __init__(self, ranks: int, log: Path | None = None) -> None:
        require_versions()
        self.ranks = ranks
        self._one = threading.RLock()  # callers share the files below; ranks use all cores as it is
        flags = (*_XLA_FLAGS, f"--xla_force_host_platform_device_count={ranks}")
        environ = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "0"}
        super().__init__([sys.executable, "-P", str(_WORKER)], environ, "replicas", log)

    def load(self, proto: bytes) -> Program:
        """Compile a module for these replicas."""
        file = self.folder / "module.pb"
        with self._one:
            file.write_bytes(proto)
            number = int(self._ask({"do": "load", "file": str(file)})["program"])
        return Program(number, entry_parameters(proto))

    def keep(self, arrays: Sequence[Sequence[Array]]) -> Kept:
        """Give each rank's arrays to its device, for all runs until `forget`: weights are moved once."""
        with self._one:
            number = int(self._ask({"do": "keep", **self._written(arrays)})["kept"])
        return Kept(number, _specs(arrays[0]))

    def forget(self, kept: Kept) -> None:
        """Free what `keep` moved."""
        with self._one:
            self._ask({"do": "forget", "kept": kept.number})

    def run(
        self, program: Program, arguments: Sequence[Sequence[Array]], weights: Kept | None = None
    ) -> list[list[Array]]:
        """Execute a module on all ranks at once.

        Args:
            arguments: of each rank, in the order of the module's parameters; bfloat16 as `ml_dtypes.bfloat16`.
            weights: further arguments, after those.

        Returns:
            Of each rank its outputs in order.
        """
        kept = weights.parameters if weights else ()
        for rank, arrays in enumerate(arguments):
            _check_arguments((*_specs(arrays), *kept), program.parameters, f"rank {rank}")
        results = self.folder / "results"
        with self._one:
            request = {"do": "run", "program": program.number, "kept": weights.number if weights else None,
                       "results": str(results), **self._written(arguments)}  # fmt: skip
            answer = self._ask(request)
            with results.open("rb") as file:
                made = [[_read(file, *entry) for entry in entries] for entries in answer["ranks"]]
            results.unlink()
        return made

    def _written(self, arrays: Sequence[Sequence[Array]]) -> dict[str, Any]:
        """The arrays in a file, those that ranks share once, and where each is."""
        if len(arrays) != self.ranks:
            raise CompileError(f"arguments for {len(arrays)} ranks, there are {self.ranks}; give each rank its own")
        path = self.folder / "arrays"
        offsets: dict[int, int] = {}
        with path.open("wb") as file:
            for array in (array for rank in arrays for array in rank):
                if id(array) not in offsets:
                    offsets[id(array)] = file.tell()
                    np.ascontiguousarray(array).reshape(-1).view(np.uint8).tofile(file)
        return {
            "file": str(path),
            "ranks": [[(array.dtype.name, array.shape, offsets[id(array)]) for array in rank] for rank in arrays],
        }

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self.request(request)
        what = f"executing on {self.ranks} virtual devices ({request['do']})"
        if isinstance(answer, int):
            if answer == -signal.SIGKILL:
                raise ResourceError(
                    f"{what}: the process was killed (signal 9), which is how the system ends it when memory runs out; "
                    "use a smaller SIZE, fewer ranks or a machine with more memory"
                )
            raise CompileError(
                f"{what}: XLA ended with code {answer}: {self._last_lines()}; check the module (check_hlo) and lower "
                "it again with the pinned jaxlib"
            )
        if not answer["ok"]:
            raise CompileError(f"{what} failed: {answer['error']}; lower the module again with the pinned jaxlib")
        return answer

    def _last_lines(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return " | ".join([line.strip() for line in lines if line.strip()][-3:]) or "it printed nothing"


def run_replicas(proto: bytes, arguments: Sequence[Sequence[Array]], ranks: int) -> list[list[Array]]:
    """Execute a module once; see `Replicas.run`. Starting the process takes a second or two."""
    with Replicas(ranks) as replicas:
        return replicas.run(replicas.load(proto), arguments)


def _specs(arrays: Sequence[Array]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(f"p{index}", array.shape, array.dtype.name) for index, array in enumerate(arrays))


def _check_arguments(given: Sequence[TensorSpec], wanted: Sequence[TensorSpec], who: str) -> None:
    if len(given) != len(wanted):
        raise CompileError(f"{who} has {len(given)} arguments, the module takes {len(wanted)}; give all, in order")
    for found, parameter in zip(given, wanted, strict=True):
        if (found.shape, found.dtype) != (parameter.shape, parameter.dtype):
            raise CompileError(
                f"{who}, parameter {parameter.name}: an array {found.dtype} {list(found.shape)} is given, the module "
                f"takes {parameter.dtype} {list(parameter.shape)}; cast it or give arguments in the module's order"
            )


def _read(file: IO[bytes], name: str, shape: Sequence[int], offset: int) -> Array:
    import ml_dtypes

    dtype = np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
    file.seek(offset)
    count = int(np.prod(shape, dtype=np.int64))
    return np.fromfile(file, dtype, count).reshape(shape)
