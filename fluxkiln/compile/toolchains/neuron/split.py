"""A model cut over the cores of an instance: what an instance can take, which is checked before a weight is read, and
every core's weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.plan import Job, Plan
from fluxkiln.compile.targets import Instance, Target, find_target, target_names
from fluxkiln.compile.toolchains.neuron.neuronx_cc import NeuronxCc, find_neuronx_cc
from fluxkiln.errors import ResourceError, ToolchainError, UsageError
from fluxkiln.export.bindings import bind_shard, holds_tensor, split_slots
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.export.fingerprint import check_states
from fluxkiln.export.shard_files import WORKERS, write_part
from fluxkiln.patches.cut import WHOLE, columns_of, share_of
from fluxkiln.progress import FROM_STORE, Progress
from fluxkiln.settings import Settings
from fluxkiln.types import Part

_SHARD_MEMORY = 256 << 20  # of one thread
# bytes of one part in float32 that are executed here; T5-XXL in one part has 19 GB
LARGEST_PART = 3 << 30
_BF16 = 2
_DEFAULT_DEGREE = 8
# Of each core: 96 MB are the runtime's micro-code (AWS Neuron documentation, "Neuron device memory"). Programs,
# DMA rings, scratchpads and buffers of collectives have no published size; the rest is for them, by our judgement.
RUNTIME_BYTES = 1 << 30
# Of all heads that are computed: 24 heads on 16 or 32 ranks are 32 with the padding.
_MOST_PADDING = 1 / 4


@dataclass(frozen=True, slots=True)
class Split:
    """How a model is cut; `compiler` is None where there is none, and `missing` says why."""

    instance: Instance
    degree: int
    granularity: str
    compiler: NeuronxCc | None = None
    missing: str = ""


@dataclass(frozen=True, slots=True)
class CoreMemory:
    """What one core of an instance has to hold, in bytes. `weights`: part or component -> its share on one core."""

    instance: Instance
    degree: int
    weights: Mapping[str, int]
    activations: int

    @property
    def weight_bytes(self) -> int:
        """All weights on one core."""
        return sum(self.weights.values())

    @property
    def needed(self) -> int:
        """Weights, activations and what the runtime takes."""
        return self.weight_bytes + self.activations + RUNTIME_BYTES

    @property
    def fits(self) -> bool:
        """Whether a core holds it."""
        return self.needed <= self.instance.core_bytes

    def to_json(self) -> dict[str, Any]:
        """See `compile.toolchain.Toolchain.devices`; what activations and the runtime take are estimates."""
        sizes = [(name, held, 0) for name, held in self.weights.items()]
        sizes += [("activations", 0, self.activations), ("runtime, programs, DMA rings", 0, RUNTIME_BYTES)]
        files = [
            {"file": name, "device": 0, "phase": "each core", "weights": weights, "instructions": 0,
             "runtime": runtime, "total": weights + runtime}
            for name, weights, runtime in sizes
        ]  # fmt: skip
        way = "everything resident"
        return {
            "files": files,
            "budget": self.instance.core_bytes,
            "devices": self.degree,
            "peaks": {way: [self.needed]},
            "load": way if self.fits else None,
            "closest": way,
            "origin": "shapes",
        }

    def table(self) -> str:
        """The arithmetic, line by line, in GB."""
        has = self.instance.core_bytes
        rows = [
            *self.weights.items(),
            ("weights", self.weight_bytes),
            ("activations", self.activations),
            ("runtime, programs, DMA rings", RUNTIME_BYTES),
            ("needed on each core", self.needed),
            (f"a core has ({has / (1 << 30):.0f} GiB)", has),
            ("free", has - self.needed) if self.fits else ("too much", self.needed - has),
        ]
        title = f"{self.instance.name}, tp {self.degree}"
        return "\n".join([f"{title:32}{'GB':>9}", *(f"{name:32}{size / 1e9:>9.3f}" for name, size in rows)])


def plan_split(settings: Settings, target: Target, checkpoint: Checkpoint) -> Split:
    """How the model is cut for the instance that the settings name; no weight is read.

    Raises:
        UsageError: no such instance or granularity, a degree that its topology or the model's heads do not allow.
    """
    if settings.modulation != "hoisted":
        raise UsageError(
            f"modulation {settings.modulation!r}: for {target.name} all modulation is computed by the head, in one "
            "gather; leave --modulation out"
        )
    instance = find_instance(target, settings.instance)
    heads, widths = checkpoint.model.split_axes(checkpoint.configs)
    degree = settings.tp_degree or default_degree(instance, heads, widths)
    check_degree(instance, degree, heads, widths)
    try:
        return Split(instance, degree, settings.granularity, find_neuronx_cc())
    except ToolchainError as error:
        return Split(instance, degree, settings.granularity, missing=str(error))


def label(settings: Settings) -> str:
    """What tells builds of one scheme and size apart, in the name of their folder."""
    cut = f"-{settings.instance}" * bool(settings.instance) + f"-tp{settings.tp_degree}" * bool(settings.tp_degree)
    blocks = "" if settings.granularity == "block" else "-" + settings.granularity.replace(":", "")
    return cut + blocks + "-published" * (settings.flags == "published")


def facts(settings: Settings, plan: Plan) -> dict[str, Any]:
    """How the model is cut and compiled."""
    return {
        "instance": plan.layout.instance.name,
        "tp_degree": plan.layout.degree,
        "granularity": plan.layout.granularity,
        "flags": settings.flags,
    }


def plan_memory(checkpoint: Checkpoint, plan: Plan) -> CoreMemory:
    """What the fullest core holds when everything stays loaded; by the checkpoint's shapes, no weight is read.

    Raises:
        ResourceError: too much, with the arithmetic and what would fit.
    """
    split, model, configs = plan.layout, checkpoint.model, checkpoint.configs
    activations = max(model.activation_bytes(configs, shapes, split.degree) for shapes in plan.sizes)
    heads, widths = model.split_axes(configs)
    legal = {degree for one in all_instances() for degree in legal_degrees(one, heads, widths)}
    parts = plan.at(plan.shapes).parts
    weights = {degree: weights_per_core(parts, checkpoint, degree) for degree in {split.degree, *legal}}
    return check_memory(split.instance, split.degree, weights, activations)


def core_memory(checkpoint: Checkpoint, plan: Plan) -> CoreMemory:
    """The same without a refusal."""
    split, model = plan.layout, checkpoint.model
    activations = max(model.activation_bytes(checkpoint.configs, shapes, split.degree) for shapes in plan.sizes)
    weights = weights_per_core(plan.at(plan.shapes).parts, checkpoint, split.degree)
    return CoreMemory(split.instance, split.degree, weights, activations)


def weights_per_core(parts: tuple[Part, ...], checkpoint: Checkpoint, degree: int) -> dict[str, int]:
    """Component -> bytes of its weights on the first core, which has the parts that are not cut."""
    found: dict[str, int] = {}
    for component in dict.fromkeys(part.folder for part in parts):
        owners: dict[str, list[tuple[str, int]]] = {}
        for part in parts:
            for kind, prefix in part.members if part.folder == component else ():
                owners.setdefault(prefix, []).append((kind, part.ranks(degree)))
        size = 0
        for name, ref in checkpoint.tensors[component].items():
            pieces = name.split(".")
            for prefix in ("", *(".".join(pieces[: i + 1]) + "." for i in range(len(pieces) - 1))):
                for kind, ranks in owners.get(prefix, ()):
                    size += _BF16 * _share(checkpoint, kind, name.removeprefix(prefix), ref.shape, ranks)
        label = next(part.component for part in parts if part.folder == component)
        found[label] = found.get(label, 0) + size
    return found


def _share(checkpoint: Checkpoint, kind: str, slot: str, shape: tuple[int, ...], ranks: int) -> int:
    """Elements that rank 0 has of a tensor in a part of `kind`."""
    total, heads = 0, checkpoint.model.head_count(kind, checkpoint.configs)
    for cut in checkpoint.model.cuts.get(kind, WHOLE):
        if cut.takes(slot):
            start, stop = columns_of(cut, shape)
            taken = (*shape[:-1], stop - start)
            share = share_of(cut, slot, taken, heads, ranks, 0)
            local = taken if share is None else (*taken[: share.axis], share.size, *taken[share.axis + 1 :])
            total += math.prod(local)
    return total


def find_instance(target: Target, name: str | None = None) -> Instance:
    """The instance called `name`, by default the target's first; UsageError with the legal names otherwise."""
    for instance in target.instances:
        if name in (None, instance.name):
            return instance
    names = ", ".join(instance.name for instance in target.instances) or "none: it does not split a model"
    raise UsageError(f"target {target.name} has no instance {name!r}; there are {names}")


def all_instances() -> tuple[Instance, ...]:
    """The instances of all targets."""
    return tuple(instance for name in target_names() for instance in find_target(name).instances)


def padded_heads(heads: int, degree: int) -> int | None:
    """Heads with those of zeros that make every rank have equally many; None where too many would be zeros."""
    padded = -(-heads // degree) * degree
    return padded if padded - heads <= _MOST_PADDING * padded else None


def legal_degrees(instance: Instance, heads: int, widths: Mapping[str, int] | None = None) -> tuple[int, ...]:
    """Degrees of the topology over which `heads` (padded if need be) and all `widths` split evenly."""
    return tuple(
        degree
        for degree in instance.degrees
        if padded_heads(heads, degree) and not any(width % degree for width in (widths or {}).values())
    )


def default_degree(instance: Instance, heads: int, widths: Mapping[str, int] | None = None) -> int:
    """8 ranks, or as many as there can be below."""
    return max(degree for degree in legal_degrees(instance, heads, widths) if degree <= _DEFAULT_DEGREE)


def check_degree(instance: Instance, degree: int, heads: int, widths: Mapping[str, int] | None = None) -> None:
    """Raise UsageError, with the legal degrees, where the topology has no collectives of `degree` or something does not
    split.

    Args:
        heads: attention heads of the model that is split, see `padded_heads`.
        widths: further axes that are split and cannot be padded, by name, such as a feed-forward's inner width.
    """
    legal = legal_degrees(instance, heads, widths)
    if degree in legal:
        return
    use = f"legal for {instance.name} and {heads} heads: tp {', '.join(map(str, legal))}"
    if degree not in instance.degrees:
        topology = ", ".join(map(str, instance.degrees))
        raise UsageError(
            f"tp {degree}: {instance.name} has {instance.cores} NeuronCores and takes groups of {topology}; {use}"
        )
    for name, width in (widths or {}).items():
        if width % degree:
            raise UsageError(f"tp {degree} does not divide {name}, which is {width}; {use}")
    padded = -(-heads // degree) * degree
    raise UsageError(
        f"tp {degree} does not divide {heads} heads, and of {padded} with padding {padded - heads} would be zeros, a "
        f"quarter at most is allowed; {use}"
    )


def check_memory(
    instance: Instance, degree: int, weights: Mapping[int, Mapping[str, int]], activations: int = 0
) -> CoreMemory:
    """What each core holds when all parts stay loaded.

    Args:
        weights: degree -> part or component -> bytes of its weights on one core. Other degrees than `degree` are there
            to say what would fit.
        activations: an estimate of the bytes that one core needs besides, the same for all degrees.

    Raises:
        ResourceError: too much; `details` is the arithmetic, the message says which instances and degrees would do.
    """
    memory = CoreMemory(instance, degree, weights[degree], activations)
    if memory.fits:
        return memory
    error = ResourceError(
        f"{instance.name} with tp {degree} needs {memory.needed / 1e9:.2f} GB on each core ("
        f"{memory.weight_bytes / 1e9:.2f} weights + {activations / 1e9:.2f} activations + {RUNTIME_BYTES / 1e9:.2f} "
        f"runtime), a core has {instance.core_bytes / 1e9:.2f} GB; {_what_fits(weights, activations)}"
    )
    error.details = memory.table()
    raise error


def _what_fits(weights: Mapping[int, Mapping[str, int]], activations: int) -> str:
    fitting = []
    for instance in all_instances():
        cores = [CoreMemory(instance, one, weights[one], activations) for one in instance.degrees if one in weights]
        if degrees := ", ".join(str(core.degree) for core in cores if core.fits):
            fitting.append(f"{instance.name} with tp {degrees}")
    return f"it fits {'; '.join(fitting)}" if fitting else "it fits no instance; use a smaller SIZE"


def shard_weights(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, progress: Progress, jobs: int | None = None
) -> dict[str, tuple[Blob, ...]]:
    """Base of a part -> the weights of each of its ranks as a safetensors file of the store, from the store or cut now.

    Raises:
        CheckpointError: a shard of the checkpoint went or changed meanwhile. ResourceError: the disk is full.
    """
    parts = plan.at(plan.shapes).parts
    progress.stage("shard", len(parts))
    slots: dict[tuple[str, int], Any] = {}
    for part in parts:  # building a module is not for threads: it changes torch's default device
        alike = part.kind, len(part.members)
        if alike not in slots:
            slots[alike] = split_slots(checkpoint.model, part, checkpoint.configs, part.ranks(plan.layout.degree))
    with ThreadPoolExecutor(jobs or WORKERS, "shard") as pool:
        futures = {
            part.name: pool.submit(
                _shard_part, checkpoint, plan, cache, part, slots[part.kind, len(part.members)], progress
            )
            for part in parts
        }
        try:
            return {name: future.result() for name, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _shard_part(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, slots: Any, progress: Progress
) -> tuple[Blob, ...]:
    ranks = part.ranks(plan.layout.degree)
    bindings = [bind_shard(part, slots, checkpoint, ranks, rank) for rank in range(ranks)]
    action = shard_action(checkpoint, plan, part)

    def produce(folder: Path) -> tuple[dict[str, Path | Blob], dict[str, Any]]:
        files = write_part(slots, bindings, checkpoint, folder)
        check_states(checkpoint)
        add = cache.store.add_file
        return {str(file.rank): add(file.path, move=True, known="sha256:" + file.sha256) for file in files}, {}

    result = run_action(cache, action, produce)
    size = sum(blob.size for blob in result.outputs.values())
    progress.done("shard", part.name, FROM_STORE if result.hit else f"{ranks} files, {size / 1e6:.0f} MB")
    return tuple(result.outputs[str(rank)] for rank in range(ranks))


def shard_jobs(checkpoint: Checkpoint, plan: Plan, cache: ActionCache) -> list[Job]:
    """Of every part, that its weights are cut."""
    return [
        Job(
            "shard", part.name, part.kind, "BF16", _SHARD_MEMORY,
            bool(checkpoint.digests) and cache.lookup(shard_action(checkpoint, plan, part).key) is not None,
            held_elements(checkpoint, part),
        )
        for part in plan.at(plan.shapes).parts
    ]  # fmt: skip


def shard_action(checkpoint: Checkpoint, plan: Plan, part: Part) -> Action:
    """The key of a part's shards: the tensors that it holds, how it is cut, over how many ranks."""
    known = checkpoint.digests[part.folder]
    refs = [
        [name, known[name], list(ref.shape), ref.dtype]
        for name, ref in checkpoint.tensors[part.folder].items()
        if holds_tensor(checkpoint.model, part, name)
    ]
    ranks = part.ranks(plan.layout.degree)
    return Action(
        stage="shard",
        what=f"{part.name} tp{ranks}",
        code_version=code_version(shard_weights, _shard_part, model=type(checkpoint.model)),
        inputs={"weights": "sha256:" + hashlib.sha256(json.dumps(refs).encode()).hexdigest()},
        settings={"ranks": ranks, "members": [list(member) for member in part.members], "dtype": "BF16"},
    )


def held_elements(checkpoint: Checkpoint, part: Part) -> int:
    """Elements of all tensors that a part has some of."""
    tensors = checkpoint.tensors[part.folder].items()
    return sum(math.prod(ref.shape) for name, ref in tensors if holds_tensor(checkpoint.model, part, name))


def shard_file(part: str, rank: int) -> str:
    """The path of a rank's weights in a bundle."""
    return f"weights/{part}/tp{rank}.safetensors"
