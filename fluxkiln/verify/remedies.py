"""What an operation that left its tolerance most likely suffers from, and what to do about it, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fluxkiln.verify.findings import Finding, Operation, Remedy
from fluxkiln.verify.judgement import BUILD_AGAIN, epsilons_differ

# operations between a range reduction and its sinusoid
_NEAR = 8
_PRODUCTS = ("MatMul", "Gemm", "Conv", "FusedMatMul", "MatMulNBits")


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do by a toolchain's own means.

    Attributes:
        keep_sinusoids, keep: how sinusoids, or an operation and what feeds it, stay in F32 there, before what else one
            can do; empty where nothing is computed in less.
        rebuild: what to do about a scale or a bias that is not the one that belongs there.
        recompile: about a compiled form that is not this template's.
    """

    keep_sinusoids: str = ""
    keep: str = ""
    rebuild: str = BUILD_AGAIN
    recompile: str = "compile it again"


COMMON_ADVICE = Advice()


def find_remedy(
    rung: str,
    finding: Finding,
    operation: Operation,
    operations: Sequence[Operation],
    form: Operation | None,
    scheme: str,
    advice: Advice,
) -> Remedy:
    """The likely cause and its remedy.

    Args:
        operation: that makes the first value out of tolerance, among the `operations` of the template.
        form: what it became, in a compiled form.
        scheme: without its group size.
    """
    sinusoids = _sinusoids_after(operation, operations)
    if finding.missed == "drift" and sinusoids:
        return Remedy(
            f"the operation is right in itself but loses its operands: it reduces the argument of the sinusoid, and "
            f"{scheme} does not hold a large argument to a fraction of a turn",
            f"{advice.keep_sinusoids}give this kind the scheme F32",
            sinusoids,
        )
    if finding.missed == "epsilon" or "Norm" in operation.op_type or (form is not None and "Norm" in form.op_type):
        return _norm(operation, form, advice)
    found = find_loss(
        finding, "", "its operands", "keep this operation in F32",
        f"{advice.keep}give this kind another scheme than {scheme}",
    )  # fmt: skip
    if found is not None:
        return found
    if rung == "dequantized":
        return Remedy(
            "the scheme stores these weights too coarsely: outliers take the range of their group",
            "give this kind another scheme (W8BF16, a smaller group, or BF16): --scheme NAME,KIND=NAME",
        )
    if _is_product(operation, operations):
        return _product(finding, rung, advice)
    return Remedy(
        "the operation computes something else than the template's",
        "compare the patch, the converter and the compiler's version for this operation: `fluxkiln doctor`, "
        "`fluxkiln patches`",
    )


def find_loss(finding: Finding, place: str, lost: str, widen: str, advice: str) -> Remedy | None:
    """The remedy of a value that is not finite, or that is right in itself and far off; None for any other.

    Args:
        place: where the operation is, behind a blank; lost: what lost something before it.
        widen: what keeps the operation in float32; advice: what to do about the loss.
    """
    if finding.missed == "finite":
        return Remedy(
            f"NaN or infinity that the float32 arithmetic has not{place}",
            f"look at the ranges above: a number beyond the type, or a division by 0; {widen}",
        )
    if finding.missed == "drift":
        return Remedy(f"the operation is right in itself{place} but amplifies what {lost} lost before it", advice)
    return None


def _product(finding: Finding, rung: str, advice: Advice) -> Remedy:
    few = 0 < finding.bad_channels <= max(1, finding.all_channels // 8)
    if few and rung != "onnxruntime":
        return Remedy(
            f"{finding.bad_channels} of {finding.all_channels} channels are off and the others are not: a scale, zero "
            "point or bias of theirs is not the one that belongs there",
            advice.rebuild,
        )
    return Remedy(
        f"{finding.bad_channels} of {finding.all_channels} channels are off: a weight or bias in another's place, "
        "transposed, or cut otherwise",
        "compare the weights named above with the checkpoint's tensors, and what a binding does to them: "
        "fluxkiln/export/bindings.py",
    )


def _norm(operation: Operation, form: Operation | None, advice: Advice) -> Remedy:
    wanted = operation.epsilon
    has = form.epsilon if form is not None else None
    if epsilons_differ(has, wanted):
        return Remedy(
            f"its epsilon is {has:g}, the template has {wanted:g}",
            f"the lowered graph is not this template's: {advice.recompile}",
        )
    shown = f" (it is {has if has is not None else wanted:g})" if (has or wanted) else ""
    return Remedy(
        f"the norm is not the template's: its epsilon{shown} or its weight",
        "compare epsilon and norm weight with the model's config; compile the kind again, or keep the norm in F32",
    )


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
