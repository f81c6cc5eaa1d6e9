"""`fluxkiln cache`: the store that builds share; `fluxkiln mould`: kinds compiled once, whatever the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxkiln.cli.main import NamedCommands
from fluxkiln.cli.options import PATH, SettingsFor, TargetCommand, settings_options, store_options
from fluxkiln.cli.output import Output, count_text, json_option, open_progress
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.settings import STORE_VARIABLE, Settings
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.artifacts.store import Store
    from fluxkiln.build.mould_archive import MouldEntry


def _open_existing(build_dir: Path, store: Path | None) -> Store:
    from fluxkiln.artifacts.store import Store

    root = Settings(target="", build_dir=build_dir, store=store).store_path
    if not (root / "index.json").is_file():
        raise UsageError(
            f"{root} is no store: it has no index.json; a build makes one there, --store, --build-dir and "
            f"{STORE_VARIABLE} name another"
        )
    return Store(root)


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

    found = _open_existing(build_dir, store)
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
        rows = [(name, stage["results"], size_text(stage["size"])) for name, stage in sorted(stages.items())]
        output.table(("stage", ">results", ">size"), rows)
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
    found = _open_existing(build_dir, store)
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
    found = _open_existing(build_dir, store)
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


@click.group(cls=NamedCommands)
def mould_command() -> None:
    """Make moulds, and carry them to machines without the compiler.

    A mould is a kind of part compiled once, for given shapes, scheme and chip. No checkpoint is in it: every part of
    every checkpoint with these shapes is cast into it.
    """


@mould_command.command(name="build", cls=TargetCommand)
@click.argument("target")
@settings_options
@json_option
@click.pass_obj
def build_moulds_command(output: Output, settings_for: SettingsFor, target: str) -> None:
    """Compile the moulds that a build for TARGET needs, and prove each with other weights.

    Only the model's configs are read: --model full-dev writes no checkpoint, and a folder needs none of its weights.
    """
    settings = settings_for(target)
    with open_progress() as progress:
        from fluxkiln.build.mould_archive import build_moulds

        entries = build_moulds(settings, progress)
    _show(output, entries, settings.store_path)


@mould_command.command(name="list")
@store_options
@json_option
@click.pass_obj
def list_moulds_command(output: Output, build_dir: Path, store: Path | None) -> None:
    """Show the moulds of a store."""
    from fluxkiln.build.mould_archive import list_moulds

    found = _open_existing(build_dir, store)
    _show(output, list_moulds(found), found.root)


@mould_command.command(name="export")
@click.argument("file", type=PATH)
@click.option("--chip", metavar="NAME", help="Only moulds for this chip. Default: all.")
@click.option("--sign", "key", type=PATH, metavar="KEY", help="Sign FILE with this private key (PEM, P-256).")
@store_options
@json_option
@click.pass_obj
def export_moulds_command(
    output: Output, file: Path, chip: str | None, key: Path | None, build_dir: Path, store: Path | None
) -> None:
    """Write the moulds of a store to FILE, with all that a build needs of them.

    They are found again by the same version of fluxkiln, torch and diffusers.
    """
    from fluxkiln.build.mould_archive import export_moulds

    _tell(output, export_moulds(_open_existing(build_dir, store), file, chip, key), file, f"written to {file}")


@mould_command.command(name="import")
@click.argument("file", type=PATH)
@click.option("--verify", "key", type=PATH, metavar="KEY", help="Public key that FILE must be signed with.")
@store_options
@json_option
@click.pass_obj
def import_moulds_command(output: Output, file: Path, key: Path | None, build_dir: Path, store: Path | None) -> None:
    """Take over the moulds of FILE, all or none; every digest in it is checked.

    Without --verify nobody vouches for them: the first build that uses a mould traces its template and proves it, which
    needs the compiler. With it that is spared, and machines without the compiler can build.
    """
    from fluxkiln.artifacts.store import open_store
    from fluxkiln.build.mould_archive import import_moulds

    root = Settings(target="", build_dir=build_dir, store=store).store_path
    taken = import_moulds(open_store(root), file, key)
    proof = "proven by whoever signed it" if key else "to be proven by the first build that uses them"
    _tell(output, taken, file, f"taken over into {root}; {proof}")


def _tell(output: Output, entries: list[MouldEntry], file: Path, what: str) -> None:
    size = file.stat().st_size
    output.document({"file": str(file), "size": size, "moulds": [entry.to_json() for entry in entries]})
    output.line(f"{count_text(len(entries), 'mould')}, {size_text(size)}, {what}")


def _show(output: Output, entries: list[MouldEntry], root: Path) -> None:
    output.document({"store": str(root), "moulds": [entry.to_json() for entry in entries]})
    if not entries:
        output.line(f"{root} has no moulds; fluxkiln mould build TARGET makes some")
        return
    rows = []
    for entry in entries:
        first = " x ".join(map(str, next(iter(entry.inputs.values()), [])))
        castable = "no" if entry.why else "yes"
        rows.append((entry.what, entry.chip, first, size_text(entry.size), size_text(entry.weight_bytes), castable))
    output.table(("mould", "chip", "first input", ">size", ">weights of a part", "castable"), rows)
