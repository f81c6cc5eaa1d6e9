"""A part of a split model, looked into on all of its ranks: its values against those of the rung below.

The modules are those of the ladder's rungs, their intermediate values made outputs of them.

    split     lowered in float32, weights cut from the checkpoint here, against diffusers' own modules
    unsplit   in bfloat16 on one rank, against itself computed in float32: what the dtype costs
    replicas  the bundle's module and shards, against itself in float32 with the checkpoint's weights
    stored    the shards' elements against the checkpoint's, cut anew
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.templates import host_constants
from fluxkiln.compile.toolchains.neuron.modules import Module, lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.rungs import LARGEST_PART, bound_weights, dtype_of, shard_arrays
from fluxkiln.compile.toolchains.neuron.split import held_elements, shard_file, shard_weights
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.patches.cut import Cut
from fluxkiln.progress import Progress
from fluxkiln.types import Part
from fluxkiln.verify.debug.bisect import Finding, Range, first_missed, judge_ranks, tolerance_of, value_range
from fluxkiln.verify.debug.probe import Culprit, RungFindings
from fluxkiln.verify.debug.remedies import Remedy, find_split_remedy
from fluxkiln.verify.debug.split_match import added_on_every_rank, assembled, match_split, see_split_leaves

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.values import Operation
    from fluxkiln.compile.toolchains.neuron.replicas import Program, Replicas
    from fluxkiln.patches.leaves import Leaf

Values = Mapping[str, "NDArray[Any]"]
# of each rank its weights in the order of the module's slots
Weights = Sequence[Sequence["NDArray[Any]"]]


@dataclass(frozen=True)
class SplitInside:
    """A part on the ranks of one module, which can be looked into.

    Attributes:
        cuts: how its weights are cut; none where it is whole.
        proto: its canonical HLO. inputs: all activations of one recorded call, the host's constants included.
        weights: the checkpoint's, cut for each rank, in the module's dtype.
        worker: as many virtual devices as the module has ranks; programs: what it has compiled.
    """

    part: Part
    cuts: tuple[Cut, ...]
    module: Module
    proto: bytes
    inputs: Values
    weights: Weights
    worker: Replicas
    programs: dict[bytes, Program] = field(default_factory=dict)

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        from fluxkiln.compile.toolchains.neuron.values import list_values

        names = [[spec.name for spec in specs] for specs in (self.module.inputs, self.module.slots)]
        return list_values(self.proto, *names)

    @property
    def order(self) -> list[str]:
        return [operation.output for operation in self.operations]

    @cached_property
    def exact(self) -> tuple[Values, ...]:
        """Of each rank its values in float32 arithmetic, with the checkpoint's weights."""
        from fluxkiln.compile.toolchains.neuron.values import show_values, widen

        given = [_wide(self.inputs[spec.name]) for spec in self.module.inputs]
        arguments = [[*given, *map(_wide, rank)] for rank in self.weights]
        return self._run(show_values(widen(self.proto), self.order), arguments)

    def seen(self, weights: Weights) -> tuple[Values, ...]:
        """Of each rank its values as the module makes them of `weights`."""
        from fluxkiln.compile.toolchains.neuron.values import show_values

        arguments = [[*self.given, *rank] for rank in weights]
        return self._run(show_values(self.proto, self.order), arguments)

    def local(self, seen: Sequence[Values]) -> tuple[Values, ...]:
        """What float32 arithmetic and the checkpoint's weights make of the operands as they were seen."""
        from fluxkiln.compile.toolchains.neuron.values import recompute_values, widen

        given = [_wide(array) for array in self.given]
        arguments = [
            [*given, *map(_wide, own), *(rank[name] for name in self.order)]
            for own, rank in zip(self.weights, seen, strict=True)
        ]
        return self._run(recompute_values(widen(self.proto), self.order), arguments)

    @cached_property
    def given(self) -> list[NDArray[Any]]:
        """The activations in the module's dtypes."""
        return [
            np.ascontiguousarray(self.inputs[spec.name]).astype(dtype_of(spec.dtype)) for spec in self.module.inputs
        ]

    def _run(self, proto: bytes, arguments: Sequence[Sequence[NDArray[Any]]]) -> tuple[Values, ...]:
        if proto not in self.programs:
            self.programs[proto] = self.worker.load(proto)
        ranks = self.worker.run(self.programs[proto], arguments)
        return tuple({name: _wide(array) for name, array in zip(self.order, arrays, strict=True)} for arrays in ranks)


def look_on_ranks(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    part: Part,
    inputs: Values,
    outputs: Values,
    bundle: Path,
    progress: Progress,
) -> tuple[RungFindings, ...]:
    """Every rung of a part of a split model.

    Args:
        inputs, outputs: of one recorded call.
        kiln: at the shapes of the recording. bundle: its shards are looked into where they are there, else the store's.

    Raises:
        UsageError: the part holds several blocks, or is too large to be executed here.
    """
    from fluxkiln.compile.toolchains.neuron.replicas import Replicas

    check_can_be_debugged(checkpoint, part)
    plan = replace(plan, parts=(part,))
    name = module_name(part)
    module = lower_modules(checkpoint, plan, cache, progress)[name]
    exact = lower_modules(checkpoint, plan, cache, progress, "float32", stage="lower float32")[name]
    whole = lower_modules(checkpoint, plan, cache, progress, degree=1, stage="lower unsplit")[name]
    inputs = {**host_constants(checkpoint, plan), **inputs}
    state = whole_state(checkpoint, part, whole)
    leaves = see_split_leaves(part, checkpoint, inputs, state)
    progress.stage("look inside", 4)
    rungs: list[RungFindings] = []

    def look(found: RungFindings) -> None:
        rungs.append(found)
        progress.done("look inside", found.rung, f"{len(found.findings)} values")

    with ExitStack() as stack:
        workers = {
            ranks: stack.enter_context(Replicas(ranks, plan.logs / f"debug.{ranks}.log"))
            for ranks in sorted({module.ranks, 1})
        }
        look(
            check_split(open_inside(checkpoint, cache, part, exact, inputs, workers, "float32"), leaves, state, outputs)
        )
        if module.ranks > 1:  # CLIP and VAE are not cut: it would be the next rung again
            look(check_ranks(open_inside(checkpoint, cache, part, whole, inputs, workers), None, "unsplit"))
        shards = read_shards(checkpoint, plan, cache, part, bundle, progress)
        inside = open_inside(checkpoint, cache, part, module, inputs, workers)
        look(check_ranks(inside, shards, "replicas"))
        look(check_shards(inside, shards))
    return tuple(rungs)


def whole_state(checkpoint: Checkpoint, part: Part, whole: Module) -> Values:
    """The weights of a part uncut, float32, by the slots of its module for one rank."""
    (weights,) = bound_weights(checkpoint, part, whole, "float32")
    return {spec.name: weight for spec, weight in zip(whole.slots, weights, strict=True)}


def open_inside(
    checkpoint: Checkpoint,
    cache: ActionCache,
    part: Part,
    module: Module,
    inputs: Values,
    workers: Mapping[int, Replicas],
    dtype: str = "bfloat16",
) -> SplitInside:
    """The part on the ranks of `module`, which was lowered in `dtype`, with the checkpoint's weights."""
    weights = bound_weights(checkpoint, part, module, dtype)
    cuts = checkpoint.model.cuts[part.traits.cut] if part.traits.cut else ()
    return SplitInside(part, cuts, module, cache.path(module.blob).read_bytes(), inputs, weights, workers[module.ranks])


def check_can_be_debugged(checkpoint: Checkpoint, part: Part) -> None:
    """Raise UsageError for a part of several blocks, or of more weights than one process is given."""
    if len(part.members) > 1:
        raise UsageError(
            f"{part.name} has {len(part.members)} blocks, and one is looked into at a time; debug it with "
            "--granularity block, whose blocks compute the same"
        )
    held = 4 * held_elements(checkpoint, part)
    if held > LARGEST_PART:
        raise UsageError(
            f"{part.name} has {held / 1e9:.1f} GB of weights in float32, at most {LARGEST_PART / 1e9:.1f} are executed "
            "here; debug a model with fewer layers, whose blocks are of the same kind"
        )


def read_shards(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, bundle: Path, progress: Progress
) -> Weights:
    """Each rank's weights as they are shipped; the bundle's may be damaged, that is for the rungs to say."""
    from fluxkiln.export.shard_files import read_shard

    assert plan.layout is not None
    files = [bundle / shard_file(part.name, rank) for rank in range(plan.layout.ranks(part))]
    if all(file.is_file() for file in files):
        return [list(read_shard(file).values()) for file in files]
    return shard_arrays(cache, shard_weights(checkpoint, plan, cache, progress)[part.name])


def check_split(inside: SplitInside, leaves: Sequence[Leaf], state: Values, outputs: Values) -> RungFindings:
    """What the ranks compute together in float32, against diffusers' own modules, one by one in the order they run.

    Args:
        state: the part's weights uncut, by slot. outputs: what the reference made, by the names of the kind.
    """
    from fluxkiln.compile.toolchains.neuron.values import result_values

    returned = zip(result_values(inside.proto), inside.module.outputs, strict=True)
    results = {value: outputs[spec.name] for value, spec in returned if value in inside.order}
    tolerance = tolerance_of("split", "*")
    matched = match_split(leaves, inside.operations, inside.exact, inside.cuts, tolerance, results)
    made = RungFindings("split", "reference", tuple(matched))
    first = first_missed(matched)
    if first is None:
        return made
    operation = _operation(inside, first.value)
    bias = next((slot for slot in operation.slots if slot.endswith(".bias")), None)
    doubled = False
    if bias is not None:
        leaf = next(one for one in leaves if one.name == bias.removesuffix(".bias"))
        found = assembled(first.value, leaf, inside.operations, inside.exact, inside.cuts)
        doubled = found is not None and added_on_every_rank(first, leaf.output, found, state[bias], len(inside.exact))
    return _with_culprit(made, inside, first, inside.exact, {}, doubled)


def check_ranks(inside: SplitInside, shards: Weights | None, rung: str) -> RungFindings:
    """The module with these weights, or the checkpoint's, against itself in float32 with the checkpoint's."""
    weights = inside.weights if shards is None else shards
    seen = inside.seen(weights)
    findings = judge_ranks(inside.order, seen, inside.exact, inside.local(seen), tolerance_of(rung, "BF16"))
    made = RungFindings(rung, "float32", findings)
    first = first_missed(findings)
    return made if first is None else _with_culprit(made, inside, first, seen, differing_slots(inside, weights))


def check_shards(inside: SplitInside, weights: Weights) -> RungFindings:
    """The shards' elements against those of the checkpoint, cut anew."""
    differing = differing_slots(inside, weights)
    findings = []
    for operation in inside.operations:
        shares = [(share, rank) for slot in operation.slots for rank, share in differing.get(slot, {}).items()]
        share, rank = max(shares, default=(0.0, 0))
        if operation.slots:
            findings.append(Finding(operation.output, share, share, share, "own" if share else "", rank=rank))
    made = RungFindings("stored", "checkpoint", tuple(findings))
    first = first_missed(findings)
    if first is None:
        return made
    operation = _operation(inside, first.value)
    remedy = find_split_remedy("stored", first, operation, inside.operations, _wrong(operation, differing))
    slots = tuple(slot for slot in operation.slots if slot in differing)
    nothing = Range(0.0, 0.0, 0.0, 0.0, ())
    return replace(made, culprit=Culprit("stored", first, operation.op_type, "", slots, {}, nothing, remedy))


def differing_slots(inside: SplitInside, weights: Weights) -> dict[str, dict[int, float]]:
    """Slot -> rank -> the share of its elements that are not the checkpoint's, where there are any."""
    found: dict[str, dict[int, float]] = {}
    for rank, (own, given) in enumerate(zip(inside.weights, weights, strict=True)):
        for spec, expected, array in zip(inside.module.slots, own, given, strict=True):
            same = expected.shape == array.shape
            share = float(np.mean(expected.view(np.uint16) != array.view(np.uint16))) if same else 1.0
            if share:
                found.setdefault(spec.name, {})[rank] = share
    return found


def _with_culprit(
    made: RungFindings,
    inside: SplitInside,
    first: Finding,
    seen: Sequence[Values],
    differing: Mapping[str, Mapping[int, float]],
    on_every_rank: bool = False,
) -> RungFindings:
    operation = _operation(inside, first.value)
    rank = max(first.rank, 0)
    values = {spec.name: array for spec, array in zip(inside.module.inputs, map(_wide, inside.given), strict=True)}
    values |= seen[rank]
    remedy: Remedy = find_split_remedy(
        made.rung, first, operation, inside.operations, _wrong(operation, differing), on_every_rank
    )
    culprit = Culprit(
        made.rung, first, operation.op_type, "", operation.slots,
        {name: value_range(values[name]) for name in operation.inputs}, value_range(values[first.value]), remedy,
    )  # fmt: skip
    return replace(made, culprit=culprit)


def _wrong(operation: Operation, differing: Mapping[str, Mapping[int, float]]) -> dict[str, Mapping[int, float]]:
    return {slot: differing[slot] for slot in operation.slots if slot in differing}


def _operation(inside: SplitInside, value: str) -> Operation:
    return next(one for one in inside.operations if one.output == value)


def _wide(array: NDArray[Any]) -> NDArray[Any]:
    """float32 for any float; ids stay integers of 32 bits."""
    whole = np.issubdtype(array.dtype, np.integer)
    return np.ascontiguousarray(array, np.int32 if whole else np.float32)
