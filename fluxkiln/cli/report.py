"""`fluxkiln report`: the page of a build, or one page of several builds side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fluxkiln.cli.options import SettingsFor, TargetCommand, settings_options
from fluxkiln.cli.output import Output, count_text, json_option, path_text
from fluxkiln.errors import IntegrityError, UsageError

MANIFEST, REPORT, PAGE, COMPARISON = "manifest.json", "report.json", "report.html", "comparison.html"

_path = click.Path(path_type=Path)


@click.command(cls=TargetCommand)
@click.argument("where", metavar="BUILD...", nargs=-1, required=True, type=_path)
@click.option("--out", type=_path, help=f"Where the page goes. Default: {PAGE} beside its {REPORT}, ./{COMPARISON}.")
@settings_options
@json_option
@click.pass_obj
def report_command(output: Output, settings_for: SettingsFor, where: tuple[Path, ...], out: Path | None) -> None:
    """Write a build's report.html again, or a page that compares several builds.

    It is made from their report.json; nothing is run. BUILD is a bundle, the folder around it, a report.json, or a
    target's name: then the options of `fluxkiln build` say which of its builds.
    """
    from fluxkiln.files import write_durably

    sources = [report_file(one, settings_for) for one in where]
    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} was given twice; give the reports of different builds")
    documents = [read_report(source) for source in sources]
    page, target = _page(sources, documents, out)
    if target.is_dir():
        raise UsageError(f"--out {target} is a folder; give the name of a file")
    if not target.parent.is_dir():
        raise UsageError(f"--out {target}: there is no folder {target.parent}; make it first")
    write_durably(target, page.encode())
    verdicts = [document.get("verdict") or {} for document in documents]
    if len(sources) == 1:
        output.document({"report": str(sources[0]), "html": str(target), "verdict": verdicts[0]})
        output.line(f"{path_text(target)}: {verdicts[0].get('headline', 'written')}")
        return
    output.document({"reports": [str(source) for source in sources], "html": str(target), "verdicts": verdicts})
    output.line(f"{path_text(target)}: {count_text(len(sources), 'bundle')} compared")
    for source, verdict in zip(sources, verdicts, strict=True):
        output.line(f"  {path_text(source.parent)}: {verdict.get('headline', 'no verdict')}")


def _page(sources: list[Path], documents: list[dict[str, Any]], out: Path | None) -> tuple[str, Path]:
    """The page and where it goes."""
    if len(sources) == 1:
        from fluxkiln.verify.report.document import render_html

        return _rendered(sources, lambda: render_html(documents[0])), out or sources[0].with_name(PAGE)
    from fluxkiln.verify.report.comparison import render_comparison

    return _rendered(sources, lambda: render_comparison(documents)), out or Path(COMPARISON)


def _rendered(sources: list[Path], render: Callable[[], str]) -> str:
    try:
        return render()
    except Exception as error:  # whatever a template makes of a document with holes
        named = sources[0] if len(sources) == 1 else f"one of {', '.join(map(str, sources))}"
        raise IntegrityError(
            f"{named} is not complete ({type(error).__name__}: {error}); run the build again to write it"
        ) from error


def report_file(given: Path, settings_for: SettingsFor) -> Path:
    """The report.json that is meant; UsageError when there is none."""
    from fluxkiln.compile.targets import target_names

    if str(given) in target_names():
        from fluxkiln.build.context import prepare

        given = prepare(settings_for(str(given))).folder
    if given.is_file():
        return given
    for folder in (given, given.parent if (given / MANIFEST).exists() else given):
        if (folder / REPORT).is_file():
            return folder / REPORT
    if not given.exists():
        raise UsageError(f"{given} does not exist; give a bundle, the folder around it, a {REPORT}, or a target's name")
    raise UsageError(
        f"{given} has no {REPORT}; give a bundle, the folder around it, or one of the targets "
        f"{', '.join(target_names())}: a build with verification writes it"
    )


def read_report(source: Path) -> dict[str, Any]:
    """The document in a report.json.

    Raises:
        IntegrityError: no JSON object. UsageError: JSON of another kind or schema.
    """
    from fluxkiln.verify.report.document import SCHEMA

    try:
        document = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{source} is no JSON ({error}); run the build again to write it") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found != SCHEMA:
        raise UsageError(f"{source} has the schema {found!r}, a report has {SCHEMA!r}; give the {REPORT} of a build")
    return document
