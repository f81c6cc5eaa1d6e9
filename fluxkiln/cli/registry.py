"""`fluxkiln publish`, `pull`, `tag`, `ls` and `diff`: bundles in registries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fluxkiln.cli.options import PATH, SettingsFor, TargetCommand, settings_options
from fluxkiln.cli.output import Output, count_text, json_option, open_progress
from fluxkiln.errors import UsageError
from fluxkiln.settings import parse_bytes
from fluxkiln.verify.report.page import size as size_text

if TYPE_CHECKING:
    from fluxkiln.build.publish import Transfers

MOST_SECONDS = 1_000_000
_F = TypeVar("_F", bound=Callable[..., Any])

PARITY_WORDS = {
    "passed": "passed",
    "failed": "FAILED: it missed a gate when it was built",
    "unverified": "not verified when it was built",
}


def transfer_options(command: _F) -> _F:
    """Adds --plain-http, --transfers and --deadline and hands them over as `transfers`."""

    @functools.wraps(command)
    def wrapped(*args: Any, plain_http: bool, parallel: int, deadline: float, **kwargs: Any) -> Any:
        from fluxkiln.artifacts.registry.transfer import Patience
        from fluxkiln.build.publish import Transfers

        if parallel < 1:
            raise UsageError(f"--transfers {parallel}: at least 1 is needed; leave the option out for the default")
        if not 1 <= deadline <= MOST_SECONDS:  # NaN is in no range
            raise UsageError(f"--deadline {deadline}: it must be from 1 to {MOST_SECONDS} seconds")
        return command(*args, transfers=Transfers(plain_http, parallel, Patience(deadline=deadline)), **kwargs)

    text = "Files under way at once. Default: 4."
    wrapped = click.option("--transfers", "parallel", type=click.IntRange(max=64), metavar="N", default=4, help=text)(
        wrapped
    )
    text = "Seconds until a registry is given up. Each MiB that is moved adds 4. Default: 300."
    wrapped = click.option("--deadline", type=float, metavar="SECONDS", default=300.0, help=text)(wrapped)
    text = "No TLS. For a registry on this machine it is not used anyway."
    return click.option("--plain-http", is_flag=True, help=text)(wrapped)  # type: ignore[return-value]


@click.command(cls=TargetCommand)
@click.argument("bundle")
@click.argument("reference", metavar="REF")
@click.option(
    "--accept-license", "accepted", multiple=True, metavar="NAME",
    help="You have read this licence and may pass the bundle on under it: flux-1-dev.",
)  # fmt: skip
@click.option("--allow-failed-parity", is_flag=True, help="Publish a bundle that missed a gate, marked as failed.")
@click.option("--sign", "sign_key", type=PATH, metavar="KEY", help="Sign with this private key (PEM, P-256 say).")
@click.option(
    "--lora-license", "lora_licences", type=PATH, multiple=True, metavar="FILE",
    help="Licence of an adapter that is in the weights; goes with the bundle.",
)  # fmt: skip
@transfer_options
@settings_options
@json_option
@click.pass_obj
def publish_command(
    output: Output, /, settings_for: SettingsFor, transfers: Transfers, bundle: str, reference: str, **terms: Any
) -> None:
    """Publish a bundle to a registry: a folder, an OCI registry or the Hub.

    Its report, provenance, model card and licence go with it. BUNDLE is the folder that a build wrote, or a target's
    name: then the options of `fluxkiln build` say which of its builds. REF is oci-layout:PATH:TAG (a folder, no
    server), HOST/REPO:TAG (any OCI registry) or hf://ORG/REPO@TAG; without a tag the target's name is the tag. What
    the registry has is not sent again, and the tag appears when all of it is there. Credentials come from Docker's
    configuration or HF_TOKEN.
    """
    from fluxkiln.artifacts.registry.place import parse_reference, with_tag
    from fluxkiln.build.publish import Terms, publish_bundle, read_described

    folder = _folder(bundle, settings_for)
    parsed = parse_reference(reference, tagged=False)
    with open_progress() as progress:
        if not parsed.name:
            reference = str(with_tag(parsed, read_described(str(folder), progress=progress).target))
        done = publish_bundle(folder, reference, Terms(**terms), transfers=transfers, progress=progress)
    pushed = done.pushed
    output.document(
        {
            "reference": done.reference,
            "digest": done.document.digest,
            "size": done.document.size,
            "sent": pushed.sent,
            "sent_files": pushed.files,
            "present_files": pushed.present,
            "parity": done.parity,
            "signed": done.signed,
        }
    )
    output.facts(
        {
            "published": done.reference,
            "digest": done.document.digest,
            "sent": f"{size_text(pushed.sent)}: {count_text(len(pushed.files), 'file')}, {pushed.present} were there",
            "parity": PARITY_WORDS[done.parity],
            "signature": "signed" if done.signed else "unsigned: --sign KEY lets others tell that it is yours",
        }
    )


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("destination", metavar="DIR", type=PATH)
@click.option("--verify", "verify_key", type=PATH, metavar="KEY", help="The publisher's public key (PEM).")
@click.option("--require-signature", is_flag=True, help="Refuse what is not signed by that key.")
@click.option("--max-size", metavar="SIZE", help="Refuse what is larger, 40GB say, before it comes. Default: 4TiB.")
@transfer_options
@json_option
@click.pass_obj
def pull_command(
    output: Output, /, reference: str, destination: Path, verify_key: Path | None, max_size: str | None, **how: Any
) -> None:
    """Fetch a bundle from a registry and check every byte.

    It comes into DIR/bundle, and beside it its model card, provenance, report and signature. DIR appears when all is
    there; an interrupted pull goes on where it ended. An earlier pull in DIR is replaced. REF is as for
    `fluxkiln publish`; @sha256:... names a digest in place of a tag.
    """
    from fluxkiln.build.publish import UNSIGNED, pull_bundle

    how["most"] = parse_bytes(max_size) if max_size else None
    with open_progress() as progress:
        done = pull_bundle(reference, destination, verify_key=verify_key, progress=progress, **how)
    document = done.found.document
    output.document(
        {
            "reference": reference,
            "destination": str(destination),
            "digest": document.digest,
            "size": document.size,
            "files": len(document.layers),
            "parity": done.parity,
            "signature": done.signature,
        }
    )
    output.facts(
        {
            "pulled": str(destination),
            "digest": document.digest,
            "size": f"{size_text(document.size)} in {count_text(len(document.layers), 'file')}, all checked",
            "parity": PARITY_WORDS[done.parity],
            "signature": {
                "verified": f"made with the private half of {verify_key}",
                "not checked": "there is one, and it was not compared: --verify KEY does",
                "unsigned": UNSIGNED,
            }[done.signature],
        }
    )


@click.command()
@click.argument("reference", metavar="REF")
@click.argument("tag")
@transfer_options
@json_option
@click.pass_obj
def tag_command(output: Output, transfers: Transfers, reference: str, tag: str) -> None:
    """Give a published bundle another tag.

    TAG is the new one, in the same repository; nothing but the manifest is sent.
    """
    from fluxkiln.build.publish import tag_reference

    target, document = tag_reference(reference, tag, transfers)
    output.document({"reference": str(target), "digest": document.digest})
    output.line(f"{target}: {document.digest}")


@click.command()
@click.argument("repository", metavar="REPO")
@transfer_options
@json_option
@click.pass_obj
def ls_command(output: Output, transfers: Transfers, repository: str) -> None:
    """List the bundles of a repository by their tags.

    REPO is a reference without a tag: oci-layout:PATH, HOST/REPO or hf://ORG/REPO.
    """
    from fluxkiln.build.publish import list_tags

    place, found = list_tags(repository, transfers)
    rows: list[dict[str, Any]] = []
    for name, document in found.items():
        row = {"tag": name, "bundle": document is not None}
        if document is not None:
            notes = document.annotations
            row |= {
                "digest": document.digest,
                "name": notes.get("org.opencontainers.image.title", ""),
                "target": notes.get("org.fluxkiln.target", ""),
                "licence": notes.get("org.opencontainers.image.licenses", ""),
                "parity": notes.get("org.fluxkiln.parity", ""),
                "signed": document.find("model.sig") is not None,
                "size": document.size,
            }
        rows.append(row)
    output.document({"repository": str(place), "tags": rows})
    if not rows:
        output.line(f"{place} has no tags")
        return
    shown = []
    for row in rows:
        if row["bundle"]:
            ends = "yes" if row["signed"] else "no", size_text(row["size"]), row["digest"]
            shown.append((row["tag"], row["name"], row["target"], row["parity"], *ends))
        else:
            shown.append((row["tag"], "no bundle of fluxkiln", "", "", "", "", ""))
    output.table(("tag", "name", "target", "parity", "signed", ">size", "digest"), shown)


@click.command()
@click.argument("one", metavar="REF")
@click.argument("other", metavar="REF")
@transfer_options
@json_option
@click.pass_obj
def diff_command(output: Output, transfers: Transfers, one: str, other: str) -> None:
    """Show what changed from one bundle to another.

    That is parts, schemes, tools, parity. Each REF is a reference or a bundle's folder. Of what is published only
    manifests are read; a folder is checked as by every other command.
    """
    from fluxkiln.artifacts.manifest import compare_manifests, is_same
    from fluxkiln.build.publish import read_described

    with open_progress() as progress:
        described = (read_described(text, transfers, progress) for text in (one, other))
        found: dict[str, Any] = compare_manifests(*described)
    output.document({"one": one, "other": other, "same": is_same(found), **found})
    if is_same(found):
        output.line("no difference")
        return
    rows = []
    for group, changes in found.items():
        if group not in ("parts", "files"):
            rows += [(group, name, _short(change["from"]), _short(change["to"])) for name, change in changes.items()]
            continue
        rows += [(group, name, "", "added") for name in changes["added"]]
        rows += [(group, name, "removed", "") for name in changes["removed"]]
        for name, change in changes["changed"].items():
            # A new scheme explains the new digest.
            for what in [key for key in change if key != "digest"] or ["digest"]:
                rows.append((group, f"{name} {what}", _short(change[what]["from"]), _short(change[what]["to"])))
    output.table(("what", "name", "from", "to"), rows)


def inspect_published(output: Output, reference: str, transfers: Transfers) -> tuple[Any, dict[str, Any]]:
    """The bundle's manifest under a reference, and what only the registry knows of it, for `fluxkiln inspect`."""
    from fluxkiln.build.publish import UNSIGNED, inspect_reference

    found = inspect_reference(reference, transfers)
    document = found.document
    published = {
        "reference": reference,
        "digest": document.digest,
        "size": document.size,
        "signed": document.find("model.sig") is not None,
        "annotations": dict(document.annotations),
        "layers": [asdict(layer) for layer in document.layers],
    }
    signed = "there is one; `fluxkiln pull --verify KEY` compares it" if published["signed"] else UNSIGNED
    output.facts({"reference": reference, "digest": document.digest, "signature": signed})
    return found.manifest, published


def _folder(given: str, settings_for: SettingsFor) -> Path:
    """The bundle, or the folder around it, that is meant."""
    if Path(given).exists():
        settings_for.refuse(f"{given} is a folder, and options of a build find the one of a target")
        return Path(given)
    from fluxkiln.compile.targets import target_names

    if given not in target_names():
        raise UsageError(
            f"{given} does not exist; give the folder of a bundle, or one of the targets {', '.join(target_names())}"
        )
    from fluxkiln.build.make import prepare

    return prepare(settings_for(given)).plan.folder


def _short(value: Any) -> str:
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."
