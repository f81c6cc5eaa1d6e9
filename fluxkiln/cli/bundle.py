"""`fluxkiln inspect` and `verify`: what a finished bundle is asked for; `fluxkiln report`: the pages of builds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxkiln.cli.options import PATH, SettingsFor, TargetCommand, settings_options
from fluxkiln.cli.output import Output, count_text, json_option, open_progress, parity_text, path_text
from fluxkiln.cli.registry import inspect_published, transfer_options
from fluxkiln.documents import REPORT as REPORT_LIMITS
from fluxkiln.documents import read_object_file
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.build.publish import Transfers

MANIFEST, REPORT, PAGE, COMPARISON = "manifest.json", "report.json", "report.html", "comparison.html"


@click.command()
@click.argument("bundle")
@click.option("--parts", "all_parts", is_flag=True, help="Every part, instead of one line per kind.")
@click.option("--files", "all_files", is_flag=True, help="Every file, instead of one line per role.")
@transfer_options
@json_option
@click.pass_obj
def inspect_command(output: Output, transfers: Transfers, bundle: str, all_parts: bool, all_files: bool) -> None:
    """Show what a bundle is made of, in a folder or in a registry.

    BUNDLE is the folder that a build wrote, or a reference to a published one (oci-layout:PATH:TAG, HOST/REPO:TAG,
    hf://ORG/REPO@REV). Of a published one only manifests are read. A folder is checked as for images: files that were
    found whole before are not read again.
    """
    from fluxkiln.artifacts.about import read_about
    from fluxkiln.artifacts.manifest import describe_manifest
    from fluxkiln.artifacts.registry.place import looks_like_reference
    from fluxkiln.compile.bundle import further_sizes
    from fluxkiln.compile.opener import open_bundle
    from fluxkiln.patches.registry import component_of, title_of

    published: dict[str, Any] = {}
    if looks_like_reference(bundle):
        manifest, published["published"] = inspect_published(output, bundle, transfers)
    else:
        with open_progress() as progress:
            manifest = open_bundle(bundle_folder(Path(bundle)), progress).manifest
    described: dict[str, Any] = describe_manifest(manifest, component_of)
    output.document({**manifest.to_json(), "summary": described, **published})
    shapes, checkpoint = manifest.shapes, manifest.checkpoint
    output.facts(
        {
            "bundle": manifest.name,
            "target": manifest.target,
            "model": f"{title_of(manifest.variant)} from {checkpoint.source}, fingerprint {checkpoint.fingerprint}",
            "shapes": "; ".join(
                f"{one.width}x{one.height}, {count_text(one.tokens, 'token')}"
                for one in (shapes, *further_sizes(manifest))
            ),
            "size": f"{size_text(described['size'])} in {count_text(len(manifest.files), 'file')}",
            "licence": f"{manifest.licence.spdx}, text in {manifest.licence.file}",
            "parity": parity_text(manifest.parity),
            # beside "size", which is the bundle's own here
            **{name: sentence for name, sentence in read_about(manifest.parity).items() if name != "size"},
            "settings": _shown(manifest.settings),
            "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
        }
    )
    output.line()
    if all_parts:
        output.table(
            ("part", "kind", "scheme", ">size", "file", "net"),
            [(one.name, one.kind, one.scheme, size_text(one.size), one.file, one.net) for one in manifest.parts],
        )
    else:
        output.table(
            ("component", "kind", "scheme", ">parts", ">size"),
            [
                (kind["component"], kind["kind"], kind["scheme"], kind["parts"], size_text(kind["size"]))
                for kind in described["kinds"]
            ],
        )
    output.line()
    if all_files:
        rows = [(file.path, file.role, size_text(file.size), file.sha256) for file in manifest.files]
        output.table(("file", "role", ">size", "sha256"), rows)
        return
    roles = []
    for role, found in described["roles"].items():
        names = [file.path for file in manifest.files if file.role == role]
        some = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        roles.append((role, found["files"], size_text(found["size"]), some))
    output.table(("role", ">files", ">size", "names"), roles)


@click.command()
@click.argument("bundle", type=PATH)
@json_option
@click.pass_obj
def verify_command(output: Output, bundle: Path) -> None:
    """Compare every file of a bundle with the digest its manifest gives.

    The manifest is compared with itself, with the model's own parts and with what is in their files. This is
    integrity: the bytes are those that the build wrote. That they compute what diffusers computes is what the report of
    the build says.
    """
    from fluxkiln.compile.opener import open_bundle

    folder = bundle_folder(bundle)
    with open_progress() as progress:
        manifest = open_bundle(folder, progress, again=True).manifest
    size = sum(file.size for file in manifest.files)
    output.document({"bundle": str(folder), "files": len(manifest.files), "size": size, "intact": True})
    output.line(f"{folder}: {count_text(len(manifest.files), 'file')}, {size_text(size)}, all as the manifest says")


def bundle_folder(given: Path) -> Path:
    """The bundle that is meant: `given`, or the `bundle` inside it when a build's folder was given."""
    inside = given / "bundle"
    return inside if not (given / MANIFEST).exists() and (inside / MANIFEST).exists() else given


def _shown(values: Mapping[str, Any]) -> str:
    """Simple values of a JSON object in a line; what is nested is for --json."""
    words = {True: "yes", False: "no", None: "-"}
    simple = {
        name: words[value] if value is None or isinstance(value, bool) else value
        for name, value in values.items()
        if not isinstance(value, Mapping | list | tuple)
    }
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in simple.items())


@click.command(cls=TargetCommand)
@click.argument("where", metavar="BUILD...", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help=f"Where the page goes. Default: beside the (first) {REPORT}.")
@settings_options
@json_option
@click.pass_obj
def report_command(output: Output, settings_for: SettingsFor, where: tuple[Path, ...], out: Path | None) -> None:
    """Write a build's report.html again, or a page that compares several builds.

    It is made from their report.json; nothing is run. BUILD is a bundle, the folder around it, a report.json, or a
    target's name: then the options of `fluxkiln build` say which of its builds.
    """
    from fluxkiln.compile.targets import target_names
    from fluxkiln.files import write_durably

    if not {str(one) for one in where} & set(target_names()):
        settings_for.refuse("options of a build find the one of a target, and no target was named")
    sources = [_report_file(one, settings_for) for one in where]
    twice = next((source for source in sources if sources.count(source) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} was given twice; give the reports of different builds")
    documents = [_read_report(source) for source in sources]
    try:
        if len(sources) == 1:
            from fluxkiln.verify.report.document import render_html

            page, target = render_html(documents[0]), out or sources[0].with_name(PAGE)
        else:
            from fluxkiln.verify.report.comparison import render_comparison

            page, target = render_comparison(documents), out or sources[0].with_name(COMPARISON)
    except Exception as error:  # whatever a template makes of a document with holes
        named = sources[0] if len(sources) == 1 else f"one of {', '.join(map(str, sources))}"
        raise IntegrityError(
            f"{named} is not complete ({type(error).__name__}: {error}); run the build again to write it"
        ) from error
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


def _report_file(given: Path, settings_for: SettingsFor) -> Path:
    from fluxkiln.compile.targets import target_names

    if str(given) in target_names():
        from fluxkiln.build.make import prepare

        given = prepare(settings_for(str(given))).plan.folder
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


def _read_report(source: Path) -> dict[str, Any]:
    from fluxkiln.verify.report.document import SCHEMA

    document = read_object_file(source, remedy="run the build again to write it", limits=REPORT_LIMITS)
    found = document.get("schema")
    if found != SCHEMA:
        raise UsageError(f"{source} has the schema {found!r}, a report has {SCHEMA!r}; give the {REPORT} of a build")
    return document
