"""Which scheme each block may have on a device of so many bytes: the fastest mixture, and of such the nearest.

A block may have any scheme of the target in the arithmetic of the build's own, if it is measured to lose no more in it
(`block_errors`). What a block takes is known as a plan knows it: from moulds, from measured nets, or of the weights
alone. Schemes without an estimate of time are left out; without any, the mixture is chosen that loses least.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

from fluxkiln.build.block_errors import known_errors, measure_errors, step_blocks
from fluxkiln.build.prepared import Prepared
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import ResourceError, SchemeError
from fluxkiln.progress import Progress
from fluxkiln.quantize.recipes import choose
from fluxkiln.quantize.schemes import Scheme, parse_scheme
from fluxkiln.types import Part

# what is told without being asked for: what an SE7-32 gives its NPU, and two larger devices
DEFAULT_BUDGETS = (7615 << 20, 12_000_000_000, 16_000_000_000)
# Of a block's squared error beside its milliseconds: it decides between mixtures that take the same time only.
_ERROR_MS = 1e-3


@dataclass(frozen=True, slots=True)
class Mixture:
    """Blocks in several schemes.

    Attributes:
        scheme: what a build takes. blocks: scheme -> how many blocks have it.
        bytes: on a device while it denoises. step_ms: the compiler's estimate, None where there is none.
        error: what a block loses, root mean square over all of them; None where it is not known. errors: whose.
    """

    budget: int
    scheme: str
    blocks: Mapping[str, int]
    bytes: int
    step_ms: float | None
    error: float | None
    errors: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Option:
    """A scheme of a block: bytes and milliseconds (or squared error) more than in the build's own."""

    scheme: Scheme
    size: int
    cost: float


def find_mixtures(prepared: Prepared, budgets: Iterable[int]) -> list[Mixture]:
    """Of each budget; of DEFAULT_BUDGETS, where there are none, as far as something fits and its time is known."""
    if budgets := tuple(budgets):
        return [mix_blocks(prepared, budget) for budget in budgets]
    found = []
    for budget in DEFAULT_BUDGETS if step_blocks(prepared.plan) else ():
        with suppress(SchemeError, ResourceError):
            found.append(mix_blocks(prepared, budget))
    return [one for one in found if one.step_ms is not None]


def measure_blocks(prepared: Prepared, progress: Progress) -> None:
    """Measure what every block loses in each scheme that it may have; errors as `mix_blocks` and `measure_errors`."""
    measure_errors(prepared, _candidates(prepared), progress)


def mix_blocks(prepared: Prepared, budget: int) -> Mixture:
    """The fastest mixture with which denoising fits in `budget` bytes.

    Raises:
        SchemeError: the target does not say what a device holds, or blocks have exceptions already.
        ResourceError: not even the build's own scheme fits.
    """
    own, *others = _candidates(prepared)
    blocks = step_blocks(prepared.plan)
    errors, source = known_errors(prepared, [own, *others])
    least, step_ms = _measure(prepared, {})
    if least > budget:
        raise ResourceError(
            f"denoising takes {least / 1e9:.2f} GB with all blocks in {own.name}, more than the {budget / 1e9:.2f} GB "
            "of --budget; choose a smaller SIZE, or a device with more memory"
        )
    more: dict[tuple[str, Scheme], tuple[int, float]] = {}
    for kind in dict.fromkeys(part.kind for part in blocks):
        alike = [part.name for part in blocks if part.kind == kind]
        more[kind, own] = 0, 0.0
        for scheme in others:
            size, spent = _measure(prepared, dict.fromkeys(alike, scheme))
            if step_ms is None or spent is not None:
                more[kind, scheme] = -(-(size - least) // len(alike)), ((spent or 0.0) - (step_ms or 0.0)) / len(alike)

    def option(part: Part, scheme: Scheme) -> _Option:
        size, spent = more[part.kind, scheme]
        square = errors[part.name, scheme] ** 2
        return _Option(scheme, size, square if step_ms is None else spent + _ERROR_MS * square)

    options = {
        part.name: [
            option(part, one)
            for one in (own, *others)
            if (part.kind, one) in more and errors[part.name, one] <= errors[part.name, own]
        ]
        for part in blocks
    }
    room = budget - least
    found, size, spent = dict[str, Scheme](), least, step_ms
    while room > 0:
        found = {name: one.scheme for name, one in choose(options, room).items() if one.scheme != own}
        size, spent = _measure(prepared, found)
        if size <= budget:
            break
        room -= size - budget  # what is shared by the nets of a file is not in the bytes of one block
        found, size, spent = {}, least, step_ms
    squares = [errors[part.name, found.get(part.name, own)] ** 2 for part in blocks]
    lost = math.sqrt(sum(squares) / len(squares))
    counts = Counter(found.get(part.name, own).name for part in blocks)
    return Mixture(
        budget, _text(own, blocks, found), dict(counts), size, spent, lost if math.isfinite(lost) else None, source
    )  # fmt: skip


def _candidates(prepared: Prepared) -> list[Scheme]:
    """The build's own scheme of its blocks first, then the others that they may have; SchemeError as `mix_blocks`."""
    plan = prepared.plan
    asked = prepared.settings.scheme or plan.target.schemes[0]
    name = asked.partition(",")[0]
    if not plan.target.boards or plan.exceptions or "=" in name:
        raise SchemeError(
            f"a budget mixes schemes of blocks on one device: {plan.target.name} with {asked} "
            "has no device whose memory is known, or blocks with schemes already; name bm1684x say, and one --scheme"
        )
    own = parse_scheme(name)
    every = map(parse_scheme, plan.target.schemes)
    return list(dict.fromkeys([own, *(one for one in every if one.arithmetic == own.arithmetic)]))


def _measure(prepared: Prepared, chosen: Mapping[str, Scheme]) -> tuple[int, float | None]:
    """Bytes on the fullest device while it denoises, and a step's milliseconds, with parts in these schemes."""
    mixed = replace(prepared.plan, exceptions=dict(chosen))
    found = toolchain_of(mixed.target).devices(prepared.checkpoint, mixed, prepared.cache)
    return max(found["peaks"]["while denoising"]), found["estimate"]["step_ms"]


def _text(own: Scheme, blocks: list[Part], chosen: Mapping[str, Scheme]) -> str:
    """What a build takes: the scheme of all others, and runs of blocks that have another."""
    pieces, last = [own.name], ("", -2, own)
    for part in blocks:
        family, _, number = part.name.partition(".")
        scheme = chosen.get(part.name, own)
        if last == (family, int(number) - 1, scheme) and scheme != own:
            first = pieces[-1].partition("=")[0].partition("-")[0]
            pieces[-1] = f"{first}-{number}={scheme.name}"
        elif scheme != own:
            pieces.append(f"{part.name}={scheme.name}")
        last = family, int(number), scheme
    return ",".join(pieces)
