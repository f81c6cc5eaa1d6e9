"""`fluxkiln parity`: a bundle's recording replayed where the bundle runs."""

from __future__ import annotations

from pathlib import Path

import click

from fluxkiln.cli.bundle import bundle_folder
from fluxkiln.cli.generate import THREADS, device_option, peak_bytes
from fluxkiln.cli.options import PATH, BundleCommand
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, path_text
from fluxkiln.settings import parse_names


@click.command(cls=BundleCommand)
@click.argument("bundle", type=PATH)
@click.option("--parts", metavar="A,B", help="Only these. Default: all of the recording.")
@click.option("--executor", metavar="NAME", help="What runs the parts, see below. Default: by the bundle.")
@device_option
@click.option("--threads", type=THREADS, metavar="N", help="Threads of one operation. Default: all cores.")
@click.option("--out", type=PATH, default=Path("parity"), metavar="DIR", help="For the report. Default: ./parity.")
@json_option
@click.pass_obj
def parity_command(
    output: Output,
    bundle: Path,
    parts: str | None,
    executor: str | None,
    device: int | str | None,
    threads: int | None,
    out: Path,
) -> None:
    """Replay a bundle's recording on its device and judge what comes out.

    For bundles built --with-recording. Every part gets what it was given in diffusers' run. DIR gets report.html, one
    file to send, and report.json: the error of every part against diffusers and against the highest rung of the build,
    its time beside the compiler's estimate, memory. Exit 3 when a gate is missed.
    """
    from fluxkiln.compile.opener import open_bundle
    from fluxkiln.compile.toolchain import open_executor
    from fluxkiln.generate.parity import open_carried, parity_facts, replay_bundle
    from fluxkiln.verify.ladder import explain_failure
    from fluxkiln.verify.report.document import build_report, write_report

    names = parse_names(parts) if parts else ()
    with open_progress() as progress:
        opened = open_bundle(bundle_folder(bundle), progress)
        open_carried(opened)  # before a device is asked for
        runner = open_executor(opened, executor, threads=threads, device=device)
        try:
            found = replay_bundle(opened, runner, names, progress)
            facts = parity_facts(opened, runner, found, peak_bytes())
        finally:
            runner.close()
    _, page = write_report(out, build_report(found.ladder, facts))
    rows = found.ladder.rows
    output.document(
        {
            "bundle": str(opened.folder),
            "digest": opened.digest,
            "executor": dict(runner.facts),
            "report": str(page),
            "passed": not explain_failure(found.ladder.rows),
            "parts": found.milliseconds,
            "worst": max((row.worst.excess for row in rows if row.worst), default=0.0),
        }
    )
    estimates = found.recording.estimates
    output.table(
        ("part", ">time", ">estimate", ">error", ">of the rung below"),
        [
            (
                f"{row.part} {row.output}" + (f", step {row.step}" if row.step > 0 else ""),
                f"{found.milliseconds[row.part]:.3g} ms",
                f"{estimates[row.part]:.3g} ms" if row.part in estimates else "-",
                f"{row.vs_reference.relative_l2:.2g}",
                f"{row.vs_previous.relative_l2:.2g}",
            )
            for row in rows
        ],
    )
    output.line(f"\n{path_text(page)}: {count_text(len(found.milliseconds), 'part')} replayed by {runner.name}")
    found.ladder.raise_if_failed(page)
