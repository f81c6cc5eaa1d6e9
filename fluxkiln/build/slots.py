"""Which weights of a kind stay as they are within a budget: the same ones in all its blocks, as one mould holds them.

They are chosen by the error of what a block adds, with one weight in codes and all others as they are. A layer's own
relative error says little: it is about the same for all of them, and some are multiplied with a gate, go through a
softmax or are added to something much larger. Blocks run in the inline form, whose modulation is judged alike.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
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
from fluxkiln.quantize.figures import Figures
from fluxkiln.quantize.recipes import Stacks, choose_exactly
from fluxkiln.quantize.schemes import Scheme, parse_scheme, weight_name, with_exceptions
from fluxkiln.types import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from fluxkiln.types import WeightReader
    from fluxkiln.verify.reference import Recording


@dataclass(frozen=True, slots=True)
class SlotChoice:
    """One slot of all blocks of a kind, and the scheme that was chosen for it.

    `error`: what its codes do to what a block of the kind adds, relative L2 (`slot_errors`). `coded`, `plain`: bytes in
    all blocks, in codes and as it is, of as many `weights`.
    """

    kind: str
    slot: str
    error: float
    coded: int
    plain: int
    weights: int
    scheme: str
    kept: bool

    def to_json(self) -> dict[str, Any]:
        """The choice as plain JSON; `bytes_kept` is what leaving it as it is costs, or would cost."""
        size = self.plain if self.kept else self.coded
        return {
            "kind": self.kind,
            "slot": self.slot,
            "bits": round(8 * size / self.weights, 4),
            "bits_in_codes": round(8 * self.coded / self.weights, 4),
            "size": size,
            "bytes_kept": self.plain - self.coded,
            "sensitivity": self.error,
            "chosen": self.scheme,
        }


@dataclass(frozen=True, slots=True)
class Mix:
    """Slots chosen per kind, and whether the errors they were chosen by foretold the block's.

    `scheme`: what a build takes. `blocks`: kind -> those that were run. `measured`: kind -> the error of what they add,
    with all that was chosen at once. `seconds`: of all runs.
    """

    scheme: str
    slots: tuple[SlotChoice, ...]
    blocks: Mapping[str, tuple[str, ...]]
    measured: Mapping[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The mix as plain JSON."""
        predicted, all_coded = predicted_errors(self.slots), predicted_errors(self.slots, all_coded=True)
        return {
            "seconds": round(self.seconds, 3),
            "slots": [one.to_json() for one in self.slots],
            "kinds": [
                {
                    "kind": kind,
                    "blocks": list(self.blocks[kind]),
                    "predicted_error_all_in_codes": all_coded[kind],
                    "predicted_error": predicted[kind],
                    "measured_error": error,
                }
                for kind, error in self.measured.items()
            ],
        }


def choose_slots(
    figures: Mapping[str, Mapping[str, Figures]],
    coded: str,
    plain: str,
    budget: int,
    stacks: Stacks,
    errors: Mapping[str, float] | None = None,
) -> tuple[dict[str, Figures], str, tuple[SlotChoice, ...]]:
    """For each slot of each kind one of two schemes, so that all layers fit the budget.

    Squared errors are added up over the blocks of a kind; no other choice within the budget has less of them.

    Args:
        figures: layer -> scheme -> its figures, `coded` and `plain` among them.
        coded: the scheme of the blocks; plain: of the slots that it leaves out.
        errors: KIND.SLOT -> what its codes do to a block. Without it the errors are those of each layer's own output
            (or weight, without calibration), which say less.

    Returns:
        The figures chosen for each layer, the scheme of a build, and every slot. SchemeError: the budget is too small.
    """
    slots: dict[str, list[str]] = {}
    for layer in figures:
        slots.setdefault(".".join(stacks.slot_of(layer)), []).append(layer)
    options: dict[str, list[Figures]] = {}
    for name, layers in slots.items():
        options[name] = [add_up(figures[layer][scheme] for layer in layers) for scheme in (coded, plain)]
        if errors is not None:
            inside = (errors[name] * math.sqrt(len(layers)), 0.0)
            options[name] = [replace(one, output_error=e) for one, e in zip(options[name], inside, strict=True)]
    found = {name: one.scheme for name, one in choose_exactly(options, budget).items()}
    chosen = {layer: figures[layer][found[name]] for name, layers in slots.items() for layer in layers}
    table = []
    for name, (small, large) in options.items():
        kind, _, slot = name.partition(".")
        error = small.error / math.sqrt(len(slots[name]))
        kept = found[name] == plain
        table.append(SlotChoice(kind, slot, error, small.size, large.size, small.weights, found[name], kept))
    return {layer: chosen[layer] for layer in figures}, scheme_text(found, coded, plain), tuple(table)


def predicted_errors(slots: Iterable[SlotChoice], all_coded: bool = False) -> dict[str, float]:
    """Kind -> the root of the summed squared errors of its slots in codes, or of `all_coded`, as if none had been left
    out: the error of a block, were they independent."""
    squares: dict[str, float] = {}
    for one in slots:
        squares[one.kind] = squares.get(one.kind, 0.0) + (0.0 if one.kept and not all_coded else one.error**2)
    return {kind: math.sqrt(total) for kind, total in squares.items()}


def add_up(figures: Iterable[Figures]) -> Figures:
    """One slot of all blocks: bytes and squared errors are added up, and the error is the root of their sum."""
    every = list(figures)
    summed, rooted = ("size", "weights", "seconds", "one_signed", "empty"), ("weight_error", "output_error")
    found: dict[str, Any] = {name: sum(getattr(one, name) for one in every) for name in summed}
    found |= {name: math.sqrt(sum(getattr(one, name) ** 2 for one in every)) for name in rooted}
    return Figures(every[0].scheme, **found)


def scheme_text(chosen: Mapping[str, str], coded: str, plain: str) -> str:
    """`W4BF16-gptq,single.proj_out=BF16`, from KIND.SLOT -> scheme; `KIND.*` where none of a kind is in codes."""
    kinds: dict[str, list[str]] = {}
    for name in chosen:
        kinds.setdefault(name.partition(".")[0], []).append(name)
    pieces: list[str] = []
    for kind, names in kinds.items():
        kept = [name for name in names if chosen[name] == plain]
        pieces += [f"{kind}.*"] if kept == names else kept
    return with_exceptions(coded, pieces, plain)


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
    """The reference run that builds are verified with, from the store or made now, and the blocks of `layers`, tensors
    of the checkpoint, to try on it."""
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
    that are tried, their outputs and the recorded steps. ParityError: a block makes values that are not finite.
    """
    progress.stage("slots", sum(len(trials.blocks[kind]) * len(slots) for kind, slots in trials.slots.items()))
    squares: dict[str, list[float]] = {}
    for kind, slots in trials.slots.items():
        for part in trials.blocks[kind]:
            block = Block(trials, part, scheme)
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
            errors.append(Block(trials, part, scheme).error(coded.get(kind, ())))
            progress.done("blocks", part.name, f"{100 * errors[-1]:.2f} %")
        found[kind] = math.sqrt(sum(error * error for error in errors) / len(errors))
    return found


class Block:
    """A block and what it makes with no weight in codes. Nothing refers back to it: its weights go when it does."""

    def __init__(self, trials: Trials, part: Part, scheme: Scheme) -> None:
        import numpy as np

        from fluxkiln.compile.onnx.runner import Filling, TemplateRunner

        template = make_template(trials.checkpoint, trials.plan, trials.cache, part.kind, "onnx17")
        stored = _reader(trials, part, parse_scheme(scheme.arithmetic))
        plain = {spec.name: np.ascontiguousarray(stored(spec.name), np.float32) for spec in template.slots}
        codes, coded = _reader(trials, part, replace(scheme, kept=())), set[str]()

        def read(slot: str) -> NDArray[Any]:
            return codes(slot) if weight_name(slot) in coded else plain[slot]

        self.part, self.recording, self.coded = part, trials.recording, coded
        self.runner = TemplateRunner(lambda _: Filling(template, read))
        self.expected = self.run(())

    def run(self, coded: Collection[str]) -> list[dict[str, NDArray[Any]]]:
        """The outputs of every recorded step, with these slots in codes."""
        self.coded.clear()
        self.coded.update(coded)
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


def _reader(trials: Trials, part: Part, scheme: Scheme) -> WeightReader:
    """Slot of a part's template -> its weight as `scheme` stores it."""
    from fluxkiln.compile.onnx.runner import TemplateRunner

    plan = replace(trials.plan, schemes={**trials.plan.schemes, part.kind: scheme})
    rung = dequantized_rung(trials.checkpoint, plan, trials.cache)
    assert isinstance(rung, TemplateRunner)
    return rung.fill(part.name).read_weight
