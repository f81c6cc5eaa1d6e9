"""What an operation that left its tolerance most likely suffers from, and what to do about it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fluxkiln.compile.onnx.values import LoweredValue, Operation
    from fluxkiln.verify.debug.bisect import Finding

# operations between a range reduction and its sinusoid
_NEAR = 8
_FORGET = "forget the mould (`fluxkiln cache gc --results`)"
_NORMS = ("LayerNormalization", "RMSNormalization", "GroupNormalization", "InstanceNormalization")
_LOWERED_NORMS = ("tpu.LayerNorm", "tpu.RMSNorm", "tpu.GroupNorm", "tpu.InstanceNorm")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "FusedMatMul", "MatMulNBits")


@dataclass(frozen=True, slots=True)
class Remedy:
    """`cause`: what the errors look like. `advice`: what to do. `through`: the sinusoids that are lost, if any."""

    cause: str
    advice: str
    through: tuple[str, ...] = ()


def find_remedy(
    rung: str,
    finding: Finding,
    operation: Operation,
    operations: Sequence[Operation],
    lowered: LoweredValue | None,
    scheme: str,
) -> Remedy:
    """The likely cause and its remedy.

    Args:
        operation: that makes the first value out of tolerance, among the `operations` of the template.
        lowered: what it became, in a lowered graph.
        scheme: without its group size.
    """
    sinusoids = _sinusoids_after(operation, operations)
    if finding.missed == "drift" and sinusoids:
        return Remedy(
            f"the operation is right in itself but loses its operands: it reduces the argument of the sinusoid, and "
            f"{scheme} does not hold a large argument to a fraction of a turn",
            "keep Sin, Cos and all that feeds them in F32 through the quantize table "
            "(f32_table, CompileJob.keep_f32), or give this kind the scheme F32",
            sinusoids,
        )
    if finding.missed == "epsilon" or _is_norm(operation, lowered):
        return _norm(finding, operation, lowered)
    if finding.missed == "finite":
        return Remedy(
            "NaN or infinity that the float32 arithmetic has not",
            "look at the ranges above: a number beyond the type, or a division by 0; keep this operation in F32",
        )
    if finding.missed == "drift":
        return Remedy(
            "the operation is right in itself but amplifies what its operands lost before it",
            "keep it and what feeds it in F32 through the quantize table, or give this kind another scheme than "
            f"{scheme}",
        )
    if rung == "dequantized":
        return Remedy(
            "the scheme stores these weights too coarsely: outliers take the range of their group",
            "give this kind another scheme (W8BF16, a smaller group, or BF16): --scheme NAME,KIND=NAME",
        )
    if _is_product(operation, operations):
        return _product(finding, rung)
    return Remedy(
        "the operation computes something else than the template's",
        "compare the patch, the converter and the compiler's version for this operation: `fluxkiln doctor`, "
        "`fluxkiln patches`",
    )


def find_split_remedy(
    rung: str,
    finding: Finding,
    operation: Operation,
    operations: Sequence[Operation],
    wrong: Mapping[str, Mapping[int, float]],
    on_every_rank: bool = False,
) -> Remedy:
    """The likely cause and its remedy in a part that is cut over ranks.

    Args:
        operation: that makes the first value out of tolerance, among the `operations` of the module.
        wrong: of its slots those whose shards are not the checkpoint's: rank -> share of elements.
        on_every_rank: the error is the bias, once too often for every further rank.
    """
    place = _place(operation, operations)
    if wrong:
        said = "; ".join(
            f"{slot} on rank {', '.join(map(str, ranks))}: a share of {max(ranks.values()):.2g} of the elements"
            for slot, ranks in wrong.items()
        )
        return Remedy(
            f"{said} is not what the checkpoint cut anew has",
            "check the bundle (`fluxkiln verify`), then build it again",
        )
    if on_every_rank:
        return Remedy(
            f"every rank adds the bias, so the sum has it once for each of them{place}",
            "add it after the reduction: fluxkiln/patches/flux1/parallel_transformer.py",
        )
    if rung == "split":
        return Remedy(
            f"in float32 the ranks together make something else than diffusers' module{place}: it is cut, put "
            "together or lowered wrongly",
            "compare the table of cuts and the module (flux1/cuts.py, flux1/parallel*.py) with "
            "upstream: `fluxkiln patches`; lower it again with the pinned jax (`fluxkiln doctor`)",
        )
    if finding.missed == "finite":
        return Remedy(
            f"NaN or infinity that the float32 arithmetic has not{place}",
            "look at the ranges above: a number beyond the type, or a division by 0; compute it in float32 in "
            "fluxkiln/patches/flux1/parallel_transformer.py",
        )
    if finding.missed == "drift":
        return Remedy(
            f"the operation is right in itself{place} but amplifies what bfloat16 lost before it",
            "compute what feeds it in float32, as norms and softmax are: flux1/parallel_transformer.py, FLOAT32_INPUTS "
            "in parallel.py",
        )
    if rung == "unsplit":
        return Remedy(
            f"bfloat16 is too coarse for it{place}",
            "compute it in float32: fluxkiln/patches/flux1/parallel_transformer.py, FLOAT32_INPUTS in parallel.py",
        )
    return Remedy(
        f"with the checkpoint's weights the ranks make something else of these operands than float32 does{place}",
        "compare the collectives of the module with the part's (fluxkiln/patches/parallel*.py), and the rung unsplit",
    )


def _place(operation: Operation, operations: Sequence[Operation]) -> str:
    """Behind which weights an operation without any of its own is."""
    makers = {one.output: one for one in operations}
    slots: dict[str, None] = dict.fromkeys(operation.slots)
    pending = [] if slots else list(operation.inputs)
    seen = set(pending)
    while pending:
        maker = makers.get(pending.pop())
        if maker is None:
            continue
        slots |= dict.fromkeys(maker.slots)
        more = [] if maker.slots else [name for name in maker.inputs if name not in seen]
        seen |= set(more)
        pending += more
    return "" if operation.slots or not slots else f" (behind {', '.join(slots)})"


def _product(finding: Finding, rung: str) -> Remedy:
    few = 0 < finding.bad_channels <= max(1, finding.all_channels // 8)
    if few and rung != "onnxruntime":
        return Remedy(
            f"{finding.bad_channels} of {finding.all_channels} channels are off and the others are not: a scale, zero "
            "point or bias of theirs is not the one that belongs there",
            f"the rung `stored` of the report reads the weights back; {_FORGET} and build again with --prove",
        )
    return Remedy(
        f"{finding.bad_channels} of {finding.all_channels} channels are off: a weight or bias in another's place, "
        "transposed, or cut otherwise",
        "compare the weights named above with the checkpoint's tensors, and what a binding does to them: "
        "fluxkiln/export/bindings.py",
    )


def _norm(finding: Finding, operation: Operation, lowered: LoweredValue | None) -> Remedy:
    wanted = operation.epsilon
    has = lowered.epsilon if lowered is not None else None
    if wanted is not None and has is not None and abs(has - wanted) > 1e-3 * wanted:
        return Remedy(
            f"its epsilon is {has:g}, the template has {wanted:g}",
            f"the lowered graph is not this template's: {_FORGET} and compile again",
        )
    shown = f" (it is {has if has is not None else wanted:g})" if (has or wanted) else ""
    return Remedy(
        f"the norm is not the template's: its epsilon{shown} or its weight",
        "compare epsilon and norm weight with the model's config; compile the kind again, or keep the norm in F32",
    )


def _is_norm(operation: Operation, lowered: LoweredValue | None) -> bool:
    return operation.op_type in _NORMS or (lowered is not None and lowered.operation in _LOWERED_NORMS)


def _is_product(operation: Operation, operations: Sequence[Operation]) -> bool:
    """Whether it multiplies with a weight, or adds the bias to what does."""
    makers = {one.output: one for one in operations}
    makes = [operation, *(makers[name] for name in operation.inputs if name in makers)]
    return any(one.op_type in _PRODUCTS for one in makes) and any(one.slots for one in makes)


def _sinusoids_after(operation: Operation, operations: Sequence[Operation]) -> tuple[str, ...]:
    """The values of the sinusoids that what this operation makes soon ends in, or its own."""
    reached, found = {operation.output}, []
    place = next(index for index, one in enumerate(operations) if one is operation)
    for one in operations[place : place + 1 + _NEAR]:
        if one is operation or reached & set(one.inputs):
            if one.op_type in ("Sin", "Cos"):
                found.append(one.output)
            elif one is operation or one.op_type in ("Sub", "Mul", "Round", "Add", "Unsqueeze", "Cast", "Div", "Floor"):
                reached.add(one.output)
    return tuple(found)
