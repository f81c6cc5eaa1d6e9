"""Schemes compared layer by layer, chosen within a budget, and packed into one file.

Only one matrix is in memory at a time, and of that some rows. What is chosen layer by layer is for runtimes of packed
weights. A bmodel takes one scheme a kind, any method with it, and BF16 for some of its slots: that is what is chosen
per kind (`fluxkiln.build.slots`), and `fluxkiln build --scheme` takes it as it is printed.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.build.make import prepare
from fluxkiln.build.prepared import Prepared
from fluxkiln.build.slots import Mix, block_errors, choose_slots, open_trials, slot_errors
from fluxkiln.build.verification import is_complete, run_pipeline
from fluxkiln.compile.rungs import dequantized_rung
from fluxkiln.compile.weights import check_methods, find_calibration
from fluxkiln.errors import SchemeError, UsageError
from fluxkiln.export.checkpoint import Checkpoint, read_rows
from fluxkiln.files import disk_full_named
from fluxkiln.patches.model import block_kinds
from fluxkiln.patches.pipeline import Sampling
from fluxkiln.progress import Progress, Silent
from fluxkiln.quantize.recipes import LayerRule, Stacks, assign_rules, choose, parse_budget
from fluxkiln.quantize.schemes import Scheme, check_groups, parse_scheme
from fluxkiln.settings import Settings

if TYPE_CHECKING:
    from fluxkiln.quantize.calibration import Calibration
    from fluxkiln.quantize.figures import Figures
    from fluxkiln.types import TensorRef

# whatever is compared, this is in the same run
BASELINE = "W4BF16-rtn"
# weights stored in the type that the others compute in: what is left is their rounding
UNROUNDED = "BF16"
# of which a budget chooses, by the method
BUDGET_SCHEMES = ("W4BF16-g128-{0}", "W4BF16-{0}", "W4BF16-g32-{0}", "BF16")


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix of the checkpoint that a scheme may quantize."""

    component: str
    name: str
    ref: TensorRef

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.ref.shape
        return rows, columns


@dataclass(frozen=True, slots=True)
class Quantized:
    """What `quantize_model` found: figures by layer and scheme, and the figures chosen for each layer.

    `mix` is how slots were chosen per kind, where they were.
    """

    layers: tuple[Matrix, ...]
    figures: Mapping[str, Mapping[str, Figures]]
    chosen: Mapping[str, Figures]
    budget: int
    calibrated: bool
    seconds: float
    path: Path | None
    mix: Mix | None = None

    @property
    def scheme(self) -> str:
        """What a build takes, where slots were chosen per kind."""
        return self.mix.scheme if self.mix else ""

    def by_part(self) -> dict[str, dict[str, dict[str, float | None]]]:
        """Block -> scheme -> relative errors of weights and outputs over its layers (root mean square), bytes."""
        grouped: dict[str, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
        for layer in self.layers:
            before, number, _ = re.split(r"\.(\d+)\.", layer.name, maxsplit=1)
            for scheme, found in self.figures[layer.name].items():
                grouped[f"{before}.{number}"][scheme].append(found)

        def summary(found: Sequence[Figures]) -> dict[str, float | None]:
            weight = math.sqrt(sum(one.weight_error**2 for one in found) / len(found))
            output = math.sqrt(sum(one.output_error**2 for one in found) / len(found))
            size = sum(one.size for one in found)
            return {"weight_error": weight, "output_error": _number(output), "size": size}

        return {
            part: {scheme: summary(found) for scheme, found in schemes.items()} for part, schemes in grouped.items()
        }

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        size = sum(found.size for found in self.chosen.values())
        weights = sum(found.weights for found in self.chosen.values())
        return {
            "calibrated": self.calibrated,
            "budget": self.budget or None,
            "size": size,
            "bits_per_weight": round(8 * size / weights, 4),
            "seconds": round(self.seconds, 3),
            "path": str(self.path) if self.path else None,
            "scheme": self.scheme or None,
            "mix": self.mix.to_json() if self.mix else None,
            "layers": [
                {
                    "component": layer.component,
                    "name": layer.name,
                    "shape": list(layer.shape),
                    "chosen": self.chosen[layer.name].scheme,
                    "schemes": {name: _to_json(one) for name, one in self.figures[layer.name].items()},
                }
                for layer in self.layers
            ],
            "parts": self.by_part(),
        }


def quantize_model(
    settings: Settings,
    schemes: Sequence[str] = (),
    budget: str = "",
    rules: Sequence[LayerRule] = (),
    out: Path | None = None,
    progress: Progress | None = None,
    per_kind: bool = False,
) -> Quantized:
    """Measure every layer of the blocks under some schemes, and choose one for each.

    Args:
        schemes: to compare; without a budget the first is chosen. The compiler's own is always among them.
        budget: bytes or bits a weight for all layers; then the choice is among BUDGET_SCHEMES.
        rules: layers with a scheme of their own.
        out: a safetensors file for what was chosen: `<layer>.codes`, `.scales`, `.zeros`, or the layer as it is.
        per_kind: a budget is spent on slots, for all blocks of a kind alike: in the first of `schemes`, or in BF16.

    Raises:
        SchemeError: a scheme, rule or budget that cannot be had, or calibration of another checkpoint.
    """
    from fluxkiln.quantize.figures import measure

    started = time.perf_counter()
    progress = progress or Silent()
    prepared = prepare(settings, progress)
    checkpoint, cache = prepared.checkpoint, prepared.cache
    layers = tuple(find_layers(checkpoint))
    calibrations = {
        name: find_calibration(checkpoint, cache, name) for name in dict.fromkeys(layer.component for layer in layers)
    }
    compared = [parse_scheme(name) for name in schemes or ("W4BF16",)]
    if per_kind:
        if not budget or rules or len(compared) > 1:
            raise SchemeError(
                "slots are chosen per kind between one scheme and BF16, within a budget; give --budget, one --scheme, "
                "and no --layer"
            )
        if not compared[0].weight_bits:
            raise SchemeError(f"{compared[0].name} does not quantize, so there is nothing to choose; give W4BF16 say")
        compared.append(parse_scheme(compared[0].arithmetic))
    elif budget:
        method = compared[0].method
        compared = [parse_scheme(name.format(method)) for name in BUDGET_SCHEMES]
    if rounded := next((one for one in [*compared, *(rule.scheme for rule in rules)] if one.integer), None):
        raise SchemeError(
            f"{rounded.name} rounds inputs as well, and layers are measured here by their weights alone; build it, its "
            "report has the errors of every block"
        )
    stacks = Stacks(block_kinds(checkpoint.model), checkpoint.model.kinds)
    fixed = assign_rules([layer.name for layer in layers], rules, stacks)
    if out is not None and (strange := next((one for one in (*compared, *fixed.values()) if one.form), None)):
        raise SchemeError(
            f"{strange.name} is a format of whole files, and {out} is to have codes, scales and zero points; leave "
            "--out out, or build for a target that has such files"
        )
    limit = parse_budget(budget, sum(math.prod(layer.shape) for layer in layers)) if budget else 0
    figures: dict[str, dict[str, Figures]] = {}
    progress.stage("quantize", len(layers))
    for layer in layers:
        known = calibrations[layer.component]
        statistics = known.statistics(layer.component, layer.name, layer.shape[1]) if known else None
        wanted = [fixed[layer.name]] if layer.name in fixed else compared
        figures[layer.name] = {}
        for scheme in dict.fromkeys([*wanted, parse_scheme(BASELINE)]):
            if statistics is None and scheme.calibrated:
                raise SchemeError(f"{scheme.name} needs calibration of {layer.component}; run fluxkiln calibrate first")
            check_groups(scheme, layer.name, layer.shape[1])
            figures[layer.name][scheme.name] = measure(partial(read_rows, layer.ref), layer.shape, scheme, statistics)
        progress.done("quantize", layer.name, f"{len(figures[layer.name])} schemes")
    options = {
        layer.name: [figures[layer.name][s.name] for s in ([fixed[layer.name]] if layer.name in fixed else compared)]
        for layer in layers
    }
    chosen, mixed = {name: found[0] for name, found in options.items()}, None
    if per_kind:
        chosen, mixed = _choose_slots(prepared, figures, compared, limit, stacks, progress)
    elif budget:
        chosen = choose(options, limit)
    if out is not None:
        write_packed(layers, {name: parse_scheme(found.scheme) for name, found in chosen.items()}, calibrations, out)
    calibrated = all(calibrations.values())
    return Quantized(layers, figures, chosen, limit, calibrated, time.perf_counter() - started, out, mixed)


def _choose_slots(
    prepared: Prepared,
    figures: Mapping[str, Mapping[str, Figures]],
    compared: Sequence[Scheme],
    limit: int,
    stacks: Stacks,
    progress: Progress,
) -> tuple[dict[str, Figures], Mix]:
    """What each slot does to its blocks measured, slots chosen by it, and the blocks measured with what was chosen."""
    coded, plain = compared
    # a budget that cannot be met is said before anything is run
    choose_slots(figures, coded.name, plain.name, limit, stacks)
    started = time.perf_counter()
    trials = open_trials(prepared, figures, stacks, progress)
    errors = slot_errors(trials, coded, progress)
    chosen, text, slots = choose_slots(figures, coded.name, plain.name, limit, stacks, errors)
    in_codes = {kind: [one.slot for one in slots if one.kind == kind and not one.kept] for kind in trials.slots}
    measured = block_errors(trials, coded, in_codes, progress)
    names = {kind: tuple(part.name for part in parts) for kind, parts in trials.blocks.items()}
    return chosen, Mix(text, slots, names, measured, time.perf_counter() - started)


def find_layers(checkpoint: Checkpoint) -> Iterator[Matrix]:
    """Every matrix of the blocks of what may be quantized, in the order of the checkpoint."""
    model = checkpoint.model
    for component in model.calibrated:
        stacks = model.stacks[component]
        tables = tuple(end for kind in stacks.values() for end in model.kinds[kind].tables)
        for name, ref in checkpoint.tensors.get(component, {}).items():
            linear = len(ref.shape) == 2 and name.endswith(".weight") and not name.endswith(tables)
            if linear and name.startswith(tuple(f"{stack}." for stack in stacks)):
                yield Matrix(component, name, ref)


def write_packed(
    layers: Sequence[Matrix], schemes: Mapping[str, Scheme], calibrations: Mapping[str, Calibration | None], out: Path
) -> None:
    """Write the packed layers as safetensors, some rows at a time; the metadata says each one's scheme.

    SchemeError: a method that needs more than codes. ResourceError: the disk is full.
    """
    import numpy as np

    from fluxkiln.quantize.pack import pack_by, to_bf16_bits
    from fluxkiln.quantize.rounders import make_rounder

    header: dict[str, Any] = {}
    position = 0
    for layer in layers:
        for suffix, dtype, shape in _tensors(layer, schemes[layer.name]):
            size = math.prod(shape) * (1 if dtype == "U8" else 2)
            entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            header[f"{layer.component}.{layer.name}{suffix}"] = entry
            position += size
    names = {f"{layer.component}.{layer.name}": schemes[layer.name].name for layer in layers}
    raw = json.dumps({"__metadata__": {"schemes": json.dumps(names)}, **header}).encode()
    raw = raw.ljust(-(-len(raw) // 8) * 8)
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f"{out.name}.partial")
    with disk_full_named(out.parent, position), unfinished.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for layer in layers:
            scheme, (rows, columns) = schemes[layer.name], layer.shape
            if not scheme.weight_bits:
                for start in range(0, rows, 256):
                    file.write(to_bf16_bits(read_rows(layer.ref, start, min(start + 256, rows))).tobytes())
                continue
            known = calibrations[layer.component]
            statistics = known.statistics(layer.component, layer.name, columns) if known else None
            rounder = make_rounder(scheme, statistics)
            sides = []
            for start in range(0, rows, 256):
                weight = read_rows(layer.ref, start, min(start + 256, rows))
                sides.append(pack_by(rounder, weight, scheme.group_size, scheme.weight_bits))
                file.write(sides[-1].codes_OI.data)
            file.write(np.concatenate([one.scales_OG for one in sides]).data)
            file.write(np.concatenate([one.zeros_OG for one in sides]).data)
    unfinished.replace(out)


def _tensors(layer: Matrix, scheme: Scheme) -> list[tuple[str, str, tuple[int, int]]]:
    rows, columns = layer.shape
    if not scheme.weight_bits:
        return [("", "BF16", (rows, columns))]
    groups = (rows, columns // scheme.group_size)
    return [
        (".codes", "U8", (rows, columns * scheme.weight_bits // 8)),
        (".scales", "BF16", groups),
        (".zeros", "U8", groups),
    ]


def _to_json(found: Figures) -> dict[str, Any]:
    return {
        "weight_error": found.weight_error,
        "output_error": _number(found.output_error),
        "bits_per_weight": round(found.bits_per_weight, 4),
        "size": found.size,
        "seconds": round(found.seconds, 4),
        "one_signed_groups": found.one_signed,
        "empty_groups": found.empty,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class Effect:
    """One scheme after some denoising steps: final latents and the image, compared with UNROUNDED's."""

    scheme: str
    steps: int
    latents_relative_l2: float
    latents_cosine: float
    psnr: float
    ssim: float


def measure_effects(
    settings: Settings, schemes: Sequence[str], steps: Sequence[int] = (2, 8), progress: Progress | None = None
) -> list[Effect]:
    """Run the loop of `generate` with every part in float32 arithmetic and its weights as each scheme stores them.

    UsageError: not all components are built. SchemeError: a method without its calibration.
    """
    from fluxkiln.verify.metrics import compare, compare_images

    progress = progress or Silent()
    progress.stage("pipeline", len(steps) * (len(schemes) + 1))
    prepared = {}
    for scheme in (UNROUNDED, *schemes):
        one = prepared[scheme] = prepare(replace(settings, scheme=scheme))
        checkpoint, plan, cache = one.checkpoint, one.plan, one.cache
        if not is_complete(checkpoint, plan):
            raise UsageError("the effect on the whole pipeline needs all components; leave --components out")
        check_methods(checkpoint, plan, cache)
    effects = []
    for count in steps:
        made = {}
        for scheme, one in prepared.items():
            checkpoint, plan, cache = one.checkpoint, one.plan, one.cache
            runner = dequantized_rung(checkpoint, plan, cache, threads=0)
            made[scheme] = run_pipeline(checkpoint, plan, Sampling(count, settings.seed, settings.prompt), runner)
            progress.done("pipeline", scheme, f"{count} steps")
        base = made[UNROUNDED]
        for scheme in schemes:
            result = made[scheme]
            latents = compare(result.latents, base.latents)
            image = compare_images(result.image, base.image)
            assert image.psnr is not None
            assert image.ssim is not None
            effects.append(Effect(scheme, count, latents.relative_l2, latents.cosine, image.psnr, image.ssim))
    return effects
