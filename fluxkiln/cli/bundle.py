"""`fluxkiln inspect`, `fluxkiln report` and `fluxkiln verify`: what a finished build is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxkiln.cli.options import SettingsFor, settings_options
from fluxkiln.cli.output import Output, count_text, json_option, parity_text, path_text, size_text
from fluxkiln.cli.registry import inspect_published, transfer_options
from fluxkiln.errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from fluxkiln.artifacts.manifest import Manifest
    from fluxkiln.publishing import Transfers

MANIFEST, REPORT, PAGE = "manifest.json", "report.json", "report.html"

_path = click.Path(path_type=Path)


@click.command()
@click.argument("bundle")
@click.option("--parts", "all_parts", is_flag=True, help="Every part, instead of one line per kind.")
@click.option("--files", "all_files", is_flag=True, help="Every file, instead of one line per role.")
@transfer_options
@json_option
@click.pass_obj
def inspect(output: Output, transfers: Transfers, bundle: str, all_parts: bool, all_files: bool) -> None:
    """Show what a bundle is made of, in a folder or in a registry.

    BUNDLE is the folder that a build wrote, or a reference to a published one (oci-layout:PATH:TAG, HOST/REPO:TAG,
    hf://ORG/REPO@REV). Its manifest is read and checked; `fluxkiln verify` reads a folder's files too.
    """
    from fluxkiln.artifacts.bundle import read_manifest
    from fluxkiln.artifacts.manifest import describe_manifest
    from fluxkiln.artifacts.registry.reference import looks_like_reference

    published: dict[str, Any] = {}
    if looks_like_reference(bundle):
        manifest, published["published"] = inspect_published(output, bundle, transfers)
    else:
        manifest = read_manifest(bundle_folder(Path(bundle)))
    described: dict[str, Any] = describe_manifest(manifest)
    summary = {key: described[key] for key in ("size", "kinds", "roles")}
    output.document({**manifest.to_json(), "summary": summary, **published})
    shapes = manifest.shapes
    output.facts(
        {
            "bundle": manifest.name,
            "target": manifest.target,
            "model": f"FLUX.1-{manifest.variant} from {manifest.checkpoint.source}, fingerprint "
            f"{manifest.checkpoint.fingerprint}",
            "shapes": f"{shapes.width}x{shapes.height}, {count_text(shapes.tokens, 'token')}",
            "size": f"{size_text(described['size'])} in {count_text(len(manifest.files), 'file')}",
            "licence": f"{manifest.licence.spdx}, text in {manifest.licence.file}",
            "parity": parity_text(manifest.parity),
            "settings": _shown(manifest.settings),
            "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
        }
    )
    _show_parts(output, manifest, described, all_parts)
    _show_files(output, manifest, described, all_files)


@click.command()
@click.argument("where", metavar="BUILD", type=_path)
@settings_options
@json_option
@click.pass_obj
def report(output: Output, settings_for: SettingsFor, where: Path) -> None:
    """Write a build's report.html again from its report.json.

    BUILD is a bundle, the folder around it, a report.json, or a target's name: then the options of `fluxkiln build`
    say which of its builds.
    """
    from fluxkiln.artifacts.files import write_durably
    from fluxkiln.verify.report import render_html

    source = report_file(where, settings_for)
    document = read_report(source)
    try:
        page = render_html(document)
    except Exception as error:  # whatever a template makes of a document with holes
        raise IntegrityError(
            f"{source} is not complete ({type(error).__name__}: {error}); run the build again to write it"
        ) from error
    write_durably(source.with_name(PAGE), page.encode())
    verdict = document.get("verdict") or {}
    output.document({"report": str(source), "html": str(source.with_name(PAGE)), "verdict": verdict})
    output.line(f"{path_text(source.with_name(PAGE))}: {verdict.get('headline', 'written')}")


@click.command()
@click.argument("bundle", type=_path)
@json_option
@click.pass_obj
def verify(output: Output, bundle: Path) -> None:
    """Compare every file of a bundle with the digest its manifest gives.

    This is integrity: the bytes are those that the build wrote. That they compute what diffusers computes is what the
    report of the build says.
    """
    from fluxkiln.artifacts.bundle import verify_bundle

    folder = bundle_folder(bundle)
    manifest = verify_bundle(folder)
    size = sum(file.size for file in manifest.files)
    output.document({"bundle": str(folder), "files": len(manifest.files), "size": size, "intact": True})
    output.line(f"{folder}: {count_text(len(manifest.files), 'file')}, {size_text(size)}, all as the manifest says")


def bundle_folder(given: Path) -> Path:
    """The bundle that is meant: `given`, or the `bundle` inside it when a build's folder was given."""
    inside = given / "bundle"
    return inside if not (given / MANIFEST).exists() and (inside / MANIFEST).exists() else given


def report_file(given: Path, settings_for: SettingsFor) -> Path:
    """The report.json that is meant; UsageError when there is none."""
    from fluxkiln.compile.targets import target_names

    if str(given) in target_names():
        from fluxkiln.preparing import prepare

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
    from fluxkiln.verify.report import SCHEMA

    try:
        document = json.loads(source.read_bytes())
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{source} is no JSON ({error}); run the build again to write it") from error
    found = document.get("schema") if isinstance(document, dict) else None
    if not isinstance(document, dict) or found != SCHEMA:
        raise UsageError(f"{source} has the schema {found!r}, a report has {SCHEMA!r}; give the {REPORT} of a build")
    return document


def _shown(values: Mapping[str, Any]) -> str:
    """Simple values of a JSON object in a line; what is nested is for --json."""
    words = {True: "yes", False: "no", None: "-"}
    simple = {
        name: words[value] if value is None or isinstance(value, bool) else value
        for name, value in values.items()
        if not isinstance(value, Mapping | list | tuple)
    }
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in simple.items())


def _show_parts(output: Output, manifest: Manifest, described: Mapping[str, Any], every: bool) -> None:
    output.line()
    if every:
        output.table(
            ("part", "kind", "scheme", "size", "file", "net"),
            [(part.name, part.kind, part.scheme, size_text(part.size), part.file, part.net) for part in manifest.parts],
            numbers=("size",),
        )
        return
    output.table(
        ("component", "kind", "scheme", "parts", "size"),
        [
            (kind["component"], kind["kind"], kind["scheme"], str(kind["parts"]), size_text(kind["size"]))
            for kind in described["kinds"]
        ],
        numbers=("parts", "size"),
    )


def _show_files(output: Output, manifest: Manifest, described: Mapping[str, Any], every: bool) -> None:
    output.line()
    if every:
        output.table(
            ("file", "role", "size", "sha256"),
            [(file.path, file.role, size_text(file.size), file.sha256) for file in manifest.files],
            numbers=("size",),
        )
        return
    files: dict[str, list[str]] = {}
    for file in manifest.files:
        files.setdefault(file.role, []).append(file.path)
    output.table(
        ("role", "files", "size", "names"),
        [
            (role, str(entry["files"]), size_text(entry["size"]), _some(files[role]))
            for role, entry in described["roles"].items()
        ],
        numbers=("files", "size"),
    )


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
