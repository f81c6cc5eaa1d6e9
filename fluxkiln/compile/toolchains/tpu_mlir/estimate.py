"""What the compiler itself thinks its code takes: a schedule of every command, made while it generates code.

No board is involved. The figures rank formulations and show where a net waits; they are not times that were measured.

Source: TPU-MLIR 1.30.2 writes `compiler_profile_0.txt` into the folder that `model_deploy` runs in: one line for each
command, in a column for the tensor unit (`ENGINE_BD`) and one for the memory unit (`ENGINE_GDMA`), `t` being cycles;
then `TCYC`, the cycles until the last of both ends, and for a net that computes anything the same as `runtime` in ms.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fluxkiln.types import Part

PROFILE = "compiler_profile_0.txt"

# of the unit that the profile counts in: its own `runtime` is TCYC divided by this
CYCLES_PER_MS: Mapping[str, int] = {"bm1684x": 1_000_000, "bm1688": 900_000}

_COMMAND = re.compile(r"\|e:\d+\|t:(\d+)(\|dr:)?")
_TOTAL = re.compile(r"^TCYC : (\d+)\b", re.MULTILINE)
_RUNTIME = re.compile(r"\bruntime: ([0-9.]+)ms")


@dataclass(frozen=True, slots=True)
class Estimate:
    """Milliseconds of one run of a net.

    Attributes:
        ms: from the first command to the last.
        tensor_ms, memory_ms: how long the tensor unit computes and the memory unit moves data. They overlap: what `ms`
            is longer than the larger one is waiting.
    """

    ms: float
    tensor_ms: float
    memory_ms: float


@dataclass(frozen=True, slots=True)
class PipelineEstimate:
    """Milliseconds of a whole image, by when the parts run.

    Attributes:
        once_ms: parts that run once an image (text encoders, VAE, hoisted modulation), those of `missing` left out.
        step_ms, image_ms: one denoising step, and `once_ms` with all steps; None when a part of the step has no
            estimate: the sum would be too small.
        by_kind: kind -> how many parts of it have an estimate, and their summed ms.
        missing: parts without an estimate.
    """

    steps: int
    once_ms: float
    step_ms: float | None
    image_ms: float | None
    by_kind: Mapping[str, tuple[int, float]]
    missing: tuple[str, ...]


def read_estimate(folder: Path, chip: str) -> Estimate | None:
    """The estimate that a compile left in its folder; None when there is none, or not in the form known here.

    A missing estimate is no error, and never 0: another version of the compiler may write another form.
    """
    try:
        text = (folder / PROFILE).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    totals, runtimes = _TOTAL.findall(text), _RUNTIME.findall(text)
    cycles = int(totals[0]) if len(totals) == 1 else 0
    if not cycles or chip not in CYCLES_PER_MS:
        return None
    ms = cycles / CYCLES_PER_MS[chip]
    if runtimes and not math.isclose(float(runtimes[-1]), ms, rel_tol=1e-4, abs_tol=1e-6):
        return None
    spent = [0, 0]
    for count, memory in _COMMAND.findall(text):
        spent[bool(memory)] += int(count)
    return Estimate(ms, *(count / CYCLES_PER_MS[chip] for count in spent))


def estimate_pipeline(parts: Mapping[Part, float | None], steps: int) -> PipelineEstimate:
    """What an image takes when parts that depend on the step run once a step, and everything else once.

    Args:
        parts: part -> ms of one run.
        steps: denoising steps.
    """
    once, step, step_is_known = 0.0, 0.0, True
    by_kind: dict[str, tuple[int, float]] = {}
    missing = []
    for part, ms in parts.items():
        every_step = part.traits.each_step
        if ms is None:
            missing.append(part.name)
            step_is_known = step_is_known and not every_step
            continue
        if every_step:
            step += ms
        else:
            once += ms
        count, spent = by_kind.get(part.kind, (0, 0.0))
        by_kind[part.kind] = (count + 1, spent + ms)
    return PipelineEstimate(
        steps,
        once,
        step if step_is_known else None,
        once + steps * step if step_is_known else None,
        by_kind,
        tuple(missing),
    )
