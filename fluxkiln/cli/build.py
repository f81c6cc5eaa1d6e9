"""`fluxkiln build`, `compile` where the compiler is elsewhere, `doctor`: what is missing for a target."""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from fluxkiln.cli.bundle import bundle_folder
from fluxkiln.cli.options import PATH, SettingsFor, TargetCommand, settings_options, store_options
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, parity_text, path_text, seconds_text
from fluxkiln.errors import ToolchainError, UsageError
from fluxkiln.settings import MOST_COUNT, Settings

if TYPE_CHECKING:
    from fluxkiln.build.finish import BuildResult
    from fluxkiln.compile.doctor import Tool
    from fluxkiln.compile.toolchain import Toolchain


@click.command(cls=TargetCommand)
@click.argument("target")
@settings_options
@json_option
@click.pass_obj
def build_command(output: Output, settings_for: SettingsFor, target: str) -> None:
    """Build a verified bundle for TARGET, from checkpoint to report.

    Without --model the build uses a small synthetic checkpoint, made in seconds without a network. What is in the store
    already is not made again.
    """
    settings = settings_for(target)
    incomplete: ToolchainError | None = None
    with open_progress() as progress:
        from fluxkiln.build.make import build as run_build

        try:
            result = run_build(settings, progress)
        except ToolchainError as error:
            if error.result is None:
                raise
            incomplete, result = error, cast("BuildResult", error.result)
    told = {"kind": "ToolchainError", "message": str(incomplete), "exit_code": ToolchainError.exit_code}
    output.document({**result.to_json(), **({"error": told} if incomplete else {})})
    _show_result(output, result)
    if incomplete is not None:
        raise incomplete


def _show_result(output: Output, result: BuildResult) -> None:
    """What was built and what can be done with it."""
    from fluxkiln.artifacts.about import read_about

    if result.nothing_to_do:
        output.line("nothing to do: this build is finished and nothing of it has changed")
    parts = Counter(result.parts.values())
    runs = result.compiler_runs
    compiler = f"ran {count_text(runs, 'time')}" if runs else "not started: all of it was in the store"
    # Targets without a compiler link their parts.
    compiled = any(made.startswith(("cast", "compiled")) for made in parts)
    bundle = path_text(result.bundle)
    output.facts(
        {
            "bundle": bundle,
            "report": path_text(result.report) if result.report else "",
            "parity": parity_text(result.parity),
            **read_about(result.parity),
            "parts": "; ".join(f"{count} {made}" for made, count in parts.most_common()),
            "compiler": compiler if compiled and not result.nothing_to_do else "",
            "time": seconds_text(result.seconds),
            "look": f"fluxkiln inspect {shlex.quote(bundle)}",
            "paint": f'fluxkiln generate --bundle {shlex.quote(bundle)} "..."' if result.paints else "",
            "publish": f"fluxkiln publish {shlex.quote(bundle)} HOST/REPO:TAG",
        }
    )


@click.command()
@click.argument("bundle", type=PATH, required=False)
@click.option("--resume", is_flag=True, help="Go on where a build for trn1 or inf2 had no compiler.")
@click.option(
    "--jobs", type=click.IntRange(1, MOST_COUNT), metavar="N", help="Compilers at once. Default: one per core."
)
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

    if bundle is None:
        bundles = sorted(path.parent for path in build_dir.glob("*/*/bundle/manifest.json"))
        found = [one for one in bundles if _toolchain(one).resumable]
        if len(found) != 1:
            names = ", ".join(map(str, found)) or "none"
            raise UsageError(f"{len(found)} bundles below {build_dir} could be completed ({names}); name one")
        (bundle,) = found
    bundle = bundle_folder(bundle)
    settings = Settings("", build_dir=build_dir, store=store)
    with open_progress() as progress:
        made = _toolchain(bundle).resume(bundle, open_store(settings.store_path.absolute()), jobs, progress)
    output.document(made.to_json())
    output.facts(
        {
            "bundle": str(made.bundle),
            "compiled": count_text(len(made.compiled), "module"),
            "found compiled": count_text(len(made.taken), "module"),
            "compiler": f"{made.command} {made.compiler}",
        }
    )


def _toolchain(bundle: Path) -> Toolchain:
    from fluxkiln.artifacts.intact import read_manifest
    from fluxkiln.compile.targets import find_target
    from fluxkiln.compile.toolchain import toolchain_of

    return toolchain_of(find_target(read_manifest(bundle).target))


def _readiness(target: str, missing: list[Tool]) -> str:
    """Whether all of a target's builds can be made, or all but what the missing tools make."""
    if not missing:
        return f"ready: fluxkiln build {target}"
    lacking, made = ", ".join(tool.name for tool in missing), [tool.makes for tool in missing]
    return f"ready for all but {', '.join(made)}: {lacking} missing" if all(made) else f"not ready: {lacking} missing"


@click.command(cls=TargetCommand)
@click.argument("target", required=False)
@json_option
@click.pass_obj
def doctor_command(output: Output, target: str | None) -> None:
    """Show every tool, its version, and what is missing for which target.

    With TARGET, exit with 5 when something that building for it needs is missing. What is optional runs the images of
    finished bundles.
    """
    from fluxkiln.compile.doctor import examine, missing_for
    from fluxkiln.compile.targets import target_names

    if target is not None and target not in target_names():
        raise UsageError(f"no target is called {target!r}; doctor knows {', '.join(target_names())}")
    statuses = examine()
    missing = {name: [status.name for status in missing_for(name, statuses)] for name in target_names()}
    output.document({"tools": [asdict(status) for status in statuses], "missing": missing})
    shown = [status for status in statuses if target in (None, *status.needed_for, *status.optional_for)]
    rows = []
    for status in shown:
        targets = status.needed_for or status.optional_for
        use = "every target" if targets == target_names() else ", ".join(targets) or "-"
        use = use if status.needed_for or not targets else f"optional: {use}"
        state = "ok" if status.found else "missing" if status.needed_for else "absent"
        rows.append((status.name, state, status.version, use))
    output.table(("tool", "state", "version", "needed for"), rows)
    if remedies := {status.name: status.remedy for status in shown if not status.found}:
        output.line()
        output.facts(remedies)
    output.line()
    output.facts({name: _readiness(name, missing_for(name, statuses)) for name in missing if target in (None, name)})
    if target is not None and missing[target]:
        first = missing_for(target, statuses)[0]
        raise ToolchainError(f"{target} lacks {', '.join(missing[target])}; {first.name}: {first.remedy}")
