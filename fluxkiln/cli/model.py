"""`fluxkiln synth`, `fuse` and `patches`: checkpoints that are written, and what is rewritten of diffusers."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fluxkiln.cli.options import PATH, build_dir_option, lora_option, statistics_option
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, seconds_text
from fluxkiln.progress import count_bytes
from fluxkiln.settings import MOST_SEED, parse_loras, parse_names
from fluxkiln.verify.report.page import size as size_text


@click.command()
@click.argument("preset")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--components", metavar="A,B", help="Only these, transformer,vae say. Default: all of them.")
@click.option("--seed", type=click.IntRange(0, MOST_SEED), default=0, help="Another seed gives other weights.")
@statistics_option
@json_option
@click.pass_obj
def synth_command(
    output: Output, preset: str, directory: Path, components: str | None, seed: int, statistics: str
) -> None:
    """Write a synthetic checkpoint: a model's architecture, random weights.

    PRESET is tiny-dev, tiny-schnell, wide-dev (true width, two blocks) or full-dev (all blocks, 34 GB). DIR must be
    empty or not exist yet; it is there whole at the end or not at all.
    """
    from fluxkiln.export.synth import find_preset, synthesize, synthesized_bytes
    from fluxkiln.patches.registry import pick_components

    model, _ = find_preset(preset)
    names = pick_components(tuple(model.classes), None if components is None else parse_names(components))
    total = synthesized_bytes(preset, names)
    started = time.perf_counter()
    with open_progress() as progress:
        synthesize(preset, directory, names, seed, count_bytes(progress, "synthesize", "written"), statistics)
    seconds = time.perf_counter() - started
    made = {"model": str(directory), "preset": preset, "statistics": statistics, "seed": seed, "components": names}
    output.document({**made, "bytes": total, "seconds": round(seconds, 3)})
    output.line(f"{directory}: {preset}, {size_text(total)} of random weights in {seconds_text(seconds)}")


@click.command()
@click.argument("model")
@click.argument("directory", metavar="DIR", type=PATH)
@lora_option
@click.option(
    "--adapter",
    metavar="mflux|mlx_example",
    help="Write no checkpoint: DIR is a file with one LoRA that does what all of them do, for this program.",
)
@build_dir_option
@json_option
@click.pass_obj
def fuse_command(
    output: Output, model: str, directory: Path, loras: tuple[str, ...], adapter: str | None, build_dir: Path
) -> None:
    """Write a checkpoint with LoRAs fused into it.

    MODEL is a synthetic preset, a folder or a Hugging Face id. DIR must be empty or not exist yet; it is there whole at
    the end or not at all. Files that no LoRA changes are hard links. `fluxkiln build --lora` needs no such checkpoint.
    """
    chosen = parse_loras(loras)
    from fluxkiln.export.adapter import write_adapter
    from fluxkiln.export.checkpoint import open_checkpoint
    from fluxkiln.export.lora import check_loras, fuse_lora, with_loras
    from fluxkiln.export.source import resolve_model

    check_loras(chosen)
    started = time.perf_counter()
    with open_progress() as progress:
        root = resolve_model(model, build_dir / "models", count_bytes(progress, "synthesize", "written"))
        if adapter is not None:
            opened = with_loras(open_checkpoint(root), chosen)
            layers = write_adapter(directory, opened, adapter)
            output.document({"adapter": str(directory), "for": adapter, "layers": layers, "lora": list(opened.loras)})
            output.line(f"{directory}: {count_text(layers, 'layer')} for {adapter}")
            return
        fused = fuse_lora(root, chosen, directory, count_bytes(progress, "fuse", "written"))
    seconds = time.perf_counter() - started
    output.document(
        {
            "model": str(directory),
            "lora": [dict(one) for one in fused.loras],
            "tensors": len(fused.tensors),
            "bytes": fused.nbytes,
            "seconds": round(seconds, 3),
        }
    )
    for one in fused.loras:
        if one["missing"]:
            output.line(f"{one['file']}: not in {model}: {', '.join(one['missing'])}")
    output.line(
        f"{directory}: {count_text(len(fused.tensors), 'tensor')} changed, {size_text(fused.nbytes)} written in "
        f"{seconds_text(seconds)}"
    )


@click.command()
@json_option
@click.pass_obj
def patches_command(output: Output) -> None:
    """List what is rewritten in diffusers and transformers, and whether it still fits.

    A patch is `ok` while the source of every function that it stands for is one that it was checked with. A build
    refuses patches that are `changed`.
    """
    from fluxkiln.patches.patch import examine_patches
    from fluxkiln.patches.registry import all_models

    every = {patch.name: patch for model in reversed(all_models()) for patch in model.patches()}
    statuses = [examine_patches(patch) for patch in every.values()]
    documents, rows = [], []
    for status in statuses:
        patch, state = status.patch, "changed" if status.changed else "ok"
        shown = {name: getattr(patch, name) for name in ("name", "kinds", "formats", "replaces", "reason", "until")}
        documents.append(
            {
                **shown,
                "attribute": bool(patch.replacement),
                "installed": status.installed,
                "state": state,
                "changed": status.changed,
            }
        )
        known = sorted({version for versions in patch.replaces.values() for version in versions.values()})
        installed = ", ".join(f"{name} {version}" for name, version in status.installed.items())
        rows.append((patch.name, state, ", ".join(patch.kinds), ", ".join(known), installed))
    output.document({"patches": documents})
    output.table(("patch", "state", "kinds", "checked with", "installed"), rows)
    for status in statuses:
        patch = status.patch
        verb = "replaces" if patch.replacement else "restates"
        output.line(f"\n{patch.name} {verb} {', '.join(map(_short, patch.replaces))}")
        if status.changed:
            output.line(f"  changed: {', '.join(status.changed)}")
        output.line(f"  why:     {patch.reason}")
        output.line(f"  until:   {patch.until}")


def _short(dotted: str) -> str:
    """The function's name, with its class where it has one."""
    pieces = dotted.split(".")
    return ".".join(pieces[-2:] if pieces[-2][:1].isupper() else pieces[-1:])
