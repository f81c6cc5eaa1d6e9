"""Which blocks may be in 8-bit integers on a device of so many bytes: larger than codes of 4 bits, faster, nearer.

Blocks of the kind that saves most time for a byte come first. Within a kind they are alike to a compiler, and come in
the order in which they run. What a block takes is known as a plan knows it: from moulds, from measured nets, or of the
weights alone; without estimates of time the smallest blocks come first.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from fluxkiln.build.prepared import Prepared
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import ResourceError, SchemeError
from fluxkiln.quantize.schemes import Scheme, parse_scheme, with_exceptions
from fluxkiln.types import Part

LARGE = "W8A8"


@dataclass(frozen=True, slots=True)
class Mixture:
    """Blocks in two schemes. `scheme` is what a build takes; `large` of `blocks` are in LARGE; `bytes` are on a device
    while it denoises; `step_ms` is the compiler's estimate, None where there is none."""

    budget: int
    scheme: str
    large: int
    blocks: int
    bytes: int
    step_ms: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mix_blocks(prepared: Prepared, budget: int) -> Mixture:
    """The most blocks in LARGE, the others as the build's own scheme, with which denoising fits in `budget` bytes.

    Raises:
        SchemeError: the target has no such scheme, or the build's own is no smaller one for all blocks.
        ResourceError: not even the build's own scheme fits.
    """
    plan = prepared.plan
    name = (prepared.settings.scheme or plan.target.schemes[0]).partition(",")[0]
    if LARGE not in plan.target.schemes or "=" in name or parse_scheme(name).integer:
        raise SchemeError(
            f"a budget mixes blocks in {LARGE} and in a smaller scheme, {plan.target.name} has "
            f"{', '.join(plan.target.schemes)} and {name} is asked for; name another target, or W4BF16 with --scheme"
        )
    large = parse_scheme(LARGE)
    blocks = [part for part in plan.parts if part.traits.is_block and part.traits.each_step]
    small = _measure(prepared, plan, large, [])
    costs = {}
    for kind in dict.fromkeys(part.kind for part in blocks):
        size, spent = _measure(prepared, plan, large, [part for part in blocks if part.kind == kind])
        saved = 0.0 if spent is None or small[1] is None else small[1] - spent
        costs[kind] = (-saved / max(size - small[0], 1), size)
    order = sorted(blocks, key=lambda part: costs[part.kind])  # a stable sort: blocks of a kind as they run
    if small[0] > budget:
        raise ResourceError(
            f"denoising takes {small[0] / 1e9:.2f} GB with all blocks in {name}, more than the {budget / 1e9:.2f} GB "
            "of --budget; choose a smaller SIZE, or a device with more memory"
        )
    low, high = 0, len(order)
    while low < high:
        middle = (low + high + 1) // 2
        fits = _measure(prepared, plan, large, order[:middle])[0] <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    size, spent = _measure(prepared, plan, large, order[:low])
    return Mixture(budget, _text(name, blocks, order[:low]), low, len(blocks), size, spent)


def _measure(prepared: Prepared, plan: Plan, large: Scheme, chosen: list[Part]) -> tuple[int, float | None]:
    """Bytes on the fullest device while it denoises, and a step's milliseconds, with these in the large scheme."""
    mixed = replace(plan, exceptions={**plan.exceptions, **dict.fromkeys((part.name for part in chosen), large)})
    found = toolchain_of(plan.target).devices(prepared.checkpoint, mixed, prepared.cache)
    return max(found["peaks"]["while denoising"]), found["estimate"]["step_ms"]


def _text(small: str, blocks: list[Part], chosen: list[Part]) -> str:
    """What a build takes: the scheme of all others, and runs of blocks that have the large one."""
    places = []
    for family in dict.fromkeys(part.name.partition(".")[0] for part in blocks):
        numbers = [part.name.partition(".")[2] for part in chosen if part.name.partition(".")[0] == family]
        places += [f"{family}.{numbers[0]}-{numbers[-1]}"] if numbers else []
    return with_exceptions(small, places, LARGE)
