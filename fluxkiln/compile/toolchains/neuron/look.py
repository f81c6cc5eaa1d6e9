"""A part's values on all of its ranks, against those of the rung below.

The modules are those of the ladder's rungs, their intermediate values made outputs of them.

    split     lowered in float32, weights cut from the checkpoint here, against upstream's own modules
    unsplit   in bfloat16 on one rank, against itself computed in float32: what the dtype costs
    replicas  the bundle's module and shards, against itself in float32 with the checkpoint's weights
    stored    the shards' elements against the checkpoint's, cut anew
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.compile.opener import open_bundle
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.rungs import STAGE, tell_rung
from fluxkiln.compile.templates import host_constants
from fluxkiln.compile.toolchains.neuron.modules import Module, lower_modules, module_name
from fluxkiln.compile.toolchains.neuron.replicas import Array, Replicas, Weights, dtype_of
from fluxkiln.compile.toolchains.neuron.rungs import bound_weights, shard_arrays
from fluxkiln.compile.toolchains.neuron.split import LARGEST_PART, held_elements, shard_file, shard_weights
from fluxkiln.compile.toolchains.neuron.values import list_values, recompute_values, result_values, show_values, widen
from fluxkiln.errors import UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.eager import load_whole, see_leaves
from fluxkiln.patches.cut import Cut, find_cut
from fluxkiln.patches.parts import Leaf
from fluxkiln.progress import Progress
from fluxkiln.types import Part
from fluxkiln.verify import judgement
from fluxkiln.verify.findings import (
    BUILD_AGAIN,
    Finding,
    Operation,
    PartFindings,
    Record,
    Remedy,
    RungFindings,
    Values,
    find_loss,
)
from fluxkiln.verify.judgement import BF16, REORDERED, Shares, first_missed, judge_output, match_leaves, module_output
from fluxkiln.verify.metrics import compare


@dataclass(frozen=True)
class OpenRanks:
    """A part on the ranks of one module, whose values can be looked at.

    Attributes:
        inputs: all activations of one recorded call, the host's constants included.
        workers: ranks -> as many virtual devices. proto: the module's canonical HLO; dtype: what it was lowered in.
    """

    checkpoint: Checkpoint
    part: Part
    inputs: Values
    workers: Mapping[int, Replicas]
    module: Module
    proto: bytes
    dtype: str = "bfloat16"

    @cached_property
    def weights(self) -> Weights:
        """The checkpoint's, cut for each rank, in the module's dtype."""
        return bound_weights(self.checkpoint, self.part, self.module, self.dtype)

    @cached_property
    def operations(self) -> tuple[Operation, ...]:
        names = [[spec.name for spec in specs] for specs in (self.module.inputs, self.module.slots)]
        return list_values(self.proto, *names)

    @property
    def order(self) -> list[str]:
        return [operation.output for operation in self.operations]

    @cached_property
    def given(self) -> dict[str, Array]:
        """The activations in the module's dtypes."""
        inputs = self.module.inputs
        return {spec.name: np.ascontiguousarray(self.inputs[spec.name]).astype(dtype_of(spec.dtype)) for spec in inputs}

    @cached_property
    def exact(self) -> list[Values]:
        """Of each rank its values in float32 arithmetic, with the checkpoint's weights."""
        given = [_wide(self.inputs[name]) for name in self.given]
        return self._run(show_values, widen(self.proto), [[*given, *map(_wide, rank)] for rank in self.weights])

    def seen(self, weights: Weights) -> list[Values]:
        """Of each rank its values as the module makes them of `weights`."""
        return self._run(show_values, self.proto, [[*self.given.values(), *rank] for rank in weights])

    def local(self, seen: Sequence[Values]) -> list[Values]:
        """What float32 arithmetic and the checkpoint's weights make of the operands as they were seen."""
        given = [_wide(array) for array in self.given.values()]
        arguments = [
            [*given, *map(_wide, own), *(rank[name] for name in self.order)]
            for own, rank in zip(self.weights, seen, strict=True)
        ]
        return self._run(recompute_values, widen(self.proto), arguments)

    def _run(self, show: Callable[[bytes, list[str]], bytes], proto: bytes, arguments: Weights) -> list[Values]:
        worker = self.workers[self.module.ranks]
        ranks = worker.run(worker.load(show(proto, self.order)), arguments)
        return [dict(zip(self.order, map(_wide, arrays), strict=True)) for arrays in ranks]


def look(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, record: Record, progress: Progress
) -> PartFindings:
    """See `Toolchain.look`; UsageError where the part holds several blocks, or is too large to be executed here."""
    check_size(checkpoint, part)
    call = record()
    alone = replace(plan, shapes=call.shapes, parts=(part,))
    name = module_name(part)
    module = lower_modules(checkpoint, alone, cache, progress)[name]
    exact = lower_modules(checkpoint, alone, cache, progress, "float32", stage="lower float32")[name]
    whole = lower_modules(checkpoint, alone, cache, progress, degree=1, stage="lower unsplit")[name]
    inputs = {**host_constants(checkpoint, alone), **call.inputs}
    (weights,) = bound_weights(checkpoint, part, whole, "float32")
    state = dict(zip((spec.name for spec in whole.slots), weights, strict=True))
    leaves = see_rank_leaves(part, checkpoint, inputs, state)
    progress.stage(STAGE, 4)
    rungs: list[RungFindings] = []

    def add(found: RungFindings) -> None:
        rungs.append(found)
        tell_rung(found, progress)

    with ExitStack() as stack:
        counts = sorted({module.ranks, 1})
        workers = {n: stack.enter_context(Replicas(n, plan.logs / f"debug.{n}.log")) for n in counts}

        def opened(module: Module, dtype: str = "bfloat16") -> OpenRanks:
            proto = cache.path(module.blob).read_bytes()
            return OpenRanks(checkpoint, part, inputs, workers, module, proto, dtype)

        add(check_split(opened(exact, "float32"), leaves, state, call.outputs))
        if module.ranks > 1:  # of what is not cut it would be the next rung again
            add(check_ranks(opened(whole), None, "unsplit"))
        shards = read_shards(checkpoint, alone, cache, part, call.bundle, progress)
        shipped = opened(module)
        add(check_ranks(shipped, shards, "replicas"))
        add(check_rank_shards(shipped, shards))
    return PartFindings(tuple(rungs), {"executed on": "XLA CPU replicas", "ranks": str(module.ranks)})


def check_size(checkpoint: Checkpoint, part: Part) -> None:
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


def see_rank_leaves(part: Part, checkpoint: Checkpoint, inputs: Values, state: Values) -> tuple[Leaf, ...]:
    """What upstream's own leaf modules make in the place of a split part, in call order, float32."""
    load = partial(load_whole, checkpoint=checkpoint)
    seen = checkpoint.model.see_split_leaves(part, checkpoint.configs, inputs, state, load)
    return see_leaves(part, checkpoint, inputs) if seen is None else tuple(seen)


def read_shards(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, bundle: Path, progress: Progress
) -> Weights:
    """Each rank's weights as they are shipped, those of the bundle where it is there; IntegrityError: it is damaged."""
    from fluxkiln.export.shard_files import read_shard

    files = [bundle / shard_file(part.name, rank) for rank in range(part.ranks(plan.layout.degree))]
    if all(file.is_file() for file in files):
        open_bundle(bundle)
        return [list(read_shard(file).values()) for file in files]
    return shard_arrays(cache, shard_weights(checkpoint, plan, cache, progress)[part.name])


def check_split(opened: OpenRanks, leaves: Sequence[Leaf], state: Values, outputs: Values) -> RungFindings:
    """What the ranks compute together in float32, against upstream's own modules, one by one in the order they run.

    Args:
        state: the part's weights uncut, by slot. outputs: what the reference made, by the names of the kind.
    """
    cuts = opened.checkpoint.model.cuts.get(opened.part.traits.cut, ())
    unreduced = partial(is_partial, opened.operations, cuts)
    found = match_leaves(leaves, opened.operations, opened.exact, REORDERED, unreduced)
    judged = {finding.value for finding in found}
    for value, spec in zip(result_values(opened.proto), opened.module.outputs, strict=True):
        if value in opened.order and value not in judged:
            found.append(judge_output(value, opened.exact[0][value], outputs[spec.name], REORDERED))

    def doubled(finding: Finding, operation: Operation) -> bool:
        for leaf in leaves:
            if (bias := f"{leaf.name}.bias") in operation.slots:
                together = module_output(operation, leaf, opened.exact, unreduced)
                return together is not None and adds_bias(finding, leaf, together, state[bias], len(opened.exact))
        return False

    return _with_culprit(RungFindings("split", "reference", tuple(found)), opened, opened.exact, {}, doubled)


def adds_bias(finding: Finding, leaf: Leaf, found: Array, bias: Array, ranks: int) -> bool:
    """Whether what is too much in a module's output is its bias, once for every rank but the first."""
    if finding.missed != "own" or bias.shape != leaf.output.shape[-1:] or not np.any(bias):
        return False
    surplus = np.broadcast_to((ranks - 1) * bias, leaf.output.shape)
    return compare(found.reshape(leaf.output.shape) - leaf.output, surplus).relative_l2 < 1e-2


def check_ranks(opened: OpenRanks, shards: Weights | None, rung: str) -> RungFindings:
    """The module with these weights, or the checkpoint's, against itself in float32 with the checkpoint's."""
    weights = opened.weights if shards is None else shards
    seen = opened.seen(weights)
    findings = judgement.judge_ranks(opened.order, seen, opened.exact, opened.local(seen), BF16)
    return _with_culprit(RungFindings(rung, "float32", findings), opened, seen, differing_shares(opened, weights))


def check_rank_shards(opened: OpenRanks, weights: Weights) -> RungFindings:
    """The shards' elements against those of the checkpoint, cut anew."""
    return judgement.judge_stored("checkpoint", opened.operations, differing_shares(opened, weights), _tell_wrong)


def differing_shares(opened: OpenRanks, weights: Weights) -> Shares:
    """For every slot, rank 0 and all ranks whose elements are not the checkpoint's."""
    found = {spec.name: {0: 0.0} for spec in opened.module.slots}
    for rank, (own, given) in enumerate(zip(opened.weights, weights, strict=True)):
        for ranks, expected, array in zip(found.values(), own, given, strict=True):
            same = expected.shape == array.shape
            share = float(np.mean(expected.view(np.uint16) != array.view(np.uint16))) if same else 1.0
            if share:
                ranks[rank] = share
    return found


def _with_culprit(
    made: RungFindings,
    opened: OpenRanks,
    seen: Sequence[Values],
    shares: Shares,
    doubled: Callable[[Finding, Operation], bool] = lambda *_: False,
) -> RungFindings:
    """With the values of the rank where the first one is worst; `doubled`: whether every rank adds a bias to it."""

    def remedy_of(finding: Finding, operation: Operation) -> Remedy:
        wrong = judgement.wrong_slots(operation, shares)
        if wrong:
            return Remedy(_tell_wrong(wrong), BUILD_AGAIN)
        return _remedy(opened, made.rung, finding, operation, doubled(finding, operation))

    first = first_missed(made.findings)
    values = seen[max(first.rank, 0)] if first is not None else {}
    given = {name: _wide(array) for name, array in opened.given.items()}
    return judgement.with_culprit(made, opened.operations, {**given, **values}, remedy_of, {})


def _tell_wrong(wrong: Shares) -> str:
    said = "; ".join(
        f"{slot} on rank {', '.join(map(str, ranks))}: a share of {max(ranks.values()):.2g} of the elements"
        for slot, ranks in wrong.items()
    )
    return f"{said} is not what the checkpoint cut anew has"


def _remedy(opened: OpenRanks, rung: str, finding: Finding, operation: Operation, doubled: bool) -> Remedy:
    """Where no shard is wrong."""
    place = _place(operation, opened.operations)
    home = type(opened.checkpoint.model).__module__.rpartition(".")[0].replace(".", "/")
    if doubled:
        return Remedy(
            f"every rank adds the bias, so the sum has it once for each of them{place}",
            f"add it after the reduction, in the part's module for ranks: {home}",
        )
    if rung == "split":
        return Remedy(
            f"in float32 the ranks together make something else than diffusers' module{place}: it is cut, put "
            "together or lowered wrongly",
            f"compare the model's table of cuts and the module ({home}) with upstream: `fluxkiln patches`; lower it "
            "again with the pinned jax (`fluxkiln doctor`)",
        )
    widen = f"compute it in float32, or add to its `float32_inputs`: {home}"
    found = find_loss(finding, place, "bfloat16", widen, f"compute what feeds it in float32, as norms are: {home}")
    if found is not None or rung == "unsplit":
        return found or Remedy(f"bfloat16 is too coarse for it{place}", widen)
    return Remedy(
        f"with the checkpoint's weights the ranks make something else of these operands than float32 does{place}",
        f"compare the collectives of the module with the part's ({home}), and the rung unsplit",
    )


def _place(operation: Operation, operations: Sequence[Operation]) -> str:
    """Behind which weights an operation without any of its own is."""
    weighted = {one.output: one.slots for one in operations if one.slots}
    sources, _ = judgement.find_sources(operation, operations, weighted)
    slots = dict.fromkeys(slot for source in sources for slot in weighted[source])
    return f" (behind {', '.join(slots)})" if slots and not operation.slots else ""


def is_partial(operations: Sequence[Operation], cuts: tuple[Cut, ...], operation: Operation) -> bool:
    """Whether the value is one of partial sums: made of a product with rows of a weight, and not reduced yet."""
    makers = {one.output: one for one in operations}
    pending, reached = [operation], set()
    while pending:
        one = pending.pop()
        if one.op_type == "all-reduce" or one.output in reached:
            continue
        reached.add(one.output)
        if one.op_type != "dot":
            pending += [makers[name] for name in one.inputs if name in makers]
        elif cuts and any(find_cut(cuts, slot).way == "row" for slot in one.slots):
            return True
    return False


def _wide(array: Array) -> Array:
    """float32 for any float; ids stay integers of 32 bits."""
    whole = np.issubdtype(array.dtype, np.integer)
    return np.ascontiguousarray(array, np.int32 if whole else np.float32)
