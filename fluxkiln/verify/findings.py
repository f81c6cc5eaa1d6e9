"""What is found inside a part, rung by rung, and what to do about it, in words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.types import Shapes

if TYPE_CHECKING:
    from numpy.typing import NDArray

Values = Mapping[str, "NDArray[Any]"]


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call of a part in the reference run.

    Attributes:
        inputs: by the names of its kind, filled up where the kind takes rows; outputs: what it made of them.
        shapes: of the recording. bundle: the folder of the build's own, which need not be there.
    """

    inputs: Values
    outputs: Values
    shapes: Shapes
    bundle: Path


# makes the reference run, or reads it
Record = Callable[[], RecordedCall]


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of a graph.

    Attributes:
        output: the value it makes; its first, where it makes several.
        inputs: the values and graph inputs it reads; slots: the weights it reads; epsilon: of a norm, else None.
    """

    output: str
    op_type: str
    inputs: tuple[str, ...] = ()
    slots: tuple[str, ...] = ()
    epsilon: float | None = None


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds on relative L2 (`own`, `drift`) and on the worst channel of the own error; see `metrics.Metrics`."""

    own: float
    channel: float
    drift: float


@dataclass(frozen=True, slots=True)
class Finding:
    """One value at one rung.

    Attributes:
        own, channel, drift: relative L2 of the own error, its worst channel, relative L2 of the whole error.
        missed: the first bound that does not hold, '' when all do: `own`, `channel`, `drift`, `finite`, `epsilon`.
        channels: those whose own error is beyond the bound, the worst first, at most MOST_NAMED of `bad_channels`.
        rank: of a part that runs on several cores, the one where it is worst; else -1.
    """

    value: str
    own: float
    channel: float
    drift: float
    missed: str = ""
    channels: tuple[int, ...] = ()
    bad_channels: int = 0
    all_channels: int = 0
    rank: int = -1


@dataclass(frozen=True, slots=True)
class Range:
    """What a value is made of: extremes, root mean square, and the smallest size that is not 0."""

    low: float
    high: float
    rms: float
    smallest: float
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Remedy:
    """`cause`: what the errors look like. `advice`: what to do. `through`: the sinusoids that are lost, if any."""

    cause: str
    advice: str
    through: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Culprit:
    """The first operation that leaves its tolerance.

    Attributes:
        operation: its type in the template; lowered: what it became in the compiled form, '' elsewhere.
        inputs: value -> its range at this rung. output: the range of what it makes.
    """

    rung: str
    finding: Finding
    operation: str
    lowered: str
    slots: tuple[str, ...]
    inputs: Mapping[str, Range]
    output: Range
    remedy: Remedy


@dataclass(frozen=True, slots=True)
class RungFindings:
    """What was found at one rung, compared with the rung `against`; `culprit` is None where nothing is out."""

    rung: str
    against: str
    findings: tuple[Finding, ...]
    culprit: Culprit | None = None

    @property
    def noisiest(self) -> Finding | None:
        """The value with the largest error of its own."""
        return max(self.findings, key=lambda finding: finding.own, default=None)


@dataclass(frozen=True, slots=True)
class PartFindings:
    """What was found in a part, from its lowest rung up; `facts` on what it was executed on, or not."""

    rungs: tuple[RungFindings, ...]
    facts: Mapping[str, str] = field(default_factory=dict)


BUILD_AGAIN = "check the bundle (`fluxkiln verify`), then build it again"
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


def epsilons_differ(has: float | None, wanted: float | None) -> bool:
    """Whether a norm's epsilon is not the one it should be; what is not known does not differ."""
    return has is not None and wanted is not None and abs(has - wanted) > 1e-3 * wanted


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
        form: what it became, in a compiled form. scheme: without its group size.
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
