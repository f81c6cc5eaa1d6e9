"""`fluxkiln synth`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fluxkiln.cli.output import Output, json_option, seconds_text
from fluxkiln.cli.progress import open_progress
from fluxkiln.progress import count_bytes
from fluxkiln.verify.report.wording import size as size_text


@click.command()
@click.argument("preset")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--components", metavar="A,B", help="Only these, transformer,vae say. Default: all of them.")
@click.option("--seed", type=int, default=0, help="Another seed gives other weights.")
@json_option
@click.pass_obj
def synth(output: Output, preset: str, directory: Path, components: str | None, seed: int) -> None:
    """Write a synthetic checkpoint: FLUX.1's architecture, random weights.

    PRESET is tiny-dev, tiny-schnell, wide-dev (true width, two blocks) or full-dev (all blocks, 34 GB). DIR must be
    empty or not exist yet; it is there whole at the end or not at all.
    """
    from fluxkiln.export.synth.checkpoint import find_preset, parse_components, synthesize, synthesized_bytes

    model, _ = find_preset(preset)
    names = parse_components(model, None if components is None else components.replace(",", " ").split())
    total = synthesized_bytes(preset, names)
    started = time.perf_counter()
    with open_progress() as progress:
        synthesize(preset, directory, names, seed, count_bytes(progress, "synthesize", "written"))
    seconds = time.perf_counter() - started
    output.document(
        {
            "model": str(directory),
            "preset": preset,
            "seed": seed,
            "components": names,
            "bytes": total,
            "seconds": round(seconds, 3),
        }
    )
    output.line(f"{directory}: {preset}, {size_text(total)} of random weights in {seconds_text(seconds)}")
