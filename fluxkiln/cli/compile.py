"""`fluxkiln compile`: a split model's bundle completed where the compiler is."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from fluxkiln.cli.options import store_options
from fluxkiln.cli.output import Output, count_text, json_option, open_progress
from fluxkiln.errors import UsageError
from fluxkiln.settings import Settings

if TYPE_CHECKING:
    from fluxkiln.compile.toolchain import Toolchain


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path), required=False)
@click.option("--resume", is_flag=True, help="Go on where a build for trn1 or inf2 had no compiler.")
@click.option("--jobs", type=int, metavar="N", help="Compilers at once. Default: one per core.")
@store_options
@json_option
@click.pass_obj
def compile_command(
    output: Output, bundle: Path | None, resume: bool, jobs: int | None, build_dir: Path, store: Path | None
) -> None:
    """Complete a bundle for trn1 or inf2 where the compiler is.

    Compiles the modules in BUNDLE that have no NEFF yet. Default: the only such bundle of the build folder.

    Needs the target's compiler on PATH, and nothing of the checkpoint. What the script in the bundle compiled is
    checked and taken over.
    """
    if not resume:
        raise UsageError("compile only goes on where a build stopped: say --resume, or use `fluxkiln build TARGET`")
    from fluxkiln.artifacts.store import open_store

    chosen = bundle or _only_bundle(build_dir)
    settings = Settings("", build_dir=build_dir, store=store)
    with open_progress() as progress:
        made = _toolchain(chosen).resume(chosen, open_store(settings.store_path.absolute()), jobs, progress)
    output.document(made.to_json())
    output.facts(
        {
            "bundle": str(made.bundle),
            "compiled": count_text(len(made.compiled), "module"),
            "found compiled": count_text(len(made.taken), "module"),
            "compiler": f"{made.command} {made.compiler}",
        }
    )


def _only_bundle(build_dir: Path) -> Path:
    bundles = sorted(path.parent for path in build_dir.glob("*/*/bundle/manifest.json"))
    found = [bundle for bundle in bundles if _toolchain(bundle).resumable]
    if len(found) != 1:
        names = ", ".join(map(str, found)) or "none"
        raise UsageError(f"{len(found)} bundles below {build_dir} could be completed ({names}); name one")
    return found[0]


def _toolchain(bundle: Path) -> Toolchain:
    from fluxkiln.artifacts.bundle import read_manifest
    from fluxkiln.compile.targets import find_target
    from fluxkiln.compile.toolchain import toolchain_of

    return toolchain_of(find_target(read_manifest(bundle).target))
