"""How W8A8 may find its numbers, by what blocks then add: exponents and limits, rotations, scales of products."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any
from unittest import mock

import numpy as np
import torch

from bench.figure import WORK, Figure
from bench.formulations import whole_mlp
from fluxkiln.build.block_errors import added, relative_error
from fluxkiln.build.calibration import DEFAULT_PROMPTS
from fluxkiln.build.make import prepare
from fluxkiln.build.prepared import Prepared
from fluxkiln.build.verification import record_run
from fluxkiln.compile.weights import MOST_ROWS
from fluxkiln.export.eager import PatchedRunner
from fluxkiln.patches.flux1 import transformer
from fluxkiln.patches.pipeline import Sampling
from fluxkiln.quantize.integer import INPUT_SCALE, LEVELS, OUTPUT_SCALE, THRESHOLD, pack_integer
from fluxkiln.quantize.sizes import count_sizes, largest
from fluxkiln.quantize.smoothing import EXPONENTS, find_gains, find_smoothing
from fluxkiln.scenes.grammar import scenes
from fluxkiln.settings import DEFAULT_STATISTICS, Settings, read_prompts
from fluxkiln.verify.reference import Recording, view_recording

MODELS = (("wide-dev", DEFAULT_STATISTICS), ("wide-dev", "flux"), ("scenes-dev", DEFAULT_STATISTICS))
PROMPTS, STEPS, SEED = 2, 4, 1000
HEAD, ROWS = 128, 256
QUANTILES = (0.999, 0.9999, 1.0)

CHOICES = ((0.5, 1.0), (0.65, 1.0), (0.8, 1.0), (0.5, 0.9999), (0.65, 0.9999))


@dataclass(frozen=True)
class Way:
    """One way to find the numbers: exponents to choose from, the quantile of an input where its 8 bits end, and what
    is rotated (`all`, `attention`)."""

    exponents: tuple[float, ...] = EXPONENTS
    limit: float = 1.0
    rotated: str = ""


WAYS = {
    "one scale for all channels": Way(()),
    **{f"exponent {one}" + f", limit at {100 * limit:g} %" * (limit < 1): Way((one,), limit) for one, limit in CHOICES},
    "**chosen layer by layer, as a build does**": Way(),
    "all inputs rotated in groups of 128, one scale": Way((), rotated="all"),
    "all inputs smoothed with 0.5, then rotated": Way((0.5,), rotated="all"),
    "exponent 0.5, attention's outputs rotated head by head": Way((0.5,), rotated="attention"),
}


@dataclass
class _Input:
    """What is known of an input from calibration, and the weights that it meets."""

    weights: dict[Any, Any] = field(default_factory=dict)
    sizes: Any = 0
    rows: list[Any] = field(default_factory=list)
    largest: dict[Any, float] = field(default_factory=dict)


class _Products:
    """Stands for `torch.nn.functional.linear` while a block runs: looks at its operands, or rounds them."""

    def __init__(self, way: Way | None) -> None:
        self.way, self.inputs, self.of = way, dict[Any, _Input](), dict[Any, Any]()
        self.exact, self.held, self.known = torch.nn.functional.linear, dict[int, Any](), dict[Any, Any]()

    def __call__(self, x: Any, weight: Any, bias: Any = None) -> Any:
        made = self.exact(x, weight, bias)
        if x.dim() < 3:
            return made
        key = (weight.data_ptr(), tuple(weight.shape))
        if self.way is None:
            return self._look(key, x, weight, made)
        return self._round(key, x, weight, bias)

    def _look(self, key: Any, x: Any, weight: Any, made: Any) -> Any:
        first, _ = self.held.setdefault(id(x), (key, x))  # held, so that no other tensor gets its id
        self.of[key], one = first, self.inputs.setdefault(first, _Input())
        one.weights[key] = weight
        one.largest[key] = max(one.largest.get(key, 0.0), float(made.abs().max()))
        if first == key:
            rows = x.reshape(-1, x.shape[-1]).numpy()
            one.sizes = one.sizes + count_sizes(rows)
            one.rows.append(rows[:: max(1, len(rows) // ROWS)].copy())
        return made

    def _round(self, key: Any, x: Any, weight: Any, bias: Any) -> Any:
        if key not in self.known:
            self.known[key] = self._numbers(key, weight)
        divisors, turn, codes, scales, step = self.known[key]
        scaled = x.numpy() / divisors
        scaled = np.clip(np.rint((turn(scaled) if turn else scaled) / INPUT_SCALE), -LEVELS - 1, LEVELS)
        made = self.exact(torch.from_numpy(scaled.astype(np.float32)), codes) * scales
        made = made if bias is None else made + bias
        return (made / step).round().clamp(-32768, 32767) * step

    def _numbers(self, key: Any, weight: Any) -> Any:
        one, way = self.inputs[self.of[key]], self.way
        assert way is not None
        some = max(1, sum(map(len, one.weights.values())) // MOST_ROWS)
        every = np.concatenate([other.numpy()[::some] for other in one.weights.values()])
        attention = weight.shape[1] == weight.shape[0] and len(one.weights) == 1
        turn = _turn if way.rotated == "all" or (way.rotated == "attention" and attention) else None
        if way.exponents:
            divisors = find_smoothing(every, one.sizes, way.exponents)
            if way.limit < 1:
                rows = np.abs(np.concatenate(one.rows) / divisors)
                divisors = divisors * (np.quantile(rows, way.limit) / THRESHOLD).astype(np.float32)
        else:
            divisors = np.full(every.shape[1], largest(one.sizes).max() / THRESHOLD, np.float32)
        if turn:
            divisors = divisors * _limit(np.concatenate(one.rows) / divisors, every * divisors)
        own = weight.numpy() * divisors
        packed = pack_integer(turn(own) if turn else own)
        step = OUTPUT_SCALE * float(find_gains(np.array([one.largest[key]]))[0])
        scales = torch.from_numpy((packed.scales_O * INPUT_SCALE).astype(np.float32))
        return divisors, turn, torch.from_numpy(packed.codes_OI.astype(np.float32)), scales, step


def _turn(values: Any) -> Any:
    """Every 128 channels times an orthogonal matrix of Hadamard's, whose numbers are of one size."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < HEAD:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    turned = values.reshape(*values.shape[:-1], -1, HEAD) @ (matrix / np.float32(math.sqrt(HEAD)))
    return turned.reshape(values.shape)


def _limit(rows_NI: Any, weight_OI: Any) -> float:
    """What rotated rows are divided by: of several limits that which leaves their product the least error."""
    turned, weight = _turn(rows_NI), _turn(weight_OI)
    best, found = math.inf, 1.0
    for quantile in QUANTILES:
        limit = float(np.quantile(np.abs(turned), quantile)) / THRESHOLD
        codes = np.clip(np.rint(turned / limit / INPUT_SCALE), -LEVELS - 1, LEVELS) * INPUT_SCALE * limit
        lost = float(np.square((codes - turned) @ weight.T).sum())
        if lost < best:
            best, found = lost, limit
    return found


@contextmanager
def _in_place(products: _Products) -> Iterator[None]:
    with mock.patch.object(torch.nn.functional, "linear", products), mock.patch.object(transformer, "_mlp", whole_mlp):
        yield


def measure() -> Figure:
    columns: dict[str, list[str]] = {}
    for model, statistics in MODELS:
        settings = Settings("bm1684x", model, statistics=statistics, build_dir=WORK)
        errors = _errors(prepare(settings))
        for kind, found in errors.items():
            columns[f"{kind}, {model}{'' if statistics == DEFAULT_STATISTICS else ', ' + statistics}"] = found
    return Figure(
        "How W8A8 may find its numbers",
        ("way", *columns),
        tuple((name, *(values[row] for values in columns.values())) for row, name in enumerate(WAYS)),
        (
            "Relative L2 of what a block adds, in PyTorch with all products in 8 bits and everything else in float32; "
            "root mean square over blocks, outputs and steps. Rotations are computed where they stand, which a chip "
            f"would have to do as well, but for attention's. Calibrated with {PROMPTS} prompts of {STEPS} steps, "
            "measured on another one.",
        ),
    )


def _errors(prepared: Prepared) -> dict[str, list[str]]:
    parts = [part for part in prepared.plan.parts if part.traits.is_block and part.component == "transformer"]
    prompts = read_prompts(DEFAULT_PROMPTS)[: PROMPTS + 1]
    if prepared.checkpoint.name == "scenes-dev":
        prompts = tuple(prompt.text for _, prompt in islice(scenes(1), PROMPTS + 1))
    *calibrated, judged = [_record(prepared, SEED + seed, prompt) for seed, prompt in enumerate(prompts)]
    squares: dict[str, list[list[float]]] = {}
    for part in parts:
        runner = PatchedRunner(prepared.checkpoint, (part,))
        known = _Products(None)
        with _in_place(known):
            for recording in calibrated:
                for step in range(len(recording.calls[part.name])):
                    runner(part.name, recording.inputs(part.name, step))
                    known.held.clear()
        exact = added(judged, part, runner)
        for place, way in enumerate(WAYS.values()):
            products = _Products(way)
            products.inputs, products.of = known.inputs, known.of
            with _in_place(products):
                error = relative_error(exact, added(judged, part, runner))
            squares.setdefault(part.kind, [[] for _ in WAYS])[place].append(error**2)
    return {kind: [f"{math.sqrt(np.mean(one)):.4f}" for one in found] for kind, found in squares.items()}


def _record(prepared: Prepared, seed: int, prompt: str) -> Recording:
    plan, model = prepared.plan, prepared.checkpoint.model
    every = model.recorded_parts(prepared.checkpoint.configs, prepared.settings.vae)
    folder = WORK / "recordings" / f"{prepared.name}-{seed}"
    found = record_run(prepared, folder, every, plan.shapes, Sampling(STEPS, seed, prompt))
    return view_recording(found, model, plan.parts)
