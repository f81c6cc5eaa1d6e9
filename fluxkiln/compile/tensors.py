"""The checkpoint tensors of a part by their names alone: which of them its scheme quantizes, and what they take."""

from __future__ import annotations

import math
from dataclasses import replace

from fluxkiln.compile.plan import Plan
from fluxkiln.errors import SchemeError
from fluxkiln.export.bindings import holds_tensor
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.quantize.schemes import (
    Scheme,
    check_groups,
    form_group,
    parse_scheme,
    stored_size,
    weight_name,
    with_exceptions,
)
from fluxkiln.types import Part, Shapes, TensorRef


def part_refs(checkpoint: Checkpoint, plan: Plan, part: Part) -> list[TensorRef]:
    """The checkpoint tensors of a part, by their names alone."""
    refs, traits = checkpoint.tensors[part.folder], part.traits
    if part.members:
        return [ref for name, ref in refs.items() if holds_tensor(checkpoint.model, part, name)]
    own, without = (tuple(part.prefix + name for name in names) for names in (traits.own, traits.without))
    return [ref for name, ref in refs.items() if name.startswith(own) and not name.startswith(without)]


def quantizable(checkpoint: Checkpoint, plan: Plan, part: Part) -> dict[str, TensorRef]:
    """Name within the part -> tensor, of the matrices that a scheme with weight bits quantizes if it keeps none."""
    refs = part_refs(checkpoint, plan, part)
    return {
        ref.name.removeprefix(part.prefix): ref
        for ref in refs
        if len(ref.shape) == 2 and not ref.name.endswith(part.traits.tables)
    }


def settle_kept(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan with each kind's scheme without patterns that are for another kind of its block (the modulation, say).

    A kind that keeps all its matrices is not quantized at all.

    Raises:
        SchemeError: a pattern matches no weight of the kinds that it was given for.
    """
    schemes = dict(plan.schemes)
    matrices = {
        part.kind: list(quantizable(checkpoint, plan, part)) for part in reversed(plan.parts) if plan.scheme(part).kept
    }
    unmatched: dict[tuple[tuple[str, ...], str], bool] = {}
    for kind, names in matrices.items():
        scheme = plan.schemes[kind]
        used = [one for one in scheme.kept if any(replace(scheme, kept=(one,)).keeps(name) for name in names)]
        for one in scheme.kept:
            key = (form_group(checkpoint.model.kinds, kind), one)
            unmatched[key] = unmatched.get(key, True) and one not in used
        schemes[kind] = replace(scheme, kept=tuple(used))
        if all(schemes[kind].keeps(name) for name in names):
            schemes[kind] = parse_scheme(scheme.arithmetic)
    for (kinds, pattern), missing in unmatched.items():
        if missing:
            there = dict.fromkeys(name.removesuffix(".weight") for kind in kinds for name in matrices.get(kind, ()))
            raise SchemeError(f"no weight of {kinds[0]} is called {pattern!r}; there are {', '.join(there)}")
    return replace(plan, schemes=schemes)


def check_weights(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise SchemeError when a weight cannot be in the codes that its scheme asks for.

    Its groups do not divide its input channels, or the target's compiler does not take its output channels.
    """
    refused: dict[str, tuple[TensorRef, str]] = {}
    grouped: list[tuple[Scheme, TensorRef]] = []
    for part in plan.parts:
        scheme = plan.scheme(part)
        for name, ref in quantizable(checkpoint, plan, part).items() if scheme.weight_bits else ():
            if not scheme.keeps(name):
                grouped.append((scheme, ref))
                if not plan.target.takes_codes(ref.shape[0]):
                    refused.setdefault(f"{part.traits.block}.{weight_name(name)}", (ref, scheme.arithmetic))
    if refused:
        (first, plain), lanes = next(iter(refused.values())), plan.target.lanes
        fewer = f" or fewer than {lanes}" * plan.target.partial_lanes
        raise SchemeError(
            f"{first.name} has {first.shape[0]} output channels; {plan.target.name} takes codes of a weight with a "
            f"multiple of {lanes}{fewer}, whatever its groups: ask for {plain}, or leave such weights out of the "
            f"codes, --scheme '{with_exceptions('SCHEME', refused, plain)}'"
        )
    # last: no other group size helps where the output channels do not fit
    for scheme, ref in grouped:
        check_groups(scheme, ref.name, ref.shape[1])


def stored_forms(checkpoint: Checkpoint, plan: Plan, folder: str) -> dict[str, str]:
    """Tensor of a folder of the checkpoint -> how its part stores it: a format, or the arithmetic of its scheme.

    What no part has, the half of a VAE that reads images say, is stored as the first part stores what it does not pack.
    """
    parts = [part for part in plan.parts if part.folder == folder]
    found = dict.fromkeys(checkpoint.tensors[folder], str(plan.scheme(parts[0]).arithmetic))
    for part in parts:
        scheme, matrices = plan.scheme(part), quantizable(checkpoint, plan, part)
        for ref in part_refs(checkpoint, plan, part):
            name = ref.name.removeprefix(part.prefix)
            packed = name in matrices and scheme.in_codes(name)
            found[ref.name] = scheme.form if packed else scheme.arithmetic
    return found


def part_bytes(checkpoint: Checkpoint, plan: Plan, part: Part) -> int:
    """Bytes of a part's weights in a binary: quantized matrices with all that is beside their codes, and the others."""
    scheme, refs = plan.scheme(part), part_refs(checkpoint, plan, part)
    quantized = {ref.name for name, ref in quantizable(checkpoint, plan, part).items() if scheme.in_codes(name)}
    plain = 4 if scheme.arithmetic == "F32" else 2
    return sum(
        stored_size((ref.shape[0], ref.shape[1]), scheme) if ref.name in quantized else plain * math.prod(ref.shape)
        for ref in refs
    )


def search_memory(checkpoint: Checkpoint, plan: Plan, part: Part) -> int:
    """Bytes that the search for what stands beside the codes takes: a few copies of the largest weight in float32."""
    if plan.scheme(part).codes_only:
        return 0
    return 20 * max((math.prod(ref.shape) for ref in quantizable(checkpoint, plan, part).values()), default=0)


def stored_bytes(scheme: Scheme, weights: int) -> int:
    """About the bytes of so many weights."""
    return math.ceil(weights * scheme.bytes_per_weight)


def part_cost(checkpoint: Checkpoint, plan: Plan, part: Part) -> float:
    """About how many multiplications one run of a part takes; as `multiplications`."""
    use = checkpoint.model.weight_uses(plan.shapes).get(part.component)
    refs = [ref for ref in part_refs(checkpoint, plan, part) if len(ref.shape) in (2, 4)]
    if use is None:
        return 1.0 + sum(math.prod(ref.shape) for ref in refs)
    return 1.0 + use.times * sum(math.prod(ref.shape) for ref in refs if not ref.name.startswith(use.idle))


def multiplications(checkpoint: Checkpoint, shapes: Shapes) -> float:
    """About how many multiplications the costliest component takes: every weight of a block once for every token.

    Of the transformer one step. A decoder's convolutions run at up to 8 times the width and height of the latents.
    """
    counts = [0.0]
    for component, use in checkpoint.model.weight_uses(shapes).items():
        refs = checkpoint.tensors.get(component, {}).items()
        matrices = (ref for name, ref in refs if len(ref.shape) in (2, 4) and not name.startswith(use.idle))
        counts.append(use.times * sum(math.prod(ref.shape) for ref in matrices))
    return max(counts)
