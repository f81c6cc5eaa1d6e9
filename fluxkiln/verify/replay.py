"""A recorded run replayed: every part at every rung from what it was given, and what that says in rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fluxkiln.patches.pipeline import run_rows
from fluxkiln.quantize.schemes import Scheme
from fluxkiln.types import Part, PartRunner

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.verify.ladder import Ladder
    from fluxkiln.verify.pipeline import PipelineResult
    from fluxkiln.verify.reference import Recording


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


def climb_part(
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
        made: rung -> outputs.
        label: what the part is called in the rows; its name by default.
    """
    inputs, expected = recording.inputs(part.name, step), recording.outputs(part.name, step)
    residual = dict(part.traits.residual)
    shown = step if part.component == "transformer" else -1
    for output, reference in expected.items():
        base = inputs[residual[output]] if output in residual else None
        rungs = [(rung, outputs[output].reshape(reference.shape)) for rung, outputs in made.items()]
        ladder.climb(label or part.name, part.traits, output, shown, reference, base, rungs, gate_scheme(scheme))


def climb_pipeline(ladder: Ladder, recording: Recording, scheme: Scheme, rung: str, pipeline: PipelineResult) -> None:
    """Rows of the final latents and the image; `scheme` is that of the blocks."""
    name = gate_scheme(scheme)
    ladder.climb_latents(recording.steps - 1, recording.latents, [(rung, pipeline.latents)], name)
    ladder.climb_image(-1, recording.image, [(rung, pipeline.image)], name)


def gate_scheme(scheme: Scheme) -> str:
    """The scheme as the gates know it: without group size or method, but with whether that is calibrated."""
    return scheme.base_name + "-calibrated" * scheme.calibrated
