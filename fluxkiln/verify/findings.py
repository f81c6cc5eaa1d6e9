"""What is found inside a part, rung by rung: the values that those who look into parts hand on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.types import Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

Values = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of a part in the reference run.

    Attributes:
        inputs: by the names of its kind, filled up where the kind takes rows; outputs: what it made of them.
        shapes: of the recording. bundle: the folder of the build's own, which need not be there.
    """

    inputs: Values
    outputs: Values
    shapes: Shapes
    bundle: Path


# makes the reference run, or reads it
Record = Callable[[], RecordedCall]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a graph.

    Attributes:
        output: the value it makes; its first, where it makes several.
        inputs: the values and graph inputs it reads; slots: the weights it reads; epsilon: of a norm, else None.
    """

    output: str
    op_type: str
    inputs: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds on relative L2 (`own`, `drift`) and on the worst channel of the own error; see `metrics.Metrics`."""

    own: float
    channel: float
    drift: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One value at one rung.

    Attributes:
        own, channel, drift: relative L2 of the own error, its worst channel, relative L2 of the whole error.
        missed: the first bound that does not hold, '' when all do: `own`, `channel`, `drift`, `finite`, `epsilon`.
        channels: those whose own error is beyond the bound, the worst first, at most MOST_NAMED of `bad_channels`.
        rank: of a part that runs on several cores, the one where it is worst; else -1.
    """

    value: str
    own: float
    channel: float
    drift: float
    missed: str = ""
    channels: tuple[int, ...] = ()
    bad_channels: int = 0
    all_channels: int = 0
    rank: int = -1


@dataclass(frozen=True, slots=True)
class Range:
    """What a value is made of: extremes, root mean square, and the smallest size that is not 0."""

    low: float
    high: float
    rms: float
    smallest: float
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Remedy:
    """`cause`: what the errors look like. `advice`: what to do. `through`: the sinusoids that are lost, if any."""

    cause: str
    advice: str
    through: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first operation that leaves its tolerance.

    Attributes:
        operation: its type in the template; lowered: what it became in the compiled form, '' elsewhere.
        inputs: value -> its range at this rung.
        output: the range of what it makes.
    """

    rung: str
    finding: Finding
    operation: str
    lowered: str
    slots: tuple[str, ...]
    inputs: Mapping[str, Range]
    output: Range
    remedy: Remedy


@dataclass(frozen=True, slots=True)
class RungFindings:
    """What was found at one rung, compared with the rung `against`; `culprit` is None where nothing is out."""

    rung: str
    against: str
    findings: tuple[Finding, ...]
    culprit: Culprit | None = None

    @property
    def noisiest(self) -> Finding | None:
        """The value with the largest error of its own."""
        return max(self.findings, key=lambda finding: finding.own, default=None)


@dataclass(frozen=True, slots=True)
class PartFindings:
    """What was found in a part, from its lowest rung up; `facts` on what it was executed on, or not."""

    rungs: tuple[RungFindings, ...]
    facts: Mapping[str, str] = field(default_factory=dict)
