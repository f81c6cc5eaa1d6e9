"""`fluxkiln patches`."""

from __future__ import annotations

import click

from fluxkiln.cli.output import Output, json_option


@click.command()
@json_option
@click.pass_obj
def patches(output: Output) -> None:
    """List what is rewritten in diffusers and transformers, and whether it still fits.

    A patch is `ok` while the source of every function that it stands for is one that it was checked with. A build
    refuses patches that are `changed`.
    """
    from fluxkiln.patches.patch import examine
    from fluxkiln.patches.registry import all_models

    every = {patch.name: patch for model in reversed(all_models()) for patch in model.patches()}
    statuses = [examine(patch) for patch in every.values()]
    documents = []
    for status in statuses:
        patch = status.patch
        documents.append(
            {
                "name": patch.name,
                "kinds": patch.kinds,
                "formats": patch.formats,
                "replaces": patch.replaces,
                "attribute": bool(patch.replacement),
                "reason": patch.reason,
                "until": patch.until,
                "installed": status.installed,
                "state": "changed" if status.changed else "ok",
                "changed": status.changed,
            }
        )
    output.document({"patches": documents})
    output.table(
        ("patch", "state", "kinds", "checked with", "installed"),
        [
            (
                status.patch.name,
                "changed" if status.changed else "ok",
                ", ".join(status.patch.kinds),
                ", ".join(sorted({version for known in status.patch.replaces.values() for version in known.values()})),
                ", ".join(f"{name} {version}" for name, version in status.installed.items()),
            )
            for status in statuses
        ],
    )
    for status in statuses:
        patch = status.patch
        verb = "replaces" if patch.replacement else "restates"
        output.line(f"\n{patch.name} {verb} {', '.join(map(_short, patch.replaces))}")
        if status.changed:
            output.line(f"  changed: {', '.join(status.changed)}")
        output.line(f"  why:     {patch.reason}")
        output.line(f"  until:   {patch.until}")


def _short(dotted: str) -> str:
    """The function's name, with its class where it has one."""
    pieces = dotted.split(".")
    return ".".join(pieces[-2:] if pieces[-2][:1].isupper() else pieces[-1:])
