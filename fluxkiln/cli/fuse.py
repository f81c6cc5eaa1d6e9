"""`fluxkiln fuse`."""

from __future__ import annotations

import time
from pathlib import Path

import click

from fluxkiln.cli.options import build_dir_option, lora_option
from fluxkiln.cli.output import Output, count_text, json_option, seconds_text
from fluxkiln.cli.progress import open_progress
from fluxkiln.progress import count_bytes
from fluxkiln.settings import parse_loras
from fluxkiln.verify.report.wording import size as size_text


@click.command()
@click.argument("model")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@lora_option
@build_dir_option
@json_option
@click.pass_obj
def fuse(output: Output, model: str, directory: Path, loras: tuple[str, ...], build_dir: Path) -> None:
    """Write a checkpoint with LoRAs fused into its transformer.

    MODEL is a synthetic preset, a folder or a Hugging Face id. DIR must be empty or not exist yet; it is there whole at
    the end or not at all. Files that no LoRA changes are hard links. `fluxkiln build --lora` does this by itself.
    """
    chosen = parse_loras(loras)
    from fluxkiln.export.lora import check_loras, fuse_lora
    from fluxkiln.export.source import resolve_model

    check_loras(chosen)
    started = time.perf_counter()
    with open_progress() as progress:
        root = resolve_model(model, build_dir / "models", count_bytes(progress, "synthesize", "written"))
        fused = fuse_lora(root, chosen, directory, count_bytes(progress, "fuse", "written"))
    seconds = time.perf_counter() - started
    output.document(
        {
            "model": str(directory),
            "lora": [{"file": str(file), "strength": strength} for file, strength in chosen],
            "tensors": len(fused.tensors),
            "bytes": fused.nbytes,
            "seconds": round(seconds, 3),
        }
    )
    output.line(
        f"{directory}: {count_text(len(fused.tensors), 'tensor')} changed, {size_text(fused.nbytes)} written in "
        f"{seconds_text(seconds)}"
    )
