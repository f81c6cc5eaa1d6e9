"""What a bundle was made from and by what, as an in-toto statement with a SLSA v1 predicate.

No time and no host: the same bundle gives the same bytes. Sources: in-toto attestation framework v1, statement.md and
resource_descriptor.md; slsa.dev/spec/v1.0/provenance.
"""

from __future__ import annotations

from fluxkiln.artifacts.manifest import Manifest
from fluxkiln.artifacts.store import Blob
from fluxkiln.digests import Json, canonical_json

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:fluxkiln:build:v1"
BUILDER = "urn:fluxkiln:builder"
# Settings that are about the reference run and not about what is built.
_INTERNAL = ("seed", "steps", "prompt")


def provenance_statement(manifest: Manifest, manifest_file: Blob, report: Blob | None, version: str) -> bytes:
    """The statement about a bundle.

    Args:
        manifest_file: digest and size of `manifest.json`.
        report: those of the parity report, where there is one.
        version: of the fluxkiln that publishes, for bundles that do not name the one that built them.
    """
    subjects: list[Json] = [{"name": "manifest.json", "digest": {"sha256": _hex(manifest_file.digest)}}]
    subjects += [{"name": file.path, "digest": {"sha256": file.sha256}} for file in manifest.files]
    schemes: dict[str, str] = {}
    for part in manifest.parts:
        schemes[part.kind] = part.scheme
    shapes = manifest.shapes
    checkpoint: Json = {
        "name": manifest.checkpoint.source,
        "digest": {"sha256": _hex(manifest.checkpoint.fingerprint)},
        "annotations": {"covers": "name, type, shape and bytes of every tensor", "variant": manifest.variant},
    }
    tools: list[Json] = [
        {"name": name, "uri": f"pkg:generic/{name}@{found}"} for name, found in sorted(manifest.tools.items())
    ]
    external: Json = {
        "name": manifest.name,
        "target": manifest.target,
        "variant": manifest.variant,
        "shapes": {"height": shapes.height, "width": shapes.width, "tokens": shapes.tokens},
        "schemes": schemes,
        **{name: value for name, value in manifest.settings.items() if name not in _INTERNAL},
    }
    details: dict[str, Json] = {
        "builder": {"id": BUILDER, "version": {"fluxkiln": manifest.tools.get("fluxkiln", version)}},
    }
    if report is not None:
        details["byproducts"] = [
            {"name": "report.json", "digest": {"sha256": _hex(report.digest)}, "mediaType": "application/json"}
        ]
    statement: Json = {
        "_type": STATEMENT_TYPE,
        "subject": subjects,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": external,
                "internalParameters": {n: v for n, v in manifest.settings.items() if n in _INTERNAL},
                "resolvedDependencies": [checkpoint, *tools],
            },
            "runDetails": details,
        },
    }
    return canonical_json(statement) + b"\n"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")
