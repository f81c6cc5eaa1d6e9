"""The gates of the parity ladder: one table, and how rows are judged by it.

The table is read from the top: for each metric and each side of the comparison the first gate that matches a row is
the one that counts, so exceptions stand above the rule they except. Every other gate that matches counts as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal

from fluxkiln.patches.flux1.kinds import KINDS, SPLIT_KINDS
from fluxkiln.verify.metrics import Metrics

if TYPE_CHECKING:
    from fluxkiln.verify.ladder import Row

Against = Literal["reference", "previous"]

PIPELINE = "pipeline"


@dataclass(frozen=True, slots=True)
class Rung:
    """One step of the ladder. `suspect` is what to look at when this rung is the first bad one."""

    name: str
    meaning: str
    suspect: str


RUNGS: tuple[Rung, ...] = (
    Rung("reference", "diffusers as published, float32",
         "the recorded run itself: its weights or inputs"),
    Rung("patched", "diffusers with the export patches, float32",
         "a patch that changes the arithmetic"),
    Rung("onnxruntime", "the exported template with its weights bound, float32",
         "the export, or a weight bound to the wrong slot"),
    Rung("dequantized", "weights as the scheme stores them, float32 arithmetic",
         "quantization: a scale, a zero point, or the scheme itself"),
    Rung("executed", "the bundle's own graphs, run by the target's runtime",
         "linking: a quantized weight, scale or zero point in the wrong place of the bundle"),
    Rung("split", "the lowered modules of all ranks in float32, executed by XLA on the CPU",
         "splitting or lowering: a weight cut or bound wrongly, a reduction, a gather, or one operator"),
    Rung("unsplit", "the lowered modules on one rank in bfloat16, executed by XLA on the CPU",
         "what bfloat16 costs this model, split or not"),
    Rung("replicas", "the bundle's modules and shards, all ranks executed by XLA on the CPU",
         "a shard, or what bfloat16 loses between the ranks"),
    Rung("interpreter", "the compiler's lowered graph, interpreted",
         "lowering: the precision of activations, or one operator"),
    Rung("stored", "the weights in the binary, byte by byte",
         "casting: a code, scale or zero point that is not the one this scheme makes of this weight"),
    Rung("simulator", "the compiled binary on the chip's simulator",
         "code generation, or coefficients cast into the wrong place"),
)  # fmt: skip
RUNG_ORDER = {rung.name: i for i, rung in enumerate(RUNGS)}

HIGHER_IS_BETTER = frozenset({"cosine", "delta_cosine", "psnr", "ssim", "finite", "covered"})


@dataclass(frozen=True, slots=True)
class Gate:
    """One bound. `rung`, `scheme`, `kind` and `output` are shell patterns, alternatives separated by `|`.

    `metric` is a field of Metrics, or `covered` (see `judge_row`). The value must be at least `bound` for the metrics
    in HIGHER_IS_BETTER and at most `bound` for the others; NaN passes neither. `proposed`: a bound reasoned about but
    not required; measurement may move it either way. Every other bound may be tightened, never loosened.
    """

    rung: str
    scheme: str
    kind: str
    output: str
    metric: str
    bound: float
    against: Against
    reason: str
    proposed: bool = False

    def matches(self, row: Row) -> bool:
        fields = ((self.rung, row.rung), (self.scheme, row.scheme), (self.kind, row.kind), (self.output, row.output))
        return all(any(fnmatchcase(value, one) for one in pattern.split("|")) for pattern, value in fields)

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.metric in HIGHER_IS_BETTER else value <= self.bound

    def excess(self, value: float) -> float:
        """How much of the allowance `value` uses: 1 is exactly the bound, more is a miss, infinite if not finite.

        For cosine and SSIM the allowance is the distance from 1; for PSNR it is the amplitude of the error.
        """
        if math.isnan(value):
            return math.inf
        if self.metric == "psnr":
            return float(10.0 ** ((self.bound - value) / 20.0))
        if self.metric in HIGHER_IS_BETTER:
            allowance = 1.0 - self.bound
            return (1.0 - value) / allowance if allowance > 0.0 else (0.0 if value >= self.bound else math.inf)
        if self.bound == 0.0:
            return 0.0 if value == 0.0 else math.inf
        return value / self.bound


@dataclass(frozen=True, slots=True)
class Verdict:
    """One gate applied to one row."""

    part: str
    output: str
    step: int
    rung: str
    scheme: str
    gate: Gate
    value: float
    passed: bool

    @property
    def excess(self) -> float:
        return self.gate.excess(self.value)

    @property
    def claim(self) -> str:
        """For example `delta_cosine 0.973 against reference, must be >= 0.99`."""
        sign = ">=" if self.gate.metric in HIGHER_IS_BETTER else "<="
        return f"{self.gate.metric} {self.value:.6g} against {self.gate.against}, must be {sign} {self.gate.bound:g}"


# Kinds whose output updates a residual stream are judged on the delta; the others on their whole output.
_RESIDUAL = "|".join(name for name, kind in KINDS.items() if kind.residual)
_WHOLE = "|".join(name for name, kind in {**KINDS, **SPLIT_KINDS}.items() if not kind.residual)
_PART = f"{_RESIDUAL}|{_WHOLE}"
_IMAGE_BLOCKS = "double|single|double_modulated|single_modulated"
# What the patterns are called in a report.
GROUP_NAMES = {
    _RESIDUAL: "blocks",
    _WHOLE: "parts without a residual stream",
    _PART: "every part",
    _IMAGE_BLOCKS: "transformer blocks",
    "*": "all",
}
_COMPILED = "interpreter|simulator"
_SCHEMES = "dequantized|executed|interpreter|simulator"

GATES: tuple[Gate, ...] = (
    # Every row.
    Gate("*", "*", "*", "*", "finite", 1.0, "reference", "NaN or infinity anywhere means that nothing was compared"),
    # Rungs that compute in float32 with the checkpoint's own weights.
    Gate("patched", "*", _PART, "*", "relative_l2", 1e-6, "reference",
         "a patch may reorder float32 arithmetic (6e-8 an operation) but must compute the same function"),
    Gate("onnxruntime", "*", _PART, "*", "relative_l2", 5e-6, "reference",
         "other kernels, same float32 arithmetic: fused attention and normalisation sum in another order"),
    # Time embedding, before the BF16 rule that it is the exception to.
    Gate(_SCHEMES, "BF16", "head|time_embed", "temb", "relative_l2", 1e-2, "reference",
         "with its time projection in F32 the embedding keeps 5e-3; in BF16 sin and cos lose their argument: 0.43"),
    # What the scheme does to the weights, and what the compiled arithmetic does on top, against the reference.
    Gate("dequantized", "F32", _PART, "*", "relative_l2", 5e-6, "reference",
         "F32 stores the weights as they are, so this rung is no further away than ONNX Runtime is"),
    Gate("stored", "*", "*", "*", "max_abs", 0.0, "reference",
         "a cast writes the very bytes that the scheme makes of the checkpoint's weights, and no other"),
    Gate("executed", "F32", _PART, "*", "relative_l2", 5e-6, "reference",
         "float32 by ONNX Runtime's kernels, as at its own rung"),
    Gate("executed", "*", _PART, "*", "relative_l2", 2e-3, "previous",
         "the same codes in float32 on both sides; norm weights are rounded to 16 bits before or after the softmax "
         "factor is in them: 5e-4 was measured"),
    Gate("interpreter", "F32", _PART, "*", "relative_l2", 5e-6, "reference",
         "float32 by yet other kernels, which sum in another order, as ONNX Runtime's do"),
    Gate("simulator", "F32", _PART, "*", "relative_l2", 1e-6, "reference",
         "float32 weights and arithmetic on the chip: 5e-8 was measured on a block"),
    Gate(_SCHEMES, "F16", _PART, "*", "relative_l2", 2e-3, "reference",
         "11 significant bits (4.9e-4 a rounding); 3e-4 was measured on a block"),
    Gate(_SCHEMES, "BF16", _PART, "*", "relative_l2", 6e-3, "reference",
         "8 significant bits (3.9e-3 a rounding); 2.4e-3 on the simulator, 3.6e-3 to 4.2e-3 in eager PyTorch"),
    Gate(_SCHEMES, "F32|F16|BF16", _RESIDUAL, "*", "delta_cosine", 0.999, "reference",
         "a block is what it adds; BF16 measured 0.9993, while the whole output flatters it as 0.999997"),
    Gate(_SCHEMES, "W8BF16*", _RESIDUAL, "*", "delta_cosine", 0.998, "reference",
         "8-bit weights err by 1 %, which is below the BF16 noise they are computed in", proposed=True),
    Gate(_SCHEMES, "W8BF16*", _WHOLE, "*", "cosine", 0.998, "reference",
         "without a residual stream the whole output is what the weights compute", proposed=True),
    Gate(_SCHEMES, "W4BF16*", _RESIDUAL, "*", "delta_cosine", 0.99, "reference",
         "4-bit codes err by 9 % a weight (group 64, Gaussian): cosine 0.996 for one matmul, 0.992 for a whole block"),
    Gate(_SCHEMES, "W4BF16*", _WHOLE, "*", "cosine", 0.99, "reference",
         "without a residual stream the whole output is what the weights compute, as the delta is for a block",
         proposed=True),
    # With quantization out of the way: the compiled arithmetic against the rung before it.
    Gate(_COMPILED, "W4BF16*|W8BF16*", _WHOLE, "*", "relative_l2", 6e-3, "previous",
         "the same codes on both sides, so only BF16 arithmetic may differ"),
    Gate(_COMPILED, "W4BF16*|W8BF16*", _RESIDUAL, "*", "delta_cosine", 0.999, "previous",
         "the same codes on both sides, so the delta must agree as well as it does in BF16"),
    Gate(_COMPILED, "BF16|W8BF16*|W4BF16*", _IMAGE_BLOCKS, "*", "worst_channel", 0.2, "previous",
         "a wrong scale or bias moves one channel by its own size, BF16 moves none by more than twice its 4 %",
         proposed=True),
    # Split over ranks.
    Gate("split|replicas", "*", "*", "ranks", "max_abs", 0.0, "reference",
         "every rank holds the same activations after a reduction, to the bit, or they would drift apart"),
    Gate("split", "*", _PART, "*", "relative_l2", 5e-6, "reference",
         "float32 on every rank; partial sums are added in another order than one rank adds them in"),
    Gate("unsplit", "BF16", _PART, "*", "relative_l2", 5e-2, "reference",
         "eager PyTorch in bfloat16 leaves 1e-2 behind T5's and the VAE's many layers; a wrong operator leaves 1",
         proposed=True),
    Gate("replicas", "BF16", _PART, "*", "noise_ratio", 1.25, "previous",
         "two ways to round the same sums lie as far apart as either from the exact sum (8e-3 of 9e-3 was "
         "measured), so what counts is that splitting does not add to it: 1.0 to 1.15 was measured", proposed=True),
    Gate("split", "*", PIPELINE, "latents", "relative_l2", 5e-5, "reference",
         "the per-part 5e-6 adds up over blocks and steps", proposed=True),
    Gate("replicas", "BF16", PIPELINE, "latents", "relative_l2", 6e-2, "reference",
         "ten times what bfloat16 costs one block", proposed=True),
    Gate("replicas", "BF16", PIPELINE, "image", "psnr", 25.0, "reference",
         "the usual limit of a visible difference is about 30 dB; random weights amplify more than trained ones",
         proposed=True),
    # The whole pipeline: errors of all parts over all steps.
    Gate("patched|onnxruntime", "*", PIPELINE, "latents", "relative_l2", 5e-5, "reference",
         "the per-part 5e-6 adds up over blocks and steps", proposed=True),
    Gate("patched|onnxruntime", "*", PIPELINE, "image", "psnr", 60.0, "reference",
         "float32 noise ends below one step of an 8-bit image", proposed=True),
    Gate(_SCHEMES, "F32", PIPELINE, "latents", "relative_l2", 5e-5, "reference",
         "as for ONNX Runtime, the arithmetic is the same", proposed=True),
    Gate(_SCHEMES, "F16", PIPELINE, "latents", "relative_l2", 2e-2, "reference",
         "ten times the bound of one part", proposed=True),
    Gate(_SCHEMES, "BF16", PIPELINE, "latents", "relative_l2", 6e-2, "reference",
         "ten times the bound of one part", proposed=True),
    Gate(_SCHEMES, "W8BF16*|W4BF16*", PIPELINE, "latents", "cosine", 0.99, "reference",
         "4-bit weights left 0.9944 to 0.9962; two neighbouring blocks swapped reach 0.984 at best", proposed=True),
    Gate(_SCHEMES, "F32", PIPELINE, "image", "psnr", 60.0, "reference",
         "float32 noise ends below one step of an 8-bit image", proposed=True),
    Gate(_SCHEMES, "F16|BF16", PIPELINE, "image", "psnr", 25.0, "reference",
         "the usual limit of a visible difference is about 30 dB; random weights amplify more than trained ones",
         proposed=True),
    Gate(_SCHEMES, "W8BF16*|W4BF16*", PIPELINE, "image", "psnr", 33.0, "reference",
         "4-bit weights left 35 dB; two neighbouring blocks swapped reach 31.5 dB at best", proposed=True),
)  # fmt: skip

UNCOVERED = Gate(
    "*", "*", "*", "*", "covered", 1.0, "reference",
    "a row that no gate judges proves nothing: add a gate for this rung, scheme, kind and output",
)  # fmt: skip


def judge_row(row: Row, gates: Sequence[Gate] = GATES) -> tuple[Verdict, ...]:
    """Apply every gate that counts for `row`, in table order.

    A metric the row lacks (a delta gate but no residual input was given) fails its gate. A row that no gate but
    `finite` matches fails UNCOVERED, so that a misspelt rung or scheme cannot pass unjudged. Rows of the reference
    rung compare nothing and are judged by `finite` alone.
    """
    verdicts: list[Verdict] = []
    seen: set[tuple[str, Against]] = set()
    for gate in gates:
        if (gate.metric, gate.against) in seen or not gate.matches(row):
            continue
        if row.rung == "reference" and gate.metric != "finite":
            continue
        seen.add((gate.metric, gate.against))
        verdicts.append(_apply(gate, row))
    covered = row.rung == "reference" or any(metric != "finite" for metric, _ in seen)
    if not covered:
        verdicts.append(_apply(UNCOVERED, row))
    return tuple(verdicts)


def judge(rows: Iterable[Row], gates: Sequence[Gate] = GATES) -> list[Verdict]:
    """All verdicts on all rows, in the order of the rows."""
    return [verdict for row in rows for verdict in judge_row(row, gates)]


def first_bad_rung(rows: Iterable[Row]) -> dict[str, str]:
    """Part -> the lowest rung at which one of its rows missed a gate. Parts without a miss are left out."""
    first: dict[str, str] = {}
    for row in rows:
        if not row.passed and (row.part not in first or RUNG_ORDER[row.rung] < RUNG_ORDER[first[row.part]]):
            first[row.part] = row.rung
    return first


def _apply(gate: Gate, row: Row) -> Verdict:
    value = _value(gate, row)
    return Verdict(row.part, row.output, row.step, row.rung, row.scheme, gate, value, gate.holds(value))


def _value(gate: Gate, row: Row) -> float:
    if gate is UNCOVERED:
        return 0.0
    metrics: Metrics = row.vs_reference if gate.against == "reference" else row.vs_previous
    value = getattr(metrics, gate.metric)
    return math.nan if value is None else float(value)
