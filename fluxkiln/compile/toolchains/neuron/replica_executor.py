"""Executor `replicas`: the modules of a split model on XLA's CPU, each rank a virtual device. No NEFF, no device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fluxkiln.compile.toolchains.neuron.modules import Module
from fluxkiln.compile.toolchains.neuron.split_bundle import read_module
from fluxkiln.errors import CompileError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.toolchains.neuron.replicas import Kept, Program, Replicas

# part -> rank -> its weights in the order of its module's slots
ReadWeights = Callable[[str], "Sequence[Sequence[NDArray[Any]]]"]


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
        self._programs: dict[str, Program] = {}
        # the longest unused first
        self._kept: dict[str, tuple[Kept, int]] = {}

    def __call__(self, part: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        import numpy as np

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
        from fluxkiln.compile.toolchains.neuron.replicas import Replicas

        ranks = self.module_of(part).ranks
        if ranks not in self._workers:
            self._workers[ranks] = Replicas(ranks)
        return self._workers[ranks]


def module_arguments(module: Module, part: str, inputs: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The activations of a module in its order and dtypes, the same for all ranks.

    Raises:
        CompileError: one is missing, unknown or of another shape.
    """
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
        arguments.append(np.ascontiguousarray(array).astype(dtype_of(spec.dtype)))
    return arguments


def dtype_of(name: str) -> Any:
    """A numpy dtype, bfloat16 included."""
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)
