"""A scheme for every layer: exceptions by name, and the choice among several within a budget of bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.schemes import Scheme, matches, parse_exception, parse_scheme, weight_name
from fluxkiln.types import Kind

# places that are in every model: the first and the last block of each of its stacks
FIRST, LAST = "first_blocks", "last_blocks"
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True, slots=True)
class Stacks:
    """Where a model's blocks are: `transformer_blocks` -> the kind of those in it; and the kinds of all its parts."""

    of: Mapping[str, str]
    kinds: Mapping[str, Kind]

    def slot_of(self, layer: str) -> tuple[str, str]:
        """Kind and name within the part of a layer of a block: `single`, `attn.to_q`."""
        stack, _, own = _split(layer)
        return self.of[stack], weight_name(own)

    def find(self, place: str, layers: Sequence[str]) -> list[str]:
        """Those of a model's layers that are at a place (see `LayerRule`)."""
        last: dict[str, int] = {}
        for stack, number, _ in map(_split, layers):
            last[stack] = max(number, last.get(stack, 0))

        def is_there(layer: str) -> bool:
            stack, number, own = _split(layer)
            kind = self.of.get(stack, "")
            if kind and place in (FIRST, LAST):
                return number == (0 if place == FIRST else last[stack])
            meant = (one for one in self.kinds.values() if one.block == kind and place in (one.name, one.family))
            holds = any(own.startswith(one.own) and not own.startswith(one.without) for one in meant)
            return holds or matches(place, layer) or matches(place, f"{kind}.{own}")

        return [layer for layer in layers if is_there(layer)]


@dataclass(frozen=True, slots=True)
class LayerRule:
    """Layers at a place are stored as `scheme`.

    A place is a shell pattern on the layer's name in the checkpoint or as builds have it (`single.proj_out`), a kind of
    part or a family of them, FIRST or LAST.
    """

    place: str
    scheme: Scheme


def _split(layer: str) -> tuple[str, int, str]:
    """Stack, number and own name of a layer of a block; of any other its name, -1 and nothing."""
    stack, *rest = re.split(r"\.(\d+)\.", layer, maxsplit=1)
    return (stack, int(rest[0]), rest[1]) if rest else (stack, -1, "")


def parse_rules(texts: Sequence[str]) -> tuple[LayerRule, ...]:
    """`single.proj_out=BF16`, `transformer_blocks.0.*=W4BF16-g32`: rules, of which a later one overrides."""
    places = f"a layer's name with * in it, KIND or KIND.PATTERN as a build takes it, {FIRST} or {LAST}"
    found = (parse_exception(text, places) for text in texts)
    return tuple(LayerRule(place, parse_scheme(name)) for place, name in found)


def assign_rules(names: Sequence[str], rules: Sequence[LayerRule], stacks: Stacks) -> dict[str, Scheme]:
    """Layer -> the scheme that the last rule which matches it gives; SchemeError for a rule that matches none."""
    found: dict[str, Scheme] = {}
    for rule in rules:
        matched = stacks.find(rule.place, names)
        if not matched:
            near = ", ".join(list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))[:8])
            raise SchemeError(f"no layer is called {rule.place!r}; there are {near} and others")
        found |= dict.fromkeys(matched, rule.scheme)
    return found


def parse_budget(text: str, weights: int) -> int:
    """`6.5GB`, `6500000000` or `4.6bits` (a weight) -> bytes; SchemeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or (match[2] not in _UNITS and match[2] not in ("bit", "bits")):
        raise SchemeError(f"budget {text!r} is neither bytes (6.5GB) nor bits a weight (4.6bits)")
    value = float(match[1])
    return int(value * weights / 8) if match[2].startswith("bit") else int(value * _UNITS[match[2]])


class Candidate(Protocol):
    """What may be chosen: the bytes that it takes, and what is to be small in sum, a squared error say."""

    @property
    def size(self) -> int: ...

    @property
    def cost(self) -> float: ...


AnyCandidate = TypeVar("AnyCandidate", bound=Candidate)


def choose(layers: Mapping[str, Sequence[AnyCandidate]], budget: int) -> dict[str, AnyCandidate]:
    """For each layer one of its options, so that all fit the budget and their costs add up to little.

    Every layer begins with its smallest; the step that takes most cost off a byte is taken as long as the
    budget has room for it. Steps are along each layer's lower convex hull, so no better mixture has the same bytes but
    for the last step.

    Raises:
        SchemeError: even the smallest of all do not fit.
    """
    chosen = _smallest(layers, budget)
    used = sum(one.size for one in chosen.values())
    steps = [(gain, name, option) for name, options in layers.items() for gain, option in _hull(options, chosen[name])]
    closed: set[str] = set()
    for _, name, option in sorted(steps, key=lambda step: -step[0]):
        extra = option.size - chosen[name].size
        if used + extra > budget:
            closed.add(name)  # what follows on this layer's hull is larger still
        elif name not in closed:
            used += extra
            chosen[name] = option
    return chosen


def choose_exactly(layers: Mapping[str, Sequence[Figures]], budget: int) -> dict[str, Figures]:
    """As `choose`, but no other choice within the budget has squared errors that add up to less.

    It is for some tens of layers of a few sizes: a few large ones, of which `choose` may have no room left for the one
    that matters. All sums that no other beats in both bytes and error are kept, layer by layer.

    Raises:
        SchemeError: even the smallest of all do not fit.
    """
    smallest = _smallest(layers, budget)
    rest = sum(one.size for one in smallest.values())
    # bytes, squared error, what was chosen so far: sizes rise, errors fall
    front: list[tuple[int, float, tuple[Figures, ...]]] = [(0, 0.0, ())]
    for name, options in layers.items():
        rest -= smallest[name].size
        longer = sorted(
            (
                (size + one.size, error + one.cost, (*taken, one))
                for size, error, taken in front
                for one in options
                if size + one.size + rest <= budget
            ),
            key=lambda sums: sums[:2],
        )
        front = []
        for sums in longer:
            if not front or sums[1] < front[-1][1]:
                front.append(sums)
    return dict(zip(layers, front[-1][2], strict=True))


def _smallest(layers: Mapping[str, Sequence[AnyCandidate]], budget: int) -> dict[str, AnyCandidate]:
    """The smallest option of every layer; SchemeError where even these do not fit."""
    chosen = {name: min(options, key=lambda one: (one.size, one.cost)) for name, options in layers.items()}
    used = sum(one.size for one in chosen.values())
    if used > budget:
        raise SchemeError(
            f"a budget of {budget} bytes cannot be met: the smallest scheme of every layer takes {used}; give that "
            "much, or larger groups"
        )
    return chosen


def _hull(options: Sequence[AnyCandidate], first: AnyCandidate) -> list[tuple[float, AnyCandidate]]:
    """Steps from `first` on, each with the cost it takes off a byte; gains fall from step to step."""
    steps: list[tuple[float, AnyCandidate]] = []
    here = first
    while True:
        better = [one for one in options if one.size > here.size and one.cost < here.cost]
        if not better:
            return steps
        gains = [((here.cost - one.cost) / (one.size - here.size), one) for one in better]
        gain, here = max(gains, key=lambda pair: pair[0])
        steps.append((gain, here))
