"""Executing HLO modules off the device, every rank a replica on a virtual CPU device in one long-lived process; and the
executor `replicas`, which runs a split model so. No NEFF, no device.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fluxkiln.compile.process import Worker
from fluxkiln.compile.toolchains.neuron.frontend import require_versions
from fluxkiln.compile.toolchains.neuron.hlo_module import entry_parameters
from fluxkiln.compile.toolchains.neuron.modules import Module
from fluxkiln.compile.toolchains.neuron.split_bundle import read_module
from fluxkiln.errors import CompileError, ResourceError
from fluxkiln.types import TensorSpec

Array = NDArray[Any]
# of each rank its weights in the order of the module's slots
Weights = Sequence[Sequence[Array]]
# reads those of a part
ReadWeights = Callable[[str], Weights]

_WORKER = Path(__file__).with_name("replica_worker.py")
# arithmetic as the module states it; and a rank may be slow on a loaded machine without being stuck
_XLA_FLAGS = (
    "--xla_cpu_enable_fast_math=false",
    "--xla_allow_excess_precision=false",
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds=600",
    "--xla_cpu_collective_call_terminate_timeout_seconds=3600",
)


@dataclass(frozen=True, slots=True)
class Held:
    """What a `Replicas` holds for later runs: a compiled module, or arrays that are its last parameters.

    `parameters` are in order, those of a module named after their number.
    """

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

    def load(self, proto: bytes) -> Held:
        """Compile a module for these replicas."""
        file = self.folder / "module.pb"
        with self._one:
            file.write_bytes(proto)
            number = int(self._ask({"do": "load", "file": str(file)})["program"])
        return Held(number, entry_parameters(proto))

    def keep(self, arrays: Sequence[Sequence[Array]]) -> Held:
        """Give each rank's arrays to its device, for all runs until `forget`: weights are moved once."""
        with self._one:
            number = int(self._ask({"do": "keep", **self._written(arrays)})["kept"])
        return Held(number, _specs(arrays[0]))

    def forget(self, kept: Held) -> None:
        """Free what `keep` moved."""
        with self._one:
            self._ask({"do": "forget", "kept": kept.number})

    def run(
        self, program: Held, arguments: Sequence[Sequence[Array]], weights: Held | None = None
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
            made = [
                [
                    np.fromfile(results, dtype_of(name), math.prod(shape), offset=offset).reshape(shape)
                    for name, shape, offset in entries
                ]
                for entries in answer["ranks"]
            ]
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


def refuse_spread(part: str, share: float) -> None:
    """Raise CompileError unless all ranks gave the same bytes."""
    if share:
        raise CompileError(
            f"part {part}: {share:.1%} of the bytes of a rank are others than those of rank 0; lower the module again"
        )


class ReplicaExecutor:
    """Runs parts as all their ranks at once; outputs are those of rank 0.

    Args:
        components: part -> component.
        module_of: part -> its module.
        weights: reads a part's shards.
        workers: ranks -> their process, for what shares them; those that are not there are started, and all are ended
            by `close`.
        most_kept: bytes of weights, of all ranks together, that are kept for later runs; the longest unused go first.
        spread: is told of each run the largest share of bytes in which any rank's outputs differ from rank 0's.

    Raises:
        ToolchainError: jax or jaxlib is missing or of another version (when a part is first run).
    """

    name = "replicas"

    def __init__(
        self,
        components: Mapping[str, str],
        module_of: Callable[[str], Module],
        weights: ReadWeights,
        *,
        workers: dict[int, Replicas] | None = None,
        most_kept: float = math.inf,
        spread: Callable[[str, float], None] = refuse_spread,
    ) -> None:
        self.components, self.module_of, self.weights = dict(components), module_of, weights
        self.most_kept, self.spread = most_kept, spread
        self._workers: dict[int, Replicas] = {} if workers is None else workers
        self._programs: dict[str, Held] = {}
        # the longest unused first
        self._kept: dict[str, tuple[Held, int]] = {}

    def __call__(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        module = self.module_of(part)
        arguments = module_arguments(module, part, inputs)
        self._load(part)
        kept = self._kept[part] = self._kept.pop(part)
        ranks = self._worker(part).run(self._programs[module.name], [arguments] * module.ranks, kept[0])
        shares = [
            float(np.mean(own.view(np.uint8) != first.view(np.uint8)))
            for other in ranks[1:]
            for own, first in zip(other, ranks[0], strict=True)
        ]
        self.spread(part, max(shares, default=0.0))
        return {spec.name: array.astype(np.float32) for spec, array in zip(module.outputs, ranks[0], strict=True)}

    def load(self, component: str) -> None:
        for part, own in self.components.items():
            if own == component:
                self._load(part)

    def release(self, component: str) -> None:
        for part in [part for part in self._kept if self.components[part] == component]:
            self.drop(part)

    def drop(self, part: str) -> None:
        if part in self._kept:
            self._worker(part).forget(self._kept.pop(part)[0])

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        for held in (self._workers, self._programs, self._kept):
            held.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        import jaxlib

        ranks = max(self.module_of(part).ranks for part in self.components)
        return {
            "runtime": f"XLA CPU replicas (jaxlib {jaxlib.__version__})",
            "device": f"CPU, {ranks} virtual devices; no NEFF, no Neuron core",
        }

    def _load(self, part: str) -> None:
        module, worker = self.module_of(part), self._worker(part)
        if module.name not in self._programs:
            self._programs[module.name] = worker.load(read_module(module))
        if part not in self._kept:
            arrays = self.weights(part)
            size = sum(array.nbytes for rank in arrays for array in rank)
            while self._kept and size + sum(known for _, known in self._kept.values()) > self.most_kept:
                self.drop(next(iter(self._kept)))
            self._kept[part] = worker.keep(arrays), size

    def _worker(self, part: str) -> Replicas:
        ranks = self.module_of(part).ranks
        if ranks not in self._workers:
            self._workers[ranks] = Replicas(ranks)
        return self._workers[ranks]


def module_arguments(module: Module, part: str, inputs: Mapping[str, Array]) -> list[Array]:
    """The activations of a module in its order and dtypes, the same for all ranks.

    Raises:
        CompileError: one is missing, unknown or of another shape.
    """
    names = [spec.name for spec in module.inputs]
    if odd := sorted(set(names) ^ inputs.keys()):
        raise CompileError(f"part {part} takes {', '.join(names)}: {', '.join(odd)} is missing or one too many")
    arguments = []
    for spec in module.inputs:
        array = inputs[spec.name]
        if tuple(array.shape) != spec.shape:
            raise CompileError(
                f"part {part}: input {spec.name} has shape {list(array.shape)}, its module takes {list(spec.shape)}; "
                "use the size and token count of the build"
            )
        arguments.append(np.ascontiguousarray(array).astype(dtype_of(spec.dtype)))
    return arguments


def dtype_of(name: str) -> Any:
    """A numpy dtype, bfloat16 included."""
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
