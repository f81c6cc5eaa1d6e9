"""The rungs of a split model: the modules of all ranks executed on the CPU, in both dtypes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Blob
from fluxkiln.build.budget import name_shapes
from fluxkiln.build.parity import Parity, replay
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.rungs import Rungs
from fluxkiln.compile.templates import host_constants
from fluxkiln.compile.toolchains.neuron.modules import Module, lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.split import held_elements
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part, find_part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.toolchains.neuron.replicas import Kept, Program, Replicas
    from fluxkiln.verify.reference import Recording

# of all ranks together: how many bytes of weights a process keeps for later runs
KEPT_BYTES = 2 << 30
# of one part in float32; T5-XXL in one part has 19 GB
LARGEST_PART = 3 << 30
# part -> rank -> its weights in the order of the slots
ReadWeights = Callable[[Part], "Sequence[Sequence[NDArray[Any]]]"]


class ReplicaRunner:
    """Runs parts as all their ranks at once; a part's outputs are those of rank 0.

    Attributes:
        spread: part -> the largest share of elements in which any rank's outputs differ from rank 0's, of all its
            runs; they are the same on all ranks, so it is 0.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        cache: ActionCache,
        modules: Mapping[str, Module],
        workers: Mapping[int, Replicas],
        constants: Mapping[str, NDArray[Any]],
        weights: ReadWeights,
    ) -> None:
        self.parts, self.modules, self.workers = plan.parts, modules, workers
        self.cache = cache
        self.constants, self.weights = constants, weights
        self.spread: dict[str, float] = {}
        self._programs: dict[str, Program] = {}
        self._kept: OrderedDict[str, tuple[Kept, int]] = OrderedDict()

    def __call__(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The part's outputs by name, float32.

        Raises:
            CompileError: XLA does not take the module or its arguments. IntegrityError: a shard is damaged.
        """
        import numpy as np

        part = find_part(self.parts, name)
        module = self.modules[module_name(part)]
        worker = self.workers[module.ranks]
        if module.name not in self._programs:
            self._programs[module.name] = worker.load(self.cache.path(module.blob).read_bytes())
        kept = self._weights(part, worker)
        known = {**self.constants, **inputs}
        arguments = [np.ascontiguousarray(known[spec.name]).astype(dtype_of(spec.dtype)) for spec in module.inputs]
        ranks = worker.run(self._programs[module.name], [arguments] * module.ranks, kept)
        self._compare(name, ranks)
        return {spec.name: array.astype(np.float32) for spec, array in zip(module.outputs, ranks[0], strict=True)}

    def _weights(self, part: Part, worker: Replicas) -> Kept:
        if part.name in self._kept:
            self._kept.move_to_end(part.name)
            return self._kept[part.name][0]
        arrays = self.weights(part)
        size = sum(array.nbytes for rank in arrays for array in rank)
        while self._kept and size + sum(known for _, known in self._kept.values()) > KEPT_BYTES:
            oldest, (kept, _) = self._kept.popitem(last=False)
            self._worker_of(oldest).forget(kept)
        self._kept[part.name] = (worker.keep(arrays), size)
        return self._kept[part.name][0]

    def _worker_of(self, name: str) -> Replicas:
        return self.workers[self.modules[module_name(find_part(self.parts, name))].ranks]

    def _compare(self, name: str, ranks: Sequence[Sequence[NDArray[Any]]]) -> None:
        import numpy as np

        shares = [
            float(np.mean(own.view(np.uint8) != first.view(np.uint8)))
            for other in ranks[1:]
            for own, first in zip(other, ranks[0], strict=True)
        ]
        self.spread[name] = max([self.spread.get(name, 0.0), *shares])


@contextmanager
def split_rungs(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    modules: Mapping[str, Module],
    shards: Mapping[str, Sequence[Blob]],
    progress: Progress,
) -> Iterator[Rungs]:
    """The rungs of a split model, bottom to top.

    `split`: modules lowered in float32, weights cut from the checkpoint here. `unsplit`: in bfloat16 on one rank.
    `replicas`: the modules and the shards of the bundle.

    Args:
        modules: those of the bundle. shards: part -> the files of its ranks.
    """
    from fluxkiln.compile.toolchains.neuron.replicas import Replicas

    assert plan.layout is not None
    exact = lower_modules(checkpoint, plan, cache, progress, "float32", stage="lower float32")
    whole = lower_modules(checkpoint, plan, cache, progress, "bfloat16", 1, stage="lower unsplit")
    counts = {module.ranks for one in (modules, exact, whole) for module in one.values()}
    constants = host_constants(checkpoint, plan)
    with ExitStack() as stack:
        workers = {
            ranks: stack.enter_context(Replicas(ranks, plan.logs / f"replicas.{ranks}.log")) for ranks in sorted(counts)
        }

        def runner(modules: Mapping[str, Module], weights: ReadWeights) -> ReplicaRunner:
            return ReplicaRunner(checkpoint, plan, cache, modules, workers, constants, weights)

        yield {
            "split": runner(exact, lambda part: bound_weights(checkpoint, part, exact[module_name(part)], "float32")),
            "unsplit": runner(
                whole, lambda part: bound_weights(checkpoint, part, whole[module_name(part)], "bfloat16")
            ),
            "replicas": runner(modules, lambda part: shard_arrays(cache, shards[part.name])),
        }


def bound_weights(checkpoint: Checkpoint, part: Part, module: Module, dtype: str) -> list[list[NDArray[Any]]]:
    """Each rank's weights, cut from the checkpoint's tensors, in `dtype`."""
    from fluxkiln.export.bindings import apply_transforms
    from fluxkiln.export.checkpoint import read_tensor
    from fluxkiln.export.split import bind_shard

    tensors = checkpoint.tensors[part.folder]
    ranks = []
    for rank in range(module.ranks):
        binding = bind_shard(part, module.slots, checkpoint, module.ranks, rank)
        ranks.append(
            [
                apply_transforms(read_tensor(tensors[slot.sources[0]]), slot.transforms).astype(dtype_of(dtype))
                for slot in binding.slots
            ]
        )
    return ranks


def shard_arrays(cache: ActionCache, shards: Sequence[Blob]) -> list[list[NDArray[Any]]]:
    """Each rank's weights as its shard has them, the digest checked."""
    from fluxkiln.export.shard_files import read_shard

    return [list(read_shard(cache.path(blob), blob.digest.removeprefix("sha256:")).values()) for blob in shards]


def dtype_of(name: str) -> Any:
    """A numpy dtype, bfloat16 included."""
    import ml_dtypes
    import numpy as np

    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def verify_split(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    settings: Settings,
    modules: Mapping[str, Module],
    shards: Mapping[str, Sequence[Blob]],
    recording: Recording,
    progress: Progress,
) -> Parity:
    """Replay the recording at every rung of every part, and run the whole pipeline on the ranks of the bundle.

    A model too large for its own shapes is replayed at the recording's, through modules lowered for these.
    """
    import numpy as np

    small = _executed(checkpoint, replace(plan, shapes=recording.shapes))
    if recording.shapes != plan.shapes:
        modules = lower_modules(checkpoint, small, cache, progress, stage="lower small")
    with split_rungs(checkpoint, small, cache, modules, shards, progress) as rungs:
        parity = replay(checkpoint, small, cache, settings, recording, rungs, progress)
        spreads = {rung: runner.spread for rung, runner in rungs.items() if isinstance(runner, ReplicaRunner)}
    for part in small.parts:
        equal = [
            (rung, np.array([1.0 - spread[part.name]], np.float32))
            for rung, spread in spreads.items()
            if rung != "unsplit"
        ]
        parity.ladder.climb(part.name, part.kind, "ranks", -1, np.ones(1, np.float32), None, equal, "BF16")
    facts = {"executed on": "XLA CPU replicas", "NEFF": "not executed: that takes a device"}
    if small.shapes != plan.shapes:
        facts["every part replayed at"] = name_shapes(small.shapes)
    if small.parts != plan.parts:
        facts["too large to be executed whole"] = ", ".join(part.name for part in plan.parts if part not in small.parts)
    return replace(parity, facts=facts)


def _executed(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The build with the parts that fit the memory: one process has all ranks of a part, twice while they are moved."""
    fitting = tuple(part for part in plan.parts if 4 * held_elements(checkpoint, part) <= LARGEST_PART)
    return replace(plan, parts=fitting)
