"""What an instance can take: tensor-parallel degrees, memory of a core. No weight is read for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fluxkiln.compile.target import Instance, Target
from fluxkiln.compile.targets import find_target, target_names
from fluxkiln.errors import ResourceError, UsageError

DEFAULT_DEGREE = 8
# Of each core: 96 MB are the runtime's micro-code (AWS Neuron documentation, "Neuron device memory"). Programs,
# DMA rings, scratchpads and buffers of collectives have no published size; the rest is for them, by our judgement.
RUNTIME_BYTES = 1 << 30
# Of all heads that are computed: 24 heads on 16 or 32 ranks are 32 with the padding.
_MOST_PADDING = 1 / 4


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
    return max(degree for degree in legal_degrees(instance, heads, widths) if degree <= DEFAULT_DEGREE)


def check_degree(instance: Instance, degree: int, heads: int, widths: Mapping[str, int] | None = None) -> int:
    """The number of heads, padding included, that `degree` ranks compute together.

    Heads are padded with zeros where a quarter of them at most are: 24 become 32 on 16 and 32 ranks.

    Args:
        heads: attention heads of the model that is split.
        widths: further axes that are split and cannot be padded, by name, such as a feed-forward's inner width.

    Raises:
        UsageError: the topology has no collectives of `degree`, or something does not split; with the legal degrees.
    """
    legal = legal_degrees(instance, heads, widths)
    if degree in legal:
        return -(-heads // degree) * degree
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
        degrees = [
            str(degree)
            for degree in instance.degrees
            if degree in weights and CoreMemory(instance, degree, weights[degree], activations).fits
        ]
        if degrees:
            fitting.append(f"{instance.name} with tp {', '.join(degrees)}")
    return f"it fits {'; '.join(fitting)}" if fitting else "it fits no instance; use a smaller SIZE"
