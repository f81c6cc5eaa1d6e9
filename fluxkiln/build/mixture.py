"""Which weights of a kind stay as they are within a budget: the same ones in all its blocks, as one mould holds them.

The choice is a text that `fluxkiln build --scheme` takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.recipes import Stacks, choose_exactly
from fluxkiln.quantize.schemes import with_exceptions


@dataclass(frozen=True, slots=True)
class SlotChoice:
    """One slot of all blocks of a kind.

    Attributes:
        error: what its codes do to what a block of the kind adds, relative L2 (`sensitivity.slot_errors`).
        coded, plain: bytes in all blocks, in codes and as it is; weights: how many of them.
        scheme: what was chosen.
    """

    kind: str
    slot: str
    error: float
    coded: int
    plain: int
    weights: int
    scheme: str
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """The choice as plain JSON; `bytes_kept` is what leaving it as it is costs, or would cost."""
        return {
            "kind": self.kind,
            "slot": self.slot,
            "bits": round(8 * (self.plain if self.kept else self.coded) / self.weights, 4),
            "bits_in_codes": round(8 * self.coded / self.weights, 4),
            "size": self.plain if self.kept else self.coded,
            "bytes_kept": self.plain - self.coded,
            "sensitivity": self.error,
            "chosen": self.scheme,
        }


@dataclass(frozen=True, slots=True)
class Mix:
    """Slots chosen per kind, and whether the errors they were chosen by foretold the block's.

    Attributes:
        scheme: what a build takes.
        blocks: kind -> the blocks that were run.
        measured: kind -> the error of what these blocks add, with all that was chosen at once.
        seconds: of all runs.
    """

    scheme: str
    slots: tuple[SlotChoice, ...]
    blocks: Mapping[str, tuple[str, ...]]
    measured: Mapping[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The mix as plain JSON."""
        predicted, all_coded = predicted_errors(self.slots), predicted_errors(self.slots, all_coded=True)
        return {
            "seconds": round(self.seconds, 3),
            "slots": [one.to_json() for one in self.slots],
            "kinds": [
                {
                    "kind": kind,
                    "blocks": list(self.blocks[kind]),
                    "predicted_error_all_in_codes": all_coded[kind],
                    "predicted_error": predicted[kind],
                    "measured_error": error,
                }
                for kind, error in self.measured.items()
            ],
        }


def choose_slots(
    figures: Mapping[str, Mapping[str, Figures]],
    coded: str,
    plain: str,
    budget: int,
    stacks: Stacks,
    errors: Mapping[str, float] | None = None,
) -> tuple[dict[str, Figures], str, tuple[SlotChoice, ...]]:
    """For each slot of each kind one of two schemes, so that all layers fit the budget.

    Squared errors are added up over the blocks of a kind; no other choice within the budget has less of them.

    Args:
        figures: layer -> scheme -> its figures, `coded` and `plain` among them.
        coded: the scheme of the blocks; plain: of the slots that it leaves out.
        errors: KIND.SLOT -> what its codes do to a block. Without it the errors are those of each layer's own output
            (or weight, without calibration), which say less.

    Returns:
        The figures chosen for each layer, the scheme of a build, and every slot.

    Raises:
        SchemeError: even with everything in codes the budget cannot be met.
    """
    slots: dict[str, list[str]] = {}
    for layer in figures:
        slots.setdefault(".".join(stacks.slot_of(layer)), []).append(layer)
    options: dict[str, list[Figures]] = {}
    for name, layers in slots.items():
        options[name] = [add_up(figures[layer][scheme] for layer in layers) for scheme in (coded, plain)]
        if errors is not None:
            inside = (errors[name] * math.sqrt(len(layers)), 0.0)
            options[name] = [replace(one, output_error=e) for one, e in zip(options[name], inside, strict=True)]
    found = {name: one.scheme for name, one in choose_exactly(options, budget).items()}
    chosen = {layer: figures[layer][found[name]] for name, layers in slots.items() for layer in layers}
    table = []
    for name, (small, large) in options.items():
        kind, _, slot = name.partition(".")
        error = small.error / math.sqrt(len(slots[name]))
        kept = found[name] == plain
        table.append(SlotChoice(kind, slot, error, small.size, large.size, small.weights, found[name], kept))
    return {layer: chosen[layer] for layer in figures}, scheme_text(found, coded, plain), tuple(table)


def predicted_errors(slots: Iterable[SlotChoice], all_coded: bool = False) -> dict[str, float]:
    """Kind -> the root of the summed squared errors of its slots in codes: the error of a block, were they independent.

    Args:
        all_coded: as if none had been left out.
    """
    squares: dict[str, float] = {}
    for one in slots:
        squares[one.kind] = squares.get(one.kind, 0.0) + (0.0 if one.kept and not all_coded else one.error**2)
    return {kind: math.sqrt(total) for kind, total in squares.items()}


def add_up(figures: Iterable[Figures]) -> Figures:
    """One slot of all blocks: bytes and squared errors are added up, and the error is the root of their sum."""
    every = list(figures)
    return Figures(
        every[0].scheme,
        math.sqrt(sum(one.weight_error**2 for one in every)),
        math.sqrt(sum(one.output_error**2 for one in every)),
        sum(one.size for one in every),
        sum(one.weights for one in every),
        sum(one.seconds for one in every),
        sum(one.one_signed for one in every),
        sum(one.empty for one in every),
    )


def scheme_text(chosen: Mapping[str, str], coded: str, plain: str) -> str:
    """`W4BF16-gptq,single.proj_out=BF16`, from KIND.SLOT -> scheme; `KIND.*` where none of a kind is in codes."""
    kinds: dict[str, list[str]] = {}
    for name in chosen:
        kinds.setdefault(name.partition(".")[0], []).append(name)
    pieces: list[str] = []
    for kind, names in kinds.items():
        kept: Sequence[str] = [name for name in names if chosen[name] == plain]
        pieces += [f"{kind}.*"] if len(kept) == len(names) else kept
    return with_exceptions(coded, pieces, plain)
