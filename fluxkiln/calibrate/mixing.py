"""Which weights of a kind stay as they are within a budget: the same ones in all its blocks, as one mould holds them.

The choice is a text that `fluxkiln build --scheme` takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.recipes import choose

# what the blocks of a stack are called as a kind
STACK_KINDS: Mapping[str, str] = {
    "transformer_blocks": "double",
    "single_transformer_blocks": "single",
    "encoder.block": "t5_block",
}


def slot_of(layer: str) -> tuple[str, str]:
    """Kind and name within the part of a layer of a block: `single`, `attn.to_q`."""
    stack = next(stack for stack in STACK_KINDS if layer.startswith(f"{stack}."))
    _, _, slot = layer.removeprefix(f"{stack}.").partition(".")
    return STACK_KINDS[stack], slot.removesuffix(".weight")


def choose_slots(
    figures: Mapping[str, Mapping[str, Figures]], coded: str, plain: str, budget: int
) -> tuple[dict[str, Figures], str]:
    """For each slot of each kind one of two schemes, so that all layers fit the budget.

    Squared errors are added up over the blocks of a kind, relative to each layer's own output (or weight, without
    calibration), as in `recipes.choose`.

    Args:
        figures: layer -> scheme -> its figures, `coded` and `plain` among them.
        coded: the scheme of the blocks; plain: of the slots that it leaves out.

    Returns:
        The figures chosen for each layer, and the scheme of a build.

    Raises:
        SchemeError: even with everything in codes the budget cannot be met.
    """
    slots: dict[tuple[str, str], list[str]] = {}
    for layer in figures:
        slots.setdefault(slot_of(layer), []).append(layer)
    options = {
        f"{kind}.{slot}": [add_up(figures[layer][scheme] for layer in layers) for scheme in (coded, plain)]
        for (kind, slot), layers in slots.items()
    }
    found = {name: one.scheme for name, one in choose(options, budget).items()}
    chosen = {
        layer: figures[layer][found[f"{kind}.{slot}"]] for (kind, slot), layers in slots.items() for layer in layers
    }
    return {layer: chosen[layer] for layer in figures}, scheme_text(found, coded, plain)


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
    return ",".join([coded, *(f"{piece}={plain}" for piece in pieces)])
