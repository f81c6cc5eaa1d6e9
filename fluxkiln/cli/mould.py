"""`fluxkiln mould`: kinds compiled once, whatever the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxkiln.cli.main import NamedCommands
from fluxkiln.cli.options import (
    SettingsFor,
    TargetCommand,
    open_existing,
    settings_options,
    store_options,
)
from fluxkiln.cli.output import Output, count_text, json_option, open_progress
from fluxkiln.settings import Settings
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.build.mould_archive import MouldEntry


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

    found = open_existing(build_dir, store)
    _show(output, list_moulds(found), found.root)


@mould_command.command(name="export")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--chip", metavar="NAME", help="Only moulds for this chip. Default: all.")
@store_options
@json_option
@click.pass_obj
def export_moulds_command(output: Output, file: Path, chip: str | None, build_dir: Path, store: Path | None) -> None:
    """Write the moulds of a store to FILE, with all that a build needs of them.

    They are found again by the same version of fluxkiln, torch and diffusers.
    """
    from fluxkiln.build.mould_archive import export_moulds

    found = open_existing(build_dir, store)
    entries = export_moulds(found, file, chip)
    _tell(output, entries, file, f"written to {file}")


@mould_command.command(name="import")
@click.argument("file", type=click.Path(path_type=Path))
@store_options
@json_option
@click.pass_obj
def import_moulds_command(output: Output, file: Path, build_dir: Path, store: Path | None) -> None:
    """Take over the moulds of FILE; every digest in it is checked."""
    from fluxkiln.artifacts.store import open_store
    from fluxkiln.build.mould_archive import import_moulds

    root = Settings(target="", build_dir=build_dir, store=store).store_path
    entries = import_moulds(open_store(root), file)
    _tell(output, entries, file, f"taken over into {root}")


def _tell(output: Output, entries: list[MouldEntry], file: Path, what: str) -> None:
    size = file.stat().st_size
    output.document({"file": str(file), "size": size, "moulds": [entry.to_json() for entry in entries]})
    output.line(f"{count_text(len(entries), 'mould')}, {size_text(size)}, {what}")


def _show(output: Output, entries: list[MouldEntry], root: Path) -> None:
    output.document({"store": str(root), "moulds": [entry.to_json() for entry in entries]})
    if not entries:
        output.line(f"{root} has no moulds; fluxkiln mould build TARGET makes some")
        return
    output.table(
        ("mould", "chip", "first input", ">size", ">weights of a part", "castable"),
        [
            (
                entry.what,
                entry.chip,
                " x ".join(map(str, next(iter(entry.inputs.values()), []))),
                size_text(entry.size),
                size_text(entry.weight_bytes),
                "no" if entry.why else "yes",
            )
            for entry in entries
        ],
    )
