"""A model's parts at several sizes: one for all sizes at which it takes the same inputs, and so is the same graph.

A further size is more parts, whose weights are those of the first size's. They are called after the first size that
takes them: `double.00@768x1344-512`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fluxkiln.patches.model import Model
from fluxkiln.types import SIZE_MARK, Configs, Part, Shapes, TensorSpec


def parts_at_sizes(
    model: Model, configs: Configs, parts: tuple[Part, ...], sizes: Sequence[Shapes]
) -> tuple[Part, ...]:
    """The parts of one size -> those of all, which the first has first; the same where there is but one."""
    if len(sizes) == 1:
        return parts
    made: dict[Shapes, list[Part]] = {shapes: [] for shapes in sizes}
    for part in parts:
        alike: dict[tuple[TensorSpec, ...], list[Shapes]] = {}
        for shapes in sizes:
            alike.setdefault(model.part_inputs(part.kind, configs, shapes), []).append(shapes)
        for members in alike.values():
            first = members[0]
            name = part.name if first == sizes[0] else f"{part.name}{SIZE_MARK}{first.label}"
            made[first].append(replace(part, name=name, sizes=tuple(members)))
    return tuple(part for shapes in sizes for part in made[shapes])


def parts_of_size(parts: tuple[Part, ...], shapes: Shapes) -> tuple[Part, ...]:
    """Those that an image of this size takes, in the order they run; all of a build of one size."""
    order = {part.name: place for place, part in enumerate(parts)}
    chosen = (part for part in parts if not part.sizes or shapes in part.sizes)
    return tuple(sorted(chosen, key=lambda part: order[part.base]))


def as_alone(part: Part) -> Part:
    """The part as a build of its size alone has it."""
    return replace(part, name=part.base, sizes=())
