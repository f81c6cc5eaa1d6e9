"""The rungs of a split model: the modules of all ranks executed on the CPU, in both dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.plan import Made, Plan
from fluxkiln.compile.templates import host_constants
from fluxkiln.compile.toolchain import OpenRungs
from fluxkiln.compile.toolchains.neuron.make import SplitModel
from fluxkiln.compile.toolchains.neuron.modules import Module, lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.replicas import Array, ReplicaExecutor, Replicas, Weights, dtype_of
from fluxkiln.compile.toolchains.neuron.split import LARGEST_PART, held_elements
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.types import Part, find_part

if TYPE_CHECKING:
    from fluxkiln.verify.ladder import Ladder

# of all ranks together: how many bytes of weights a process keeps for later runs of a rung
KEPT_BYTES = 2 << 30
_ReadWeights = Callable[[Part, Module], Weights]


@contextmanager
def open_rungs(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, made: Made, progress: Progress
) -> Iterator[OpenRungs]:
    """The rungs of a split model, of the parts that fit the memory: one process has all ranks of a part, twice while
    they are moved.

    `split`: modules lowered in float32, weights cut from the checkpoint here. `unsplit`: in bfloat16 on one rank.
    `replicas`: the modules and the shards of the bundle; modules lowered for the shapes of the plan where these are
    others. Every rank must give the same: how many elements did is a row of the first and the last, `ranks`.
    """
    own: SplitModel = made.own
    fitting = tuple(part for part in plan.parts if 4 * held_elements(checkpoint, part) <= LARGEST_PART)
    facts = {"executed on": "XLA CPU replicas", "NEFF": "not executed: that takes a device"}
    if fitting != plan.parts:
        facts["too large to be executed whole"] = ", ".join(p.name for p in plan.parts if p not in fitting)
    plan = replace(plan, parts=fitting)
    if plan.shapes == (made.shapes or own.shapes):
        here = {module_name(binary.part): own.modules[binary.facts["module"]] for binary in made.binaries}
        modules = {**own.modules, **here}  # of a further size by the names that parts have there
    else:
        modules = lower_modules(checkpoint, plan, cache, progress, stage="lower small")
    exact = lower_modules(checkpoint, plan, cache, progress, "float32", stage="lower float32")
    whole = lower_modules(checkpoint, plan, cache, progress, "bfloat16", 1, stage="lower unsplit")
    counts = {module.ranks for one in (modules, exact, whole) for module in one.values()}
    constants = host_constants(checkpoint, plan)
    with ExitStack() as stack:
        workers = {n: stack.enter_context(Replicas(n, plan.logs / f"replicas.{n}.log")) for n in sorted(counts)}

        def rung(modules: Mapping[str, Module], weights: _ReadWeights) -> _Rung:
            return _Rung(fitting, modules, constants, workers, weights)

        rungs = {
            "split": rung(exact, partial(bound_weights, checkpoint, dtype="float32")),
            "unsplit": rung(whole, partial(bound_weights, checkpoint)),
            "replicas": rung(modules, lambda part, _: shard_arrays(cache, own.shards[part.base])),
        }

        def finish(ladder: Ladder) -> None:
            for part in fitting:
                shares = {name: 1.0 - rungs[name].spread[part.name] for name in ("split", "replicas")}
                equal = [(name, np.array([share], np.float32)) for name, share in shares.items()]
                ladder.compare(part.name, part.traits, "ranks", -1, np.ones(1, np.float32), None, equal, "BF16")

        yield OpenRungs({**rungs}, fitting, finish, facts)


class _Rung:
    """Runs parts of a plan on these modules; the host's constants are added to what a part is given.

    Attributes:
        spread: part -> the largest share of bytes in which any rank's outputs differ from rank 0's, of all its runs;
            they are the same on all ranks, so it is 0.
    """

    def __init__(
        self,
        parts: tuple[Part, ...],
        modules: Mapping[str, Module],
        constants: Mapping[str, Array],
        workers: dict[int, Replicas],
        weights: _ReadWeights,
    ) -> None:
        self.modules = {part.name: modules[module_name(part)] for part in parts}
        self.constants = constants
        self.spread: dict[str, float] = {}
        self._run = ReplicaExecutor(
            {part.name: part.component for part in parts}, self.modules.__getitem__,
            lambda name: weights(find_part(parts, name), self.modules[name]),
            workers=workers, most_kept=KEPT_BYTES, spread=self._spread,
        )  # fmt: skip

    def __call__(self, part: str, inputs: Mapping[str, Array]) -> dict[str, Array]:
        known = {**self.constants, **inputs}
        return self._run(part, {spec.name: known[spec.name] for spec in self.modules[part].inputs})

    def _spread(self, part: str, share: float) -> None:
        self.spread[part] = max(self.spread.get(part, 0.0), share)


def bound_weights(checkpoint: Checkpoint, part: Part, module: Module, dtype: str = "bfloat16") -> Weights:
    """Each rank's weights, cut from the checkpoint's tensors, in `dtype`."""
    from fluxkiln.export.bindings import apply_transforms, bind_shard
    from fluxkiln.export.checkpoint import read_tensor

    tensors = checkpoint.tensors[part.folder]
    bindings = [bind_shard(part, module.slots, checkpoint, module.ranks, rank) for rank in range(module.ranks)]
    return [
        [
            apply_transforms(read_tensor(tensors[slot.sources[0]]), slot.transforms).astype(dtype_of(dtype))
            for slot in binding.slots
        ]
        for binding in bindings
    ]


def shard_arrays(cache: ActionCache, shards: Sequence[Blob]) -> Weights:
    """Each rank's weights as its shard has them, the digest checked."""
    from fluxkiln.export.shard_files import read_shard

    return [list(read_shard(cache.path(blob), blob.digest.removeprefix("sha256:")).values()) for blob in shards]
