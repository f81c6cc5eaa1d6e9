"""`fluxkiln debug`: the first operation inside a part that leaves its tolerance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from fluxkiln.cli.options import SettingsFor, TargetCommand, settings_options
from fluxkiln.cli.output import Output, json_option, open_progress
from fluxkiln.errors import ParityError, UsageError

if TYPE_CHECKING:
    from fluxkiln.verify.debug import Diagnosis
    from fluxkiln.verify.findings import Culprit, Range


@click.command(cls=TargetCommand)
@click.argument("part")
@click.option("--target", metavar="NAME", default="bm1684x", help="Of the build. Default: bm1684x.")
@click.option("--step", type=int, metavar="N", default=0, help="The denoising step to look at, from 0. Default: 0.")
@click.option("--values", "every", is_flag=True, help="Every value of the lowest bad rung, or of the top one.")
@settings_options
@json_option
@click.pass_obj
def debug_command(output: Output, settings_for: SettingsFor, part: str, target: str, step: int, every: bool) -> None:
    """Find the first operation inside a part that leaves its tolerance.

    PART is a part's name, double.07 or time_embed; the options are those of the build it belongs to. The part's values
    are compared one by one: the template with diffusers' own modules, the stored weights with the checkpoint's, the
    compiled form with the template; of a model cut over cores, the values of every rank. Ends with 3 if something is
    found.
    """
    from fluxkiln.build.make import prepare
    from fluxkiln.verify.debug import debug_part

    settings = settings_for(target)
    with open_progress() as progress:
        prepared = prepare(settings, progress)
        if prepared.plan.further:
            raise UsageError("debug looks at one size; give one --size and one --tokens")
        found = debug_part(prepared, part, step, progress)
    output.document(found.to_json())
    _show(output, found, every)
    if culprit := found.culprit:
        lost = f", on the way to {' and '.join(culprit.remedy.through)}" if culprit.remedy.through else ""
        raise ParityError(
            f"{found.part}, rung {culprit.rung}{_rank_text(culprit)}: the first operation out of tolerance is "
            f"{culprit.operation} {culprit.finding.value}{lost}: {culprit.remedy.cause}; {culprit.remedy.advice}"
        )


def _rank_text(culprit: Culprit) -> str:
    return f" on rank {culprit.finding.rank}" if culprit.finding.rank >= 0 else ""


def _show(output: Output, found: Diagnosis, every: bool) -> None:
    when = "once per image" if found.step < 0 else str(found.step)
    output.facts({"part": f"{found.part} ({found.kind}, {found.scheme})", **found.facts, "step": when})
    output.line()
    rows = []
    for rung in found.rungs:
        missed, worst = sum(bool(finding.missed) for finding in rung.findings), rung.noisiest
        own = (f"{worst.own:.1e}", worst.value) if worst is not None else ("", "")
        rows.append((rung.rung, rung.against, len(rung.findings), missed, *own))
    output.table(("rung", "against", ">values", ">out", ">largest own error", "in"), rows)
    culprit = found.culprit
    # what was read back byte by byte has no noise to show
    computed = [rung for rung in found.rungs if rung.rung != "stored"]
    shown = next((rung for rung in found.rungs if culprit is not None and rung.culprit is culprit), computed[-1])
    if culprit is None:
        noisiest = sorted(shown.findings, key=lambda finding: -finding.own)[:3]
        named = ", ".join(f"{finding.value} {finding.own:.1e}" for finding in noisiest)
        output.line("\nevery operation stays within its tolerance: what a part misses then is the sum of their noise")
        output.line(f"noisiest at rung {shown.rung}: {named}")
    else:
        _show_culprit(output, culprit)
    if every:
        output.line()
        values = [(one.value, *(f"{x:.1e}" for x in (one.own, one.channel, one.drift)), one.missed)
                  for one in shown.findings]  # fmt: skip
        output.table(("value", ">own", ">worst channel", ">drift", "out"), values)


def _show_culprit(output: Output, culprit: Culprit) -> None:
    finding, channels = culprit.finding, ""
    lowered = f" ({culprit.lowered})" if culprit.lowered else ""
    if finding.channels:
        more = finding.bad_channels - len(finding.channels)
        named = ", ".join(map(str, finding.channels)) + (f" and {more} more" if more else "")
        channels = f"{finding.bad_channels} of {finding.all_channels}: {named}"
    output.line()
    output.facts(
        {
            "first out": f"{culprit.operation} {finding.value}{lowered}{_rank_text(culprit)}",
            "on the way to": ", ".join(culprit.remedy.through),
            "errors": f"own {finding.own:.2g}, worst channel {finding.channel:.2g}, drift {finding.drift:.2g}",
            "channels": channels,
            "weights": ", ".join(culprit.slots),
            **{f"reads {name}": _range_text(range_) for name, range_ in culprit.inputs.items()},
            "makes": _range_text(culprit.output) if culprit.output.shape else "",
            "cause": culprit.remedy.cause,
            "remedy": culprit.remedy.advice,
        }
    )


def _range_text(range_: Range) -> str:
    shape = "x".join(map(str, range_.shape))
    return f"{range_.low:.4g} to {range_.high:.4g}, rms {range_.rms:.3g}, smallest {range_.smallest:.2g} [{shape}]"
