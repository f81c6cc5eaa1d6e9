"""`fluxkiln doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from fluxkiln.cli.options import TargetCommand
from fluxkiln.cli.output import Output, json_option
from fluxkiln.errors import ToolchainError, UsageError

if TYPE_CHECKING:
    from fluxkiln.compile.doctor import Tool


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
    output.table(
        ("tool", "state", "version", "needed for"),
        [
            (
                status.name,
                "ok" if status.found else "missing" if status.needed_for else "absent",
                status.version,
                _use(status),
            )
            for status in shown
        ],
    )
    if remedies := [status for status in shown if not status.found]:
        output.line()
        output.facts({status.name: status.remedy for status in remedies})
    output.line()
    output.facts({name: _readiness(name, names) for name, names in missing.items() if target in (None, name)})
    if target is not None and missing[target]:
        first = missing_for(target, statuses)[0]
        raise ToolchainError(f"{target} lacks {', '.join(missing[target])}; {first.name}: {first.remedy}")


def _use(status: Tool) -> str:
    from fluxkiln.compile.targets import target_names

    targets = status.needed_for or status.optional_for
    named = "every target" if targets == target_names() else ", ".join(targets) or "-"
    return named if status.needed_for or not targets else f"optional: {named}"


def _readiness(target: str, missing: list[str]) -> str:
    return f"not ready: {', '.join(missing)} missing" if missing else f"ready: fluxkiln build {target}"
