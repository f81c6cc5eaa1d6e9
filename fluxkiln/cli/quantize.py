"""`fluxkiln calibrate` and `fluxkiln quantize`."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from fluxkiln.cli.options import (
    PATH,
    build_dir_option,
    read_shape,
    size_option,
    statistics_option,
    store_option,
    tokens_option,
)
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, seconds_text
from fluxkiln.errors import UsageError
from fluxkiln.settings import Settings, read_prompts
from fluxkiln.verify.report.page import size as size_text

_COMPONENTS = "text_encoder,text_encoder_2,transformer"


@click.command()
@click.argument("model")
@click.option("--prompts", type=PATH, help="A text file, one prompt a line. Default: eight.")
@click.option("--steps", type=int, default=4, metavar="N", help="Denoising steps of every prompt. Default: 4.")
@click.option("--out", type=PATH, help="A file that gets a copy (safetensors).")
@click.option("--use", type=PATH, help="Take this file instead of running anything.")
@click.option(
    "--block", type=click.IntRange(0, 1 << 20), metavar="N", default=1536,
    help="Channels whose products are kept; 0: all. Default: 1536.",
)  # fmt: skip
@click.option(
    "--seed", type=int, metavar="N", default=1000, help="Of the first prompt, each other's is one more. Default: 1000."
)
@click.option("--components", default=_COMPONENTS, metavar="A,B", help=f"Default: {_COMPONENTS}.")
@statistics_option
@size_option
@tokens_option
@build_dir_option
@store_option
@json_option
@click.pass_obj
def calibrate_command(
    output: Output,
    /,
    model: str,
    prompts: Path | None,
    out: Path | None,
    use: Path | None,
    block: int,
    components: str,
    **common: Any,
) -> None:
    """Record what goes into every layer, for the methods that round by it.

    MODEL runs over some prompts, and second moments of the inputs are kept in the store: builds of this checkpoint
    with a calibrated method (--scheme W4BF16-gptq) use the last ones made.
    """
    # by default other latents than verification begins with: what is measured there has not been calibrated on
    settings = _settings(model, components, **common)
    with open_progress() as progress:
        from fluxkiln.build.calibration import DEFAULT_PROMPTS, calibrate, use_calibration

        if use is not None:
            made = use_calibration(settings, use, progress)
        else:
            made = calibrate(settings, read_prompts(prompts or DEFAULT_PROMPTS), out, block, progress)
    found = made.to_json()
    output.document(found)
    layers = count_text(sum(found["matrices"].values()), "layer")
    output.line(
        f"{layers} with {count_text(found['inputs'], 'input')}, {size_text(made.size)}, "
        f"{'from the store' if made.hit else 'recorded in ' + seconds_text(made.seconds)}"
    )


def _settings(model: str, components: str, *, size: str | None, tokens: str | None, **others: Any) -> Settings:
    chosen = tuple(components.replace(",", " ").split())
    if not chosen:
        raise UsageError(f"no component was asked for; the default is {_COMPONENTS}")
    return Settings("cpu", model, components=chosen, **read_shape(size, tokens), **others)


_LEGEND = """\
layer: * is any block; of several the largest errors and the summed size are shown. bits: of a weight, scales included.
weights off, outputs off: error of the layer's weights and of what it puts out, in percent of their own size; - where
there is no calibration (`fluxkiln calibrate`). compiler's: the same by the compiler's own rounding. one-signed: groups
of weights with one sign only, which the compiler's rounding destroys.
"""


@click.command()
@click.argument("model")
@click.option("--scheme", "schemes", multiple=True, metavar="NAME", help="May be repeated; the first is chosen.")
@click.option("--budget", default="", metavar="BYTES", help="6.5GB, or 4.6bits a weight: choose a scheme per layer.")
@click.option(
    "--layer", "rules", multiple=True, metavar="PLACE=SCHEME", help="'single.proj_out=BF16' say. May be repeated."
)
@click.option("--per-kind", is_flag=True, help="Spend it on slots, for all blocks alike: BF16 or --scheme, one mould.")
@click.option("--every-layer", is_flag=True, help="A line for every layer, not one for the same layer of all blocks.")
@click.option("--out", type=PATH, help="Write the packed layers to this safetensors file.")
@click.option("--components", metavar="A,B", help="Default: text_encoder_2,transformer.")
@click.option("--pipeline", is_flag=True, help="Also run the whole pipeline under each scheme, 2 and 8 steps.")
@statistics_option
@size_option
@tokens_option
@build_dir_option
@store_option
@json_option
@click.pass_obj
def quantize_command(
    output: Output,
    /,
    model: str,
    schemes: tuple[str, ...],
    budget: str,
    rules: tuple[str, ...],
    per_kind: bool,
    out: Path | None,
    components: str | None,
    pipeline: bool,
    **common: Any,
) -> None:
    """Compare methods layer by layer, and choose a scheme for each within a budget.

    Every layer of MODEL's blocks is measured beside the compiler's own rounding. Output errors are shown where the
    store has a calibration of this checkpoint (fluxkiln calibrate). With --budget each layer gets the scheme that
    takes most error off a byte. With --per-kind as well, the same layers of all blocks stay in BF16: blocks are run
    from a recorded reference run with one weight in codes at a time, those that do most to what the block adds are
    left out, and the scheme that is printed is one for fluxkiln build.
    """
    if pipeline and components:
        raise UsageError("--pipeline needs all components; leave --components out")
    every_layer = bool(common.pop("every_layer"))
    settings = _settings(model, components or "text_encoder_2,transformer", **common)
    with open_progress() as progress:
        from fluxkiln.build.quantization import BASELINE, measure_effects, quantize_model
        from fluxkiln.quantize.recipes import parse_rules

        made = quantize_model(settings, schemes, budget, parse_rules(rules), out, progress, per_kind)
        effects = []
        if pipeline:
            compared = list(dict.fromkeys([BASELINE, *(schemes or ("W4BF16",))]))
            whole = replace(settings, components=None, target="bm1684x")
            effects = measure_effects(whole, compared, progress=progress)
    found = {**made.to_json(), "pipeline": [asdict(effect) for effect in effects]}
    output.document(found)
    _show_layers(output, found["layers"], BASELINE, bool(budget), every_layer)
    output.line(
        f"{count_text(len(found['layers']), 'layer')}, {size_text(found['size'])}, {found['bits_per_weight']:.3f} bits "
        f"a weight, {'with' if made.calibrated else 'without'} calibration, in {seconds_text(made.seconds)}"
    )
    if found["mix"]:
        _show_mix(output, found["mix"])
        output.line(f"fluxkiln build bm1684x --model {model} --scheme '{made.scheme}'")
    if effects:
        output.table(
            ("scheme", ">steps", ">latents", ">PSNR", ">SSIM"),
            [
                (one.scheme, one.steps, _percent(one.latents_relative_l2), f"{one.psnr:.1f} dB", f"{one.ssim:.4f}")
                for one in effects
            ],
        )


def _show_layers(
    output: Output, layers: list[dict[str, Any]], baseline: str, chosen_from: bool, every_layer: bool
) -> None:
    """A line for each layer, or for the same layer of all blocks where its scheme is the same; then what columns mean.

    Args:
        baseline: the scheme that all are compared with. chosen_from: what each was chosen from is shown.
    """
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for layer in layers:
        name = layer["name"] if every_layer else re.sub(r"\b\d+\b", "*", layer["name"])
        groups.setdefault((name, layer["chosen"]), []).append(layer)
    rows = []
    for (name, chosen), members in groups.items():
        own, base = ([member["schemes"][one] for member in members] for one in (chosen, baseline))
        errors = [_worst(found, what) for what in ("weight_error", "output_error") for found in (own, base)]
        bits, size = own[0]["bits_per_weight"], sum(one["size"] for one in own)
        one_signed = sum(one["one_signed_groups"] for one in base)
        others = [_options(members[0]["schemes"]) if len(members) == 1 else "--every-layer"] * chosen_from
        rows.append(
            (name, str(len(members)), chosen, f"{bits:.3f}", *errors, size_text(size), str(one_signed), *others)
        )
    columns = (
        "layer", ">layers", "scheme", ">bits", ">weights off", ">compiler's", ">outputs off", ">compiler's ", ">size",
        ">one-signed", *["chosen from, bits: error"] * chosen_from,
    )  # fmt: skip
    output.table(columns, rows)
    output.line(_LEGEND)


def _worst(figures: list[dict[str, Any]], what: str) -> str:
    known = [one[what] for one in figures if one[what] is not None]
    return _percent(max(known, default=None))


def _show_mix(output: Output, mix: dict[str, Any]) -> None:
    """Tables of the slots, most sensitive for their bytes first, and of what was foretold of the blocks."""
    slots = sorted(mix["slots"], key=lambda one: -(float(one["sensitivity"]) ** 2) / int(one["bytes_kept"]))
    output.table(
        ("kind", "slot", ">bits", ">size", ">kept costs", ">block's error", "chosen"),
        [
            (
                one["kind"], one["slot"], f"{one['bits']:.3f}", size_text(one["size"]), size_text(one["bytes_kept"]),
                _percent(one["sensitivity"]), one["chosen"],
            )
            for one in slots
        ],
    )  # fmt: skip
    output.table(
        ("kind", "blocks", ">all in codes", ">foretold", ">measured"),
        [
            (
                one["kind"], ", ".join(one["blocks"]), _percent(one["predicted_error_all_in_codes"]),
                _percent(one["predicted_error"]), _percent(one["measured_error"]),
            )
            for one in mix["kinds"]
        ],
    )  # fmt: skip
    output.line(f"blocks run in {seconds_text(mix['seconds'])}")


def _options(schemes: dict[str, Any]) -> str:
    """What a layer's scheme was chosen from."""
    found = sorted(schemes.values(), key=lambda one: float(one["bits_per_weight"]))
    errors = [one["weight_error"] if one["output_error"] is None else one["output_error"] for one in found]
    pairs = zip((one["bits_per_weight"] for one in found), errors, strict=True)
    return ", ".join(f"{bits:.2f}: {_percent(error)}" for bits, error in pairs)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
