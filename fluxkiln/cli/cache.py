"""`fluxkiln cache`: the store that builds share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxkiln.cli.options import open_existing, store_options
from fluxkiln.cli.output import Output, count_text, json_option, size_text
from fluxkiln.cli.usage import NamedCommands
from fluxkiln.errors import IntegrityError

if TYPE_CHECKING:
    pass


@click.group(cls=NamedCommands)
def cache() -> None:
    """Look into the store that builds share."""


@cache.command(name="ls")
@store_options
@json_option
@click.pass_obj
def list_store(output: Output, build_dir: Path, store: Path | None) -> None:
    """Show results per stage, tags and blobs."""
    from fluxkiln.artifacts.actions import ActionCache

    found = open_existing(build_dir, store)
    blobs = list(found.digests())
    stages: dict[str, dict[str, int]] = {}
    for record in ActionCache(found).records():
        stage = stages.setdefault(str(record["stage"]), {"results": 0, "size": 0})
        outputs = record["outputs"]
        stage["results"] += 1
        if isinstance(outputs, dict):
            stage["size"] += sum(blob["size"] for blob in outputs.values())
    tags = found.tags()
    size = sum(blob.size for blob in blobs)
    output.document({"store": str(found.root), "blobs": len(blobs), "size": size, "stages": stages, "tags": tags})
    output.line(f"{found.root}: {count_text(len(blobs), 'blob')}, {size_text(size)}")
    if stages:
        output.line()
        output.table(
            ("stage", "results", "size"),
            [(name, str(stage["results"]), size_text(stage["size"])) for name, stage in sorted(stages.items())],
            numbers=("results", "size"),
        )
    if tags:
        output.line()
        output.table(("tag", "manifest"), sorted(tags.items()))


@cache.command(name="verify")
@store_options
@json_option
@click.pass_obj
def verify_store(output: Output, build_dir: Path, store: Path | None) -> None:
    """Compare every blob with its digest.

    Damaged ones are put aside, so that the next build makes them again.
    """
    found = open_existing(build_dir, store)
    blobs = list(found.digests())
    damaged = []
    for blob in blobs:
        try:
            found.verify(blob.digest)
        except IntegrityError:
            damaged.append(blob.digest)
    output.document({"store": str(found.root), "blobs": len(blobs), "damaged": damaged, "intact": not damaged})
    if damaged:
        raise IntegrityError(
            f"{found.root}: {count_text(len(damaged), 'blob')} of {len(blobs)} did not have the bytes that the name "
            f"promises ({damaged[0]}); put into {found.root / 'quarantine'}: the next build makes what it needs again"
        )
    output.line(f"{found.root}: {count_text(len(blobs), 'blob')}, {size_text(sum(b.size for b in blobs))}, all intact")
