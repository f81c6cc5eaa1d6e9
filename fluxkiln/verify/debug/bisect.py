"""Which operation is the first to leave its tolerance: values of a part at one rung, judged one by one.

Two questions are asked of every value. *own*: is it what the operation makes of the very operands it was given, by
the arithmetic of the rung below? That finds a wrong weight, bias or attribute, however noisy the operands are.
*drift*: how far is it from the value of the rung below, with all errors that led to it? That finds an operation that
is right in itself and loses what it is given, as a subtraction of large numbers in 16 bits does. The first value of
the graph that fails either is the answer; a search by halves would need errors that never heal, which they do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fluxkiln.errors import SchemeError
from fluxkiln.verify.metrics import compare, explain_mismatch

# channels named in a finding
MOST_NAMED = 8


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
        missed: the first bound that does not hold, '' when all do: `own`, `channel`, `drift`, `finite`.
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


# rung -> what a scheme stores or computes with -> bounds; healthy parts of all kinds stay below half of them
_F32 = Tolerance(1e-5, 1e-4, 1e-4)
_F16 = Tolerance(2e-3, 1e-2, 5e-2)
_BF16 = Tolerance(1e-2, 5e-2, 0.1)  # one rounding is 3.9e-3 at most; sums of many operations reach 2e-2
TOLERANCES: Mapping[str, Mapping[str, Tolerance]] = {
    "onnxruntime": {"*": Tolerance(2e-5, 2e-4, 2e-5)},
    "dequantized": {
        "F32": _F32,
        "F16": _F16,
        "BF16": _BF16,
        "W8BF16": Tolerance(2e-2, 0.1, 0.2),
        # one matmul with 4-bit codes errs by 9 %, its worst channel by 20 %
        "W4BF16": Tolerance(0.15, 0.5, 0.5),
    },
    "executed": {"*": _F32},  # the same numbers on both sides, whatever the scheme: 5e-7 was measured
    "interpreter": {"F32": _F32, "F16": _F16, "*": _BF16},
    # of a model cut over cores: float32 in another order of sums than the modules'; then bfloat16
    "split": {"*": Tolerance(2e-5, 2e-4, 2e-5)},
    "unsplit": {"*": _BF16},
    "replicas": {"*": _BF16},
}


def tolerance_of(rung: str, scheme: str) -> Tolerance:
    """The bounds at `rung` for a scheme's name without its group size.

    Raises:
        SchemeError: none are known.
    """
    known = TOLERANCES.get(rung, {})
    found = known.get(scheme) or known.get("*")
    if found is None:
        raise SchemeError(f"no tolerance is known for {scheme} at rung {rung}; there are {', '.join(known) or 'none'}")
    return found


def judge_values(
    order: Sequence[str],
    seen: Mapping[str, NDArray[Any]],
    below: Mapping[str, NDArray[Any]],
    local: Mapping[str, NDArray[Any]],
    tolerance: Tolerance,
) -> tuple[Finding, ...]:
    """A finding for every value that was seen and has its counterparts.

    Args:
        order: the names of values in the order they are made.
        seen: values at the rung in question; below: the same at the rung below.
        local: what the arithmetic of the rung below makes of the operands as they were seen.
    """
    return tuple(
        _judge(name, seen[name], below[name], local[name], tolerance)
        for name in order
        if name in seen and name in below and name in local and not explain_mismatch(seen[name], below[name])
    )


def judge_ranks(
    order: Sequence[str],
    seen: Sequence[Mapping[str, NDArray[Any]]],
    below: Sequence[Mapping[str, NDArray[Any]]],
    local: Sequence[Mapping[str, NDArray[Any]]],
    tolerance: Tolerance,
) -> tuple[Finding, ...]:
    """As `judge_values`, of each rank; a value's finding is that of the rank where it is worst.

    Each rank is judged by itself: what is wrong on one of many would drown in the norms of all.
    """
    ranks = [judge_values(order, *one, tolerance) for one in zip(seen, below, local, strict=True)]
    return tuple(
        max(
            (replace(finding, rank=rank) for rank, finding in enumerate(findings)),
            key=lambda finding: (bool(finding.missed), finding.own),
        )
        for findings in zip(*ranks, strict=True)
    )


def first_missed(findings: Sequence[Finding]) -> Finding | None:
    """The first value that leaves its tolerance, in the order of the graph."""
    return next((finding for finding in findings if finding.missed), None)


def value_range(array: NDArray[Any]) -> Range:
    """The range of a value; of an empty one everything is 0."""
    flat = np.asarray(array, np.float64).ravel()
    if not flat.size:
        return Range(0.0, 0.0, 0.0, 0.0, array.shape)
    sizes = np.abs(flat[flat != 0.0])
    smallest = float(sizes.min()) if sizes.size else 0.0
    return Range(float(flat.min()), float(flat.max()), float(np.sqrt(np.mean(flat**2))), smallest, array.shape)


def _judge(name: str, seen: NDArray[Any], below: NDArray[Any], local: NDArray[Any], tolerance: Tolerance) -> Finding:
    own, drift = compare(seen, local), compare(seen, below)
    sizes = {"own": own.relative_l2, "channel": own.worst_channel, "drift": drift.relative_l2}
    if not (own.finite and drift.finite):
        # what was infinite in the float32 arithmetic already (a mask) is not this rung's doing
        same = np.array_equal(np.isfinite(seen), np.isfinite(local))
        return Finding(name, math.nan, math.nan, math.nan, "" if same else "finite")
    missed = next((what for what in ("own", "channel", "drift") if not sizes[what] <= getattr(tolerance, what)), "")
    channels: tuple[int, ...] = ()
    bad = 0
    if missed in ("own", "channel"):
        channels, bad = _bad_channels(seen, local, tolerance.channel)
    return Finding(
        name, own.relative_l2, own.worst_channel, drift.relative_l2, missed, channels, bad,
        seen.shape[-1] if seen.ndim else 1,
    )  # fmt: skip


def _bad_channels(seen: NDArray[Any], local: NDArray[Any], bound: float) -> tuple[tuple[int, ...], int]:
    """Channels (last axis) whose error is beyond `bound`, the worst first, and how many there are."""
    last = seen.shape[-1] if seen.ndim else 1
    wrong = np.square(seen.astype(np.float64) - local).reshape(-1, last).sum(0)
    size = np.square(local.astype(np.float64)).reshape(-1, last).sum(0).mean()
    shares = np.sqrt(wrong / size) if size else np.sqrt(wrong)
    bad = np.flatnonzero(shares > bound)
    named = bad[np.argsort(-shares[bad], kind="stable")][:MOST_NAMED]
    return tuple(int(channel) for channel in named), len(bad)
