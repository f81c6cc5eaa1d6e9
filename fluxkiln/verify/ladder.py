"""The ladder: a recorded run replayed, every output of every part at every rung compared and judged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fluxkiln.errors import ParityError, UsageError
from fluxkiln.patches.pipeline import run_rows
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Kind, Part, PartRunner
from fluxkiln.verify.gates import PIPELINE, Gate, Row, Rung, Verdict, gate_table, judge_row, rung_table
from fluxkiln.verify.heat import WorstMaps
from fluxkiln.verify.metrics import AnyArray, Metrics, compare, compare_images, explain_mismatch, failed_metrics

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.carried import Carried
    from fluxkiln.verify.pipeline import PipelineResult
    from fluxkiln.verify.reference import Recording


class Ladder:
    """Collects rows; a missed gate is remembered, not raised, until `raise_if_failed`.

    Args:
        rungs, gates: those that a toolchain adds to the ones of every ladder.
        mark: ends what rows call a part: of a further size, say.

    `carried` is told of every call that is compared, if there is one.
    """

    def __init__(self, rungs: Iterable[Rung] = (), gates: Iterable[Gate] = (), mark: str = "") -> None:
        self.mark = mark
        self.rungs = rung_table(rungs)
        self.gates = gate_table(gates)
        self.rows: list[Row] = []
        self.maps = WorstMaps()
        self.carried: Carried | None = None

    def absorb(self, other: Ladder) -> None:
        """Take over what was compared on another ladder."""
        self.rows += other.rows
        self.maps.absorb(other.maps)

    def compare(
        self,
        part: str,
        kind: Kind | None,
        output: str,
        step: int,
        reference: AnyArray,
        base: AnyArray | None,
        rungs: Iterable[tuple[str, AnyArray]],
        scheme: str = "F32",
    ) -> tuple[Row, ...]:
        """Compare one output at every rung with the reference and with the rung before it.

        Args:
            part, kind: what the run is called, and None, where it is the pipeline's final `latents`, or `image`
                [height, width, 3], uint8 or float in 0..1.
            reference: what diffusers computed; every rung's array has its shape.
            base: the residual input this output updates (Kind.residual), None when there is none.
            rungs: (name, array), bottom to top; a generator keeps no more than two arrays alive.
            scheme: the part's scheme. Rungs below `dequantized` do not depend on it.

        Returns:
            One judged row per rung. Arrays that cannot be compared, because of their shape or because of NaN, make
            rows that fail; a reference that is itself NaN makes a failing row of the rung `reference`.

        Raises UsageError: an unknown rung, or rungs out of order.
        """
        part += self.mark
        failed = failed_metrics(has_delta=base is not None)
        made: list[Row] = []

        def add(rung: str, vs_reference: Metrics, previous: str, vs_previous: Metrics, note: str) -> None:
            row = Row(
                part, kind, output, step, self.rungs[rung], scheme, vs_reference, previous, vs_previous, note=note
            )
            made.append(replace(row, verdicts=judge_row(row, self.gates)))

        if not np.isfinite(reference).all():
            add("reference", failed, "reference", failed, "NaN or infinity in the reference itself")
        known = list(self.rungs)
        last, below_name, below, noise = "reference", "reference", reference, 0.0
        for rung, actual in rungs:
            if rung not in known[1:]:
                raise UsageError(f"no rung is called {rung!r}; above the reference there are {', '.join(known[1:])}")
            if self.rungs[rung].order <= self.rungs[last].order:
                raise UsageError(f"rung {rung} was given after {last}; the order is {', '.join(known)}")
            last = rung
            mismatch = explain_mismatch(actual, reference, base)
            if mismatch:
                add(rung, failed, below_name, failed, mismatch)
                continue
            is_image = kind is None and output == "image"
            vs_reference = compare_images(actual, reference) if is_image else compare(actual, reference, base)
            vs_previous = vs_reference
            if below is not reference:
                vs_previous = compare_images(actual, below) if is_image else compare(actual, below, base)
                size = vs_reference.relative_l2
                ratio = size / noise if noise else math.inf if size else 1.0
                vs_previous = replace(vs_previous, noise_ratio=ratio)
            if kind is not None:
                severity = math.inf if math.isnan(vs_previous.worst_channel) else vs_previous.worst_channel
                self.maps.offer((part, output, step, rung), severity, actual, below, base)
            if vs_reference.finite:
                add(rung, vs_reference, below_name, vs_previous, "")
                # a rung that cannot be compared is skipped, not inherited
                below_name, below, noise = rung, actual, vs_reference.relative_l2
            else:
                add(rung, vs_reference, below_name, vs_previous, "NaN or infinity on one side")
        self.rows += made
        return tuple(made)

    def raise_if_failed(self, report: Path | str) -> None:
        """Raise one ParityError that names the first bad rung and where the report lies, if any row failed.

        Call it after the report has been written. A ladder without rows fails too: it has shown nothing.
        """
        message = explain_failure(self.rows)
        if message:
            raise ParityError(f"{message}; all rows: {report}")


def explain_failure(rows: Sequence[Row]) -> str:
    """One sentence on how much failed and where to look first; empty when nothing failed."""
    failed = [row for row in rows if not row.passed]
    if not failed:
        return name_culprit(rows)
    bad, parts = {row.part for row in failed}, {row.part for row in rows}
    return f"parity failed in {len(failed)} of {len(rows)} rows, {len(bad)} of {len(parts)} parts; {name_culprit(rows)}"


def name_culprit(rows: Sequence[Row]) -> str:
    """The lowest bad rung, the part that misses it most, the gate missed and its reason; empty when nothing failed."""
    if not rows:
        return "no row was compared, so nothing is proven: at least one part has to be run"
    failed = [row for row in rows if not row.passed]
    if not failed:
        return ""
    lowest = min((row.at for row in failed), key=lambda rung: rung.order)
    row = max((row for row in failed if row.at == lowest), key=lambda row: row.worst.excess if row.worst else math.inf)
    worst = row.worst
    claim = f"{worst.claim} ({worst.gate.reason})" if worst else "it was never judged"
    where = row.output if row.step < 0 else f"{row.output}, step {row.step}"
    note = f"; {row.note}" if row.note else ""
    return (
        f"first bad rung: {lowest.name}, worst in {row.part} ({where}, {row.scheme}): {claim}{note}; look at "
        f"{lowest.suspect}"
    )


def row_to_dict(row: Row, gates: Sequence[Gate]) -> dict[str, Any]:
    """`row` as report.json holds it: metrics that do not apply are left out, verdicts name their gate by number."""
    plain = ("part", "kind", "output", "step", "rung", "scheme", "passed", "previous", "note")
    return {
        **{name: getattr(row, name) for name in plain},
        "vs_reference": _metrics_to_dict(row.vs_reference),
        "vs_previous": _metrics_to_dict(row.vs_previous),
        "verdicts": [verdict_to_dict(verdict, gates) for verdict in row.verdicts],
    }


def verdict_to_dict(verdict: Verdict, gates: Sequence[Gate]) -> dict[str, Any]:
    """`gate` is the number of the gate in the report's table, -1 for the rule that every row needs one."""
    gate = verdict.gate
    return {
        "gate": gates.index(gate) if gate in gates else -1,
        **{name: getattr(gate, name) for name in ("metric", "against", "bound")},
        **{name: getattr(verdict, name) for name in ("value", "excess", "passed")},
    }


def _metrics_to_dict(metrics: Metrics) -> dict[str, Any]:
    return {name: value for name, value in asdict(metrics).items() if value is not None}


def replay_part(
    rungs: Mapping[str, PartRunner], recording: Recording, part: Part
) -> list[dict[str, Mapping[str, NDArray[Any]]]]:
    """Step -> rung -> outputs. A rung lets go of the part's weights before the next one loads them."""
    steps: list[dict[str, Mapping[str, NDArray[Any]]]] = [{} for _ in recording.calls[part.name]]
    for rung, runner in rungs.items():
        for step, made in enumerate(steps):
            made[rung] = run_rows(runner, part, recording.inputs(part.name, step))
        let_go(runner)
    return steps


def let_go(runner: PartRunner) -> None:
    """Have a runner drop what it holds of its last part; it loads that again when it is needed."""
    close = getattr(runner, "close", None)
    if close is not None:
        close()


def compare_outputs(
    ladder: Ladder,
    recording: Recording,
    part: Part,
    scheme: Scheme,
    step: int,
    made: Mapping[str, Mapping[str, Any]],
    label: str = "",
) -> None:
    """Rows of every output of one call of `part`.

    Args:
        made: rung -> outputs. label: what the part is called in the rows; its name by default.
    """
    inputs, expected = recording.inputs(part.name, step), recording.outputs(part.name, step)
    residual = dict(part.traits.residual)
    shown = step if part.component == "transformer" else -1
    for output, reference in expected.items():
        base = inputs[residual[output]] if output in residual else None
        rungs = [(rung, outputs[output].reshape(reference.shape)) for rung, outputs in made.items()]
        ladder.compare(label or part.name, part.traits, output, shown, reference, base, rungs, gate_scheme(scheme))
    if ladder.carried is not None:
        ladder.carried.take(recording, part, step, made)


def compare_pipeline(ladder: Ladder, recording: Recording, scheme: Scheme, rung: str, pipeline: PipelineResult) -> None:
    """Rows of the final latents and the image; `scheme` is that of the blocks."""
    name = gate_scheme(scheme)
    ladder.compare(
        PIPELINE, None, "latents", recording.steps - 1, recording.latents, None, [(rung, pipeline.latents)], name
    )
    ladder.compare(PIPELINE, None, "image", -1, recording.image, None, [(rung, pipeline.image)], name)


def gate_scheme(scheme: Scheme) -> str:
    """The scheme as the gates know it: without group size or method, but with whether that is calibrated."""
    return scheme.base_name + "-calibrated" * scheme.calibrated
