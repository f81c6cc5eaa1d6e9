"""`fluxkiln build` and `fluxkiln plan`."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import click

from fluxkiln.cli.options import SettingsFor, settings_options
from fluxkiln.cli.output import Output, count_text, json_option, seconds_text
from fluxkiln.cli.progress import open_progress

if TYPE_CHECKING:
    from fluxkiln.build import BuildResult


@click.command()
@click.argument("target")
@settings_options
@json_option
@click.pass_obj
def build(output: Output, settings_for: SettingsFor, target: str) -> None:
    """Build a verified bundle for TARGET, from checkpoint to report.

    TARGET is bm1684x, bm1688 or cpu. Without --model the build uses a small synthetic checkpoint, made in seconds
    without a network. What is in the store already is not made again.
    """
    settings = settings_for(target)
    with open_progress() as progress:
        from fluxkiln.build import build as run_build

        result = run_build(settings, progress)
    output.document(result.to_json())
    _show(output, result)


def _show(output: Output, result: BuildResult) -> None:
    if result.nothing_to_do:
        output.line("nothing to do: this very build is finished")
    parity, parts = result.parity, Counter(result.parts.values())
    compared = (
        f"{count_text(parity.get('rows', 0), 'comparison')} on {count_text(len(parity.get('rungs', ())), 'rung')}"
    )
    output.facts(
        {
            "bundle": str(result.bundle),
            "report": str(result.report or ""),
            "parity": f"{compared}, all within their gates" if parity.get("verified") else "not verified",
            "parts": "; ".join(f"{count} {made}" for made, count in parts.most_common()),
            "compiler": "" if result.nothing_to_do or not parts else _compiler(result.compiler_runs),
            "time": seconds_text(result.seconds),
        }
    )


def _compiler(runs: int) -> str:
    return f"ran {count_text(runs, 'time')}" if runs else "not started: all of it was in the store"
