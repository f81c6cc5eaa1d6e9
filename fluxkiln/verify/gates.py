"""The rungs and gates of the parity ladder that every toolchain shares, and how rows are judged.

A table is read from the top: for each metric and each side of the comparison the first gate that matches a row is the
one that counts, so exceptions stand above the rule they except; what a toolchain adds stands above `gates.toml`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fluxkiln.types import Kind

if TYPE_CHECKING:
    from fluxkiln.verify.metrics import Metrics

Against = Literal["reference", "previous"]

PIPELINE = "pipeline"
# The family of the rungs that compute with the weights as the scheme stores them.
STORED = "scheme"


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder.

    Attributes:
        order: where it stands; a ladder has one rung of each.
        meaning: what runs there. suspect: what to look at when this rung is the first bad one.
        family: STORED, or a word that gates may use in place of its name.
        series: its colour and mark in charts, 0 to 5; rungs of different toolchains share one.
        exact: it compares bytes, which have no place on a logarithmic axis.
    """

    name: str
    order: int
    meaning: str
    suspect: str
    family: str = ""
    series: int = 0
    exact: bool = False


RUNGS: tuple[Rung, ...] = (
    Rung("reference", 0, "diffusers as published, float32",
         "the recorded run itself: its weights or inputs"),
    Rung("patched", 1, "diffusers with the export patches, float32",
         "a patch that changes the arithmetic", series=1),
    Rung("onnxruntime", 2, "the exported template with its weights bound, float32",
         "the export, or a weight bound to the wrong slot", series=2),
    Rung("dequantized", 3, "weights as the scheme stores them, float32 arithmetic",
         "quantization: a scale, a zero point, or the scheme itself", STORED, series=3),
)  # fmt: skip


# What a device, or whatever executes a bundle elsewhere, makes of a recording that came with the bundle.
DEVICE = Rung("device", 20, "the bundle's own parts, where they are executed",
              "the runtime, its driver, or the device", STORED, series=2)  # fmt: skip


def rung_table(own: Iterable[Rung]) -> dict[str, Rung]:
    """The rungs of a ladder by name, bottom to top: those above and a toolchain's own."""
    return {rung.name: rung for rung in sorted((*RUNGS, *own), key=lambda rung: rung.order)}


HIGHER_IS_BETTER = frozenset({"cosine", "delta_cosine", "psnr", "ssim", "finite", "covered"})


@dataclass(frozen=True, slots=True)
class Gate:
    """One bound. `rung`, `scheme`, `what` and `output` are shell patterns, alternatives separated by `|`.

    `rung` is a name or a family, `what` one of a row's groups (see `Row.groups`). `metric` is a field of Metrics, or
    `covered` (see `judge_row`). The value must be at least `bound` for the metrics in HIGHER_IS_BETTER and at most
    `bound` for the others; NaN passes neither. `proposed`: a bound reasoned about but not required; measurement may
    move it either way. Every other bound may be tightened, never loosened.
    """

    rung: str
    scheme: str
    what: str
    output: str
    metric: str
    bound: float
    against: Against
    reason: str
    proposed: bool = False

    def matches(self, row: Row) -> bool:
        asked = (self.rung, self.scheme, self.what, self.output)
        has = ((row.rung, row.at.family), (row.scheme,), row.groups, (row.output,))
        return all(
            any(fnmatchcase(value, one) for one in pattern.split("|") for value in values)
            for pattern, values in zip(asked, has, strict=True)
        )

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.metric in HIGHER_IS_BETTER else value <= self.bound

    def excess(self, value: float) -> float:
        """How much of the allowance `value` uses: 1 is exactly the bound, more is a miss, infinite if not finite.

        For cosine and SSIM the allowance is the distance from 1; for PSNR it is the amplitude of the error.
        """
        if math.isnan(value):
            return math.inf
        if self.metric == "psnr":
            return float(10.0 ** ((self.bound - value) / 20.0))
        if self.metric in HIGHER_IS_BETTER:
            allowance = 1.0 - self.bound
            return (1.0 - value) / allowance if allowance > 0.0 else (0.0 if value >= self.bound else math.inf)
        if self.bound == 0.0:
            return 0.0 if value == 0.0 else math.inf
        return value / self.bound


@dataclass(frozen=True, slots=True)
class Verdict:
    """One gate applied to one row."""

    gate: Gate
    value: float

    @property
    def passed(self) -> bool:
        return self.gate.holds(self.value)

    @property
    def excess(self) -> float:
        return self.gate.excess(self.value)

    @property
    def claim(self) -> str:
        """For example `delta_cosine 0.973 against reference, must be >= 0.99`."""
        sign = ">=" if self.gate.metric in HIGHER_IS_BETTER else "<="
        return f"{self.gate.metric} {self.value:.6g} against {self.gate.against}, must be {sign} {self.gate.bound:g}"


@dataclass(frozen=True, slots=True)
class Row:
    """One output of one part at one rung and one denoising step.

    `traits` is the part's kind, None for the whole pipeline. `vs_reference` compares with the recorded reference,
    `vs_previous` with the rung called `previous`, the last one below it that was run. `step` is -1 for what runs
    once per image (encoders, VAE, the final image).
    """

    part: str
    traits: Kind | None
    output: str
    step: int
    at: Rung
    scheme: str
    vs_reference: Metrics
    previous: str
    vs_previous: Metrics
    verdicts: tuple[Verdict, ...] = ()
    note: str = ""

    @property
    def kind(self) -> str:
        return self.traits.name if self.traits else PIPELINE

    @property
    def rung(self) -> str:
        return self.at.name

    @property
    def groups(self) -> tuple[str, ...]:
        """What gates may ask for: `pipeline`; or `part`, `residual` where the kind updates a residual stream and is
        judged on what it adds, else `whole`, `block` and `time` (see `Kind.is_block`, `Kind.timed`)."""
        kind = self.traits
        if kind is None:
            return (PIPELINE,)
        stream = "residual" if kind.residual else "whole"
        return ("part", stream, *["block"] * kind.is_block, *["time"] * (self.output in kind.timed))

    @property
    def passed(self) -> bool:
        """Judged, and every gate held. A row that was never judged has not passed."""
        return bool(self.verdicts) and all(verdict.passed for verdict in self.verdicts)

    @property
    def worst(self) -> Verdict | None:
        """The verdict that uses most of its allowance; `finite` counts only when it failed."""
        candidates = [verdict for verdict in self.verdicts if verdict.gate.metric != "finite" or not verdict.passed]
        return max(candidates, key=lambda verdict: (not verdict.passed, verdict.excess), default=None)


# What groups are called in a report.
GROUP_NAMES: Mapping[str, str] = {
    "residual": "blocks",
    "whole": "parts without a residual stream",
    "part": "every part",
    "block": "transformer blocks",
    "time": "the embedding of the timestep",
    "*": "all",
}
FINITE = Gate("*", "*", "*", "*", "finite", 1.0, "reference",
              "NaN or infinity anywhere means that nothing was compared")  # fmt: skip
UNCOVERED = Gate("*", "*", "*", "*", "covered", 1.0, "reference",
                 "a row that no gate judges proves nothing: add a gate for this rung, scheme, kind and "
                 "output")  # fmt: skip


def gate_table(own: Iterable[Gate]) -> tuple[Gate, ...]:
    """The gates of a ladder: a toolchain's own, which may except rules, and those of `gates.toml`."""
    return (FINITE, *own, *_shared_gates())


@cache
def _shared_gates() -> tuple[Gate, ...]:
    text = Path(__file__).with_name("gates.toml").read_text(encoding="utf-8")
    return tuple(Gate(*fields) for fields in tomllib.loads(text)["gates"])


def judge_row(row: Row, gates: Sequence[Gate]) -> tuple[Verdict, ...]:
    """Apply every gate that counts for `row`, in table order.

    A metric the row lacks (a delta gate but no residual input was given) fails its gate. A row that no gate but
    `finite` matches fails UNCOVERED, so that a misspelt rung or scheme cannot pass unjudged. Rows of the reference
    rung compare nothing and are judged by `finite` alone.
    """
    verdicts: list[Verdict] = []
    seen: set[tuple[str, Against]] = set()
    for gate in gates:
        if (gate.metric, gate.against) in seen or not gate.matches(row):
            continue
        if row.rung == "reference" and gate.metric != "finite":
            continue
        seen.add((gate.metric, gate.against))
        value = getattr(row.vs_reference if gate.against == "reference" else row.vs_previous, gate.metric)
        verdicts.append(Verdict(gate, math.nan if value is None else float(value)))
    if row.rung != "reference" and all(metric == "finite" for metric, _ in seen):
        verdicts.append(Verdict(UNCOVERED, 0.0))
    return tuple(verdicts)


def first_bad_rung(rows: Iterable[Row]) -> dict[str, str]:
    """Part -> the lowest rung at which one of its rows missed a gate. Parts without a miss are left out."""
    lowest_last = sorted((row for row in rows if not row.passed), key=lambda row: -row.at.order)
    return {row.part: row.rung for row in lowest_last}
