"""`fluxkiln build` and `fluxkiln plan`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import click

from fluxkiln.cli.options import SettingsFor, TargetCommand, settings_options
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, parity_text, path_text, seconds_text
from fluxkiln.errors import ResourceError
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.build.prepared import BuildResult


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
    with open_progress() as progress:
        from fluxkiln.build.make import build as run_build

        result = run_build(settings, progress)
    output.document(result.to_json())
    _show(output, result)


@click.command(cls=TargetCommand)
@click.argument("target")
@settings_options
@json_option
@click.pass_obj
def plan_command(output: Output, settings_for: SettingsFor, target: str) -> None:
    """Show the jobs of a build and their memory; build nothing.

    What the store holds already is marked. With --json, the list can feed another scheduler.
    """
    settings = settings_for(target)
    from fluxkiln.build.make import plan as make_plan

    planned = make_plan(settings)
    output.document(planned)
    jobs = planned["jobs"]
    columns = list(dict.fromkeys(key for job in jobs for key in job))
    output.table(
        [">" * _is_bytes(column) + column.replace("_", " ") for column in columns],
        [[_cell(column, job.get(column)) for column in columns] for job in jobs],
    )
    output.line()
    output.facts({name.replace("_", " "): _cell(name, value) for name, value in planned.get("totals", {}).items()})
    _show_devices(output, planned.get("devices") or {})
    if planned.get("refused"):
        raise ResourceError(planned["refused"])


def _show_devices(output: Output, devices: dict[str, Any]) -> None:
    if not devices:
        return
    output.line()
    texts, sizes = ("file", "device", "phase"), ("weights", "instructions", "runtime", "total")
    rows = [
        [*(str(file[name]) for name in texts), *(size_text(file[name]) for name in sizes)] for file in devices["files"]
    ]
    output.table((*texts, *(">" + name for name in sizes)), rows)
    output.line()
    budget = {"a device gives to models": size_text(devices["budget"])}
    output.facts({way: ", ".join(map(size_text, peaks)) for way, peaks in devices["peaks"].items()} | budget)


def _show(output: Output, result: BuildResult) -> None:
    if result.nothing_to_do:
        output.line("nothing to do: this build is finished and nothing of it has changed")
    parts = Counter(result.parts.values())
    # Targets without a compiler link their parts.
    compiled = any(made.startswith(("cast", "compiled")) for made in parts)
    output.facts(
        {
            "bundle": path_text(result.bundle),
            "report": path_text(result.report) if result.report else "",
            "parity": parity_text(result.parity),
            "parts": "; ".join(f"{count} {made}" for made, count in parts.most_common()),
            "compiler": _compiler(result.compiler_runs) if compiled and not result.nothing_to_do else "",
            "time": seconds_text(result.seconds),
        }
    )


def _compiler(runs: int) -> str:
    return f"ran {count_text(runs, 'time')}" if runs else "not started: all of it was in the store"


def _is_bytes(name: str) -> bool:
    return name.split("_")[-1] in ("memory", "bytes", "size")


def _cell(name: str, value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: ""}[value]
    return size_text(value) if _is_bytes(name) and isinstance(value, int | float) else str(value)
