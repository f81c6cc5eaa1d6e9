"""`fluxkiln inspect` and `fluxkiln verify`: what a finished bundle is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fluxkiln.cli.output import Output, count_text, json_option, parity_text
from fluxkiln.cli.registry import inspect_published, transfer_options
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.artifacts.manifest import Manifest
    from fluxkiln.build.publish import Transfers

MANIFEST = "manifest.json"

_path = click.Path(path_type=Path)


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
    hf://ORG/REPO@REV). Its manifest is read and checked; `fluxkiln verify` reads a folder's files too.
    """
    from fluxkiln.artifacts.bundle import read_manifest
    from fluxkiln.artifacts.manifest import describe_manifest
    from fluxkiln.artifacts.registry.place import looks_like_reference
    from fluxkiln.patches.registry import component_of, title_of

    published: dict[str, Any] = {}
    if looks_like_reference(bundle):
        manifest, published["published"] = inspect_published(output, bundle, transfers)
    else:
        manifest = read_manifest(bundle_folder(Path(bundle)))
    described: dict[str, Any] = describe_manifest(manifest, component_of)
    output.document({**manifest.to_json(), "summary": described, **published})
    shapes = manifest.shapes
    output.facts(
        {
            "bundle": manifest.name,
            "target": manifest.target,
            "model": f"{title_of(manifest.variant)} from {manifest.checkpoint.source}, fingerprint "
            f"{manifest.checkpoint.fingerprint}",
            "shapes": f"{shapes.width}x{shapes.height}, {count_text(shapes.tokens, 'token')}",
            "size": f"{size_text(described['size'])} in {count_text(len(manifest.files), 'file')}",
            "licence": f"{manifest.licence.spdx}, text in {manifest.licence.file}",
            "parity": parity_text(manifest.parity),
            "settings": _shown(manifest.settings),
            "tools": ", ".join(f"{name} {version}" for name, version in manifest.tools.items()),
        }
    )
    output.line()
    output.table(*_parts(manifest, described, all_parts))
    output.line()
    output.table(*_files(manifest, described, all_files))


@click.command()
@click.argument("bundle", type=_path)
@json_option
@click.pass_obj
def verify_command(output: Output, bundle: Path) -> None:
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


def _shown(values: Mapping[str, Any]) -> str:
    """Simple values of a JSON object in a line; what is nested is for --json."""
    words = {True: "yes", False: "no", None: "-"}
    simple = {
        name: words[value] if value is None or isinstance(value, bool) else value
        for name, value in values.items()
        if not isinstance(value, Mapping | list | tuple)
    }
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in simple.items())


def _parts(manifest: Manifest, described: Mapping[str, Any], every: bool) -> tuple[Sequence[str], list[Sequence[str]]]:
    if every:
        return ("part", "kind", "scheme", ">size", "file", "net"), [
            (part.name, part.kind, part.scheme, size_text(part.size), part.file, part.net) for part in manifest.parts
        ]
    return ("component", "kind", "scheme", ">parts", ">size"), [
        (kind["component"], kind["kind"], kind["scheme"], str(kind["parts"]), size_text(kind["size"]))
        for kind in described["kinds"]
    ]


def _files(manifest: Manifest, described: Mapping[str, Any], every: bool) -> tuple[Sequence[str], list[Sequence[str]]]:
    if every:
        return ("file", "role", ">size", "sha256"), [
            (file.path, file.role, size_text(file.size), file.sha256) for file in manifest.files
        ]
    return ("role", ">files", ">size", "names"), [
        (role, str(found["files"]), size_text(found["size"]),
         _some([file.path for file in manifest.files if file.role == role]))
        for role, found in described["roles"].items()
    ]  # fmt: skip


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
