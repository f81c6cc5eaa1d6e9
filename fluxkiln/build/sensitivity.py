"""What a weight's codes do to its block: the error of what the block adds, with that one weight in codes and all others
as they are.

A layer's own relative error says little of it: it is about the same for all of them, and some are multiplied with a
gate, go through a softmax or are added to something much larger. Blocks run in the inline form, in which the modulation
is part of them, so that its weights are judged by the same error. One block is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.build.prepared import Prepared, chosen_parts
from fluxkiln.build.verification import record
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.rungs import dequantized_rung
from fluxkiln.compile.templates import make_template
from fluxkiln.errors import ParityError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.progress import Progress
from fluxkiln.quantize.recipes import Stacks
from fluxkiln.quantize.schemes import Scheme, parse_scheme, weight_name
from fluxkiln.types import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.compile.onnx.runner import Filling
    from fluxkiln.types import WeightReader
    from fluxkiln.verify.reference import Recording

# what one set of weights makes at each recorded step: output -> array
_Made = list[dict[str, "NDArray[Any]"]]


@dataclass(frozen=True, slots=True)
class Trials:
    """What blocks are tried on.

    Attributes:
        plan: of the inline form, at the shapes of the recording.
        slots: kind -> its slots that may be in codes, `attn.to_q`.
        blocks: kind -> the blocks that are run: the first and the last.
    """

    checkpoint: Checkpoint
    plan: Plan
    cache: ActionCache
    recording: Recording
    slots: Mapping[str, tuple[str, ...]]
    blocks: Mapping[str, tuple[Part, ...]]


def open_trials(prepared: Prepared, layers: Collection[str], stacks: Stacks, progress: Progress) -> Trials:
    """The reference run that builds are verified with, from the store or made now, and the blocks to try on it.

    Args:
        layers: tensors of the checkpoint, `single_transformer_blocks.0.proj_out.weight`.
    """
    progress.stage("record", 1)
    settings = replace(prepared.settings, modulation="inline")
    checkpoint, cache = prepared.checkpoint, prepared.cache
    plan = replace(prepared.plan, parts=chosen_parts(settings, checkpoint))
    recording = record(replace(prepared, plan=plan, settings=settings))
    progress.done("record", "reference run", f"{recording.steps} step(s)")
    slots: dict[str, dict[str, None]] = {}
    for kind, slot in map(stacks.slot_of, layers):
        slots.setdefault(kind, {})[slot] = None
    every = {kind: [part for part in plan.parts if part.kind == kind] for kind in slots}
    blocks = {kind: tuple(dict.fromkeys((parts[0], parts[-1]))) for kind, parts in every.items()}
    found = {kind: tuple(names) for kind, names in slots.items()}
    return Trials(checkpoint, replace(plan, shapes=recording.shapes), cache, recording, found, blocks)


def slot_errors(trials: Trials, scheme: Scheme, progress: Progress) -> dict[str, float]:
    """KIND.SLOT -> relative L2 error of what a block adds when this slot alone is in the codes of `scheme`.

    It is compared with the block whose weights are all in the scheme's arithmetic; the root mean square over the blocks
    that are tried, their outputs and the recorded steps.

    Raises:
        ParityError: a block makes values that are not finite. SchemeError: a method without its calibration.
    """
    progress.stage("slots", sum(len(trials.blocks[kind]) * len(slots) for kind, slots in trials.slots.items()))
    squares: dict[str, list[float]] = {}
    for kind, slots in trials.slots.items():
        for part in trials.blocks[kind]:
            block = _Block(trials, part, scheme)
            for slot in slots:
                error = block.error([slot])
                squares.setdefault(f"{kind}.{slot}", []).append(error * error)
                progress.done("slots", f"{part.name} {slot}", f"{100 * error:.2f} %")
            del block  # before the next one is loaded
    return {name: math.sqrt(sum(found) / len(found)) for name, found in squares.items()}


def block_errors(
    trials: Trials, scheme: Scheme, coded: Mapping[str, Collection[str]], progress: Progress
) -> dict[str, float]:
    """Kind -> the same error, measured with all its slots of `coded` in codes at once; errors as `slot_errors`."""
    progress.stage("blocks", sum(map(len, trials.blocks.values())))
    found: dict[str, float] = {}
    for kind, parts in trials.blocks.items():
        errors = []
        for part in parts:
            errors.append(_Block(trials, part, scheme).error(coded.get(kind, ())))
            progress.done("blocks", part.name, f"{100 * errors[-1]:.2f} %")
        found[kind] = math.sqrt(sum(error * error for error in errors) / len(errors))
    return found


class _Weights:
    """A part's weights in float32, of which any may be replaced by what their codes stand for."""

    def __init__(self, checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, scheme: Scheme) -> None:
        import numpy as np

        self.template = make_template(checkpoint, plan, cache, part.kind, "onnx17")
        plain = _reader(checkpoint, plan, cache, part, parse_scheme(scheme.arithmetic))
        self.plain = {spec.name: np.ascontiguousarray(plain(spec.name), np.float32) for spec in self.template.slots}
        self.codes = _reader(checkpoint, plan, cache, part, replace(scheme, kept=()))
        self.coded: frozenset[str] = frozenset()

    def fill(self, part: str) -> Filling:
        """With those of `coded` in codes."""
        from fluxkiln.compile.onnx.runner import Filling

        return Filling(self.template, self.read)

    def read(self, slot: str) -> NDArray[Any]:
        """What a slot of the template is filled with."""
        return self.codes(slot) if weight_name(slot) in self.coded else self.plain[slot]


class _Block:
    """A block and what it makes with no weight in codes. Nothing refers back to it: its weights go when it does."""

    def __init__(self, trials: Trials, part: Part, scheme: Scheme) -> None:
        from fluxkiln.compile.onnx.runner import TemplateRunner

        self.part, self.recording = part, trials.recording
        self.weights = _Weights(trials.checkpoint, trials.plan, trials.cache, part, scheme)
        self.runner = TemplateRunner(self.weights.fill)
        self.expected = self.run(())

    def run(self, coded: Collection[str]) -> _Made:
        """The outputs of every recorded step, with these slots in codes."""
        self.weights.coded = frozenset(coded)
        self.runner.close()  # it keeps the weights of its last run
        steps = range(len(self.recording.calls[self.part.name]))
        return [self.runner(self.part.name, self.recording.inputs(self.part.name, step)) for step in steps]

    def error(self, coded: Collection[str]) -> float:
        """Relative L2 of what is added, root mean square over outputs and steps."""
        from fluxkiln.verify.metrics import compare

        residual, squares = dict(self.part.traits.residual), []
        for step, outputs in enumerate(self.run(coded)):
            inputs = self.recording.inputs(self.part.name, step)
            for name, actual in outputs.items():
                found = compare(actual, self.expected[step][name], inputs[residual[name]])
                if not found.finite or found.delta_relative_l2 is None:
                    raise ParityError(
                        f"{self.part.name} with {', '.join(coded)} in codes makes values that are not finite, so no "
                        "error can be measured; check the checkpoint (fluxkiln verify), or choose without --per-kind"
                    )
                squares.append(found.delta_relative_l2**2)
        return math.sqrt(sum(squares) / len(squares))


def _reader(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, part: Part, scheme: Scheme) -> WeightReader:
    """Slot of a part's template -> its weight as `scheme` stores it."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    rung = dequantized_rung(checkpoint, replace(plan, schemes={**plan.schemes, part.kind: scheme}), cache)
    assert isinstance(rung, TemplateRunner)
    return rung.fill(part.name).read_weight
