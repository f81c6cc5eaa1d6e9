"""`fluxkiln cache`: the store that builds share."""

from __future__ import annotations

from pathlib import Path

import click

from fluxkiln.cli.main import NamedCommands
from fluxkiln.cli.options import open_existing, store_options
from fluxkiln.cli.output import Output, count_text, json_option
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.verify.report.page import size as size_text


@click.group(cls=NamedCommands)
def cache_command() -> None:
    """Look into the store that builds share, and tidy it."""


@cache_command.command(name="ls")
@store_options
@json_option
@click.pass_obj
def list_store_command(output: Output, build_dir: Path, store: Path | None) -> None:
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
            ("stage", ">results", ">size"),
            [(name, str(stage["results"]), size_text(stage["size"])) for name, stage in sorted(stages.items())],
        )
    if tags:
        output.line()
        output.table(("tag", "manifest"), sorted(tags.items()))


@cache_command.command(name="verify")
@store_options
@json_option
@click.pass_obj
def verify_store_command(output: Output, build_dir: Path, store: Path | None) -> None:
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


@cache_command.command(name="gc")
@store_options
@click.option("--results", is_flag=True, help="Forget what builds recorded too: only what a tag reaches stays.")
@click.option(
    "--older-than", "hours", type=float, metavar="HOURS", default=1.0,
    help="Leave younger blobs alone: somebody may be about to use them. Default: 1.",
)  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Say what would go, and remove nothing.")
@json_option
@click.pass_obj
def collect_command(
    output: Output, build_dir: Path, store: Path | None, results: bool, hours: float, dry_run: bool
) -> None:
    """Remove blobs that no tag and no recorded result reaches.

    What a tag reaches always stays. If the index or a manifest is damaged nothing is removed.
    """
    from fluxkiln.artifacts.actions import collect_garbage

    if not hours >= 0:
        raise UsageError(f"--older-than {hours}: it is a number of hours, 0 or more")
    found = open_existing(build_dir, store)
    done = collect_garbage(found, results=results, keep_seconds=hours * 3600, dry_run=dry_run)
    output.document(
        {
            "store": str(found.root),
            "removed": [blob.digest for blob in done.removed],
            "size": done.size,
            "young": len(done.young),
            "kept": done.kept,
            "dry_run": dry_run,
        }
    )
    verb = "would be removed" if dry_run else "removed"
    output.line(
        f"{found.root}: {count_text(len(done.removed), 'blob')}, {size_text(done.size)}, {verb}; "
        f"{count_text(done.kept, 'blob')} kept{f', {len(done.young)} of them unused but too new' if done.young else ''}"
    )
