"""A scheme for every layer: exceptions by name, and the choice among several within a budget of bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fluxkiln.errors import SchemeError
from fluxkiln.quantize.exceptions import matches, parse_exception, weight_name
from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.schemes import Scheme, parse_scheme

# what the blocks of a stack are called as a kind
STACK_KINDS: Mapping[str, str] = {
    "transformer_blocks.": "double",
    "single_transformer_blocks.": "single",
    "encoder.block.": "t5_block",
}
# layers that are often left alone, by the names of the checkpoint's tensors; LAST is the number of a stack's last block
LAST = "<last>"
LAYER_GROUPS: Mapping[str, tuple[str, ...]] = {
    "modulation": ("*norm1.linear.weight", "*norm1_context.linear.weight", "*.norm.linear.weight"),
    "first_blocks": tuple(f"{stack}0.*" for stack in STACK_KINDS),
    "last_blocks": tuple(f"{stack}{LAST}.*" for stack in STACK_KINDS),
}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


@dataclass(frozen=True, slots=True)
class LayerRule:
    """Layers at a place are stored as `scheme`.

    A place is a shell pattern on the layer's name in the checkpoint or as builds have it (`single.proj_out`), a kind of
    block, or a key of LAYER_GROUPS.
    """

    place: str
    scheme: Scheme

    def matching(self, names: Sequence[str]) -> list[str]:
        """Those of a model's layers that it is for."""
        place = f"{self.place}.*" if self.place in STACK_KINDS.values() else self.place
        patterns = [_with_last(one, names) for one in LAYER_GROUPS.get(place, (place,))]
        return [
            name for name in names if any(matches(one, name) or matches(one, build_place(name)) for one in patterns)
        ]


def slot_of(layer: str) -> tuple[str, str]:
    """Kind and name within the part of a layer of a block: `single`, `attn.to_q`."""
    stack = next(stack for stack in STACK_KINDS if layer.startswith(stack))
    return STACK_KINDS[stack], weight_name(layer.removeprefix(stack).partition(".")[2])


def build_place(layer: str) -> str:
    """`single.attn.to_q`, how a build names the layer in all blocks; its own name where it is in none."""
    return ".".join(slot_of(layer)) if layer.startswith(tuple(STACK_KINDS)) else layer


def _with_last(pattern: str, names: Sequence[str]) -> str:
    """A pattern with the number of its stack's last block in the place of LAST; 0 where the model has no such stack."""
    stack, last, _ = pattern.partition(LAST)
    if not last:
        return pattern
    numbers = (name.removeprefix(stack).split(".")[0] for name in names if name.startswith(stack))
    return pattern.replace(LAST, str(max(map(int, numbers), default=0)))


def parse_rules(texts: Sequence[str]) -> tuple[LayerRule, ...]:
    """`single.proj_out=BF16`, `transformer_blocks.0.*=W4BF16-g32`: rules, of which a later one overrides."""
    places = f"a layer's name with * in it, KIND.PATTERN as a build takes it, or one of {', '.join(LAYER_GROUPS)}"
    found = (parse_exception(text, places) for text in texts)
    return tuple(LayerRule(place, parse_scheme(name)) for place, name in found)


def assign_rules(names: Sequence[str], rules: Sequence[LayerRule]) -> dict[str, Scheme]:
    """Layer -> the scheme that the last rule which matches it gives.

    Raises:
        SchemeError: a rule matches no layer.
    """
    found: dict[str, Scheme] = {}
    for rule in rules:
        matched = rule.matching(names)
        if not matched:
            near = ", ".join(list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))[:8])
            raise SchemeError(f"no layer is called {rule.place!r}; there are {near} and others")
        found |= dict.fromkeys(matched, rule.scheme)
    return found


def parse_budget(text: str, weights: int) -> int:
    """`6.5GB`, `6500000000` or `4.6bits` (a weight) -> bytes.

    Raises:
        SchemeError: neither of them.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text.lower())
    if match is None or (match[2] not in _UNITS and match[2] not in ("bit", "bits")):
        raise SchemeError(f"budget {text!r} is neither bytes (6.5GB) nor bits a weight (4.6bits)")
    value = float(match[1])
    return int(value * weights / 8) if match[2].startswith("bit") else int(value * _UNITS[match[2]])


def choose(layers: Mapping[str, Sequence[Figures]], budget: int) -> dict[str, Figures]:
    """For each layer one of its figures, so that all fit the budget and the squared errors add up to little.

    Every layer begins with its smallest; the step that takes most squared error off a byte is taken as long as the
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
        if name in closed:
            continue
        if used + extra > budget:
            closed.add(name)  # what follows on this layer's hull is larger still
            continue
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
                (size + one.size, error + one.error**2, (*taken, one))
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


def _smallest(layers: Mapping[str, Sequence[Figures]], budget: int) -> dict[str, Figures]:
    """The smallest option of every layer; SchemeError where even these do not fit."""
    chosen = {name: min(options, key=lambda one: (one.size, one.error)) for name, options in layers.items()}
    used = sum(one.size for one in chosen.values())
    if used > budget:
        raise SchemeError(
            f"a budget of {budget} bytes cannot be met: the smallest scheme of every layer takes {used}; give that "
            "much, or larger groups"
        )
    return chosen


def _hull(options: Sequence[Figures], first: Figures) -> list[tuple[float, Figures]]:
    """Steps from `first` on, each with the squared error it takes off a byte; gains fall from step to step."""
    steps: list[tuple[float, Figures]] = []
    here = first
    while True:
        better = [one for one in options if one.size > here.size and one.error < here.error]
        if not better:
            return steps
        gains = [((here.error**2 - one.error**2) / (one.size - here.size), one) for one in better]
        gain, here = max(gains, key=lambda pair: pair[0])
        steps.append((gain, here))
