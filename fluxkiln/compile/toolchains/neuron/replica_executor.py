"""Executor `replicas`: the modules of a split model on XLA's CPU, each rank a virtual device. No NEFF, no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.toolchains.neuron.split_bundle import SplitBundle, SplitModule, read_module
from fluxkiln.errors import CompileError
from fluxkiln.types import Kind

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.toolchains.neuron.replicas import Kept, Program, Replicas

# part -> rank -> its weights in the order of its module's slots
ReadWeights = Callable[[str], "Sequence[Sequence[NDArray[Any]]]"]


class ReplicaExecutor:
    """Runs parts as all their ranks at once; outputs are those of rank 0, and must be the same on all.

    Args:
        kinds: part -> kind.
        weights: reads a part's shards.

    Raises:
        ToolchainError: jax or jaxlib is missing or of another version (when a part is first run).
    """

    name = "replicas"

    def __init__(self, bundle: SplitBundle, kinds: Mapping[str, Kind], weights: ReadWeights) -> None:
        self.bundle = bundle
        self.kinds = dict(kinds)
        self.weights = weights
        self._workers: dict[int, Replicas] = {}
        self._programs: dict[str, Program] = {}
        self._kept: dict[str, Kept] = {}

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import numpy as np

        module = self.bundle.module_of(part)
        arguments = module_arguments(module, part, inputs)
        self._load(part, module)
        ranks = self._worker(module.ranks).run(
            self._programs[module.name], [arguments] * module.ranks, self._kept[part]
        )
        for rank, arrays in enumerate(ranks[1:], start=1):
            if any(mine.tobytes() != first.tobytes() for mine, first in zip(arrays, ranks[0], strict=True)):
                raise CompileError(f"part {part}: rank {rank} gives other bytes than rank 0; lower the module again")
        return {spec.name: array.astype(np.float32) for spec, array in zip(module.outputs, ranks[0], strict=True)}

    def load(self, component: str) -> None:
        for part, kind in self.kinds.items():
            if kind.component == component:
                self._load(part, self.bundle.module_of(part))

    def release(self, component: str) -> None:
        for part in [part for part in self._kept if self.kinds[part].component == component]:
            self.drop(part)

    def drop(self, part: str) -> None:
        if part in self._kept:
            self._worker(self.bundle.module_of(part).ranks).forget(self._kept.pop(part))

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        for held in (self._workers, self._programs, self._kept):
            held.clear()

    @property
    def facts(self) -> Mapping[str, str]:
        import jaxlib

        return {
            "runtime": f"XLA CPU replicas (jaxlib {jaxlib.__version__})",
            "device": f"CPU, {self.bundle.tp_degree} virtual devices; no NEFF, no Neuron core",
        }

    def _load(self, part: str, module: SplitModule) -> None:
        worker = self._worker(module.ranks)
        if module.name not in self._programs:
            self._programs[module.name] = worker.load(read_module(module))
        if part not in self._kept:
            self._kept[part] = worker.keep(self.weights(part))

    def _worker(self, ranks: int) -> Replicas:
        from fluxkiln.compile.toolchains.neuron.replicas import Replicas

        if ranks not in self._workers:
            self._workers[ranks] = Replicas(ranks)
        return self._workers[ranks]


def module_arguments(module: SplitModule, part: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The activations of a module in its order and dtypes, the same for all ranks.

    Raises:
        CompileError: one is missing, unknown or of another shape.
    """
    import ml_dtypes
    import numpy as np

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
        dtype: Any = ml_dtypes.bfloat16 if spec.dtype == "bfloat16" else spec.dtype
        arguments.append(np.ascontiguousarray(array).astype(dtype))
    return arguments
