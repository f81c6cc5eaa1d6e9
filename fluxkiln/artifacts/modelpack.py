"""A bundle as an OCI artifact of the CNCF ModelPack kind: one raw layer per file, nothing in a tar.

Source: github.com/modelpack/model-spec, specs-go/v1/mediatype.go and schema/config-schema.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fluxkiln.artifacts.bundle import read_manifest
from fluxkiln.artifacts.manifest import Manifest, Role
from fluxkiln.artifacts.paths import MANIFEST_FILE, resolve_inside
from fluxkiln.artifacts.store import MANIFEST_TYPE, Blob, Store
from fluxkiln.digests import Json, canonical_json
from fluxkiln.errors import IntegrityError

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
FILEPATH_ANNOTATION = "org.cncf.model.filepath"
PARITY_ANNOTATION = "org.fluxkiln.parity"

LAYER_TYPES: Mapping[Role, str] = {
    "binary": WEIGHT_TYPE,
    "weights": WEIGHT_TYPE,
    "constants": WEIGHT_TYPE,
    "tokenizer": WEIGHT_CONFIG_TYPE,
    "config": WEIGHT_CONFIG_TYPE,
    "licence": DOC_TYPE,
    "doc": DOC_TYPE,
}


def store_bundle(store: Store, bundle: Path, tag: str) -> str:
    """Put a bundle into the store under `tag` and return the digest of its OCI manifest.

    The same bundle gives the same digest: `build.json` stays outside, and no time is written. Blobs that the store
    has are not read again. The tag comes last: without it nothing counts as stored.

    Args:
        tag: `<name>:<target>`.

    Raises:
        IntegrityError: a file of the bundle does not have the digest its manifest says; the tag is unchanged.
        UsageError: `bundle` is no bundle, or `tag` no legal tag.
        ResourceError: the disk is full.
    """
    manifest = read_manifest(bundle)
    first = store.add_file(bundle / MANIFEST_FILE)
    layers: list[Json] = [_layer(first, WEIGHT_CONFIG_TYPE, MANIFEST_FILE)]
    digests = [first.digest]
    for entry in manifest.files:
        blob = Blob(entry.digest, entry.size)
        if not store.has(blob):
            found = store.add_file(resolve_inside(bundle, entry.path))
            if found != blob:
                raise IntegrityError(
                    f"{bundle / entry.path} has {found.digest} ({found.size} bytes), its manifest says {blob.digest} "
                    f"({blob.size} bytes); build the bundle again"
                )
        layers.append(_layer(blob, LAYER_TYPES[entry.role], entry.path))
        digests.append(blob.digest)
    config = store.add_bytes(modelpack_config(manifest, tuple(digests)))
    document = modelpack_document(manifest, config, layers)
    digest = store.add_bytes(document).digest
    store.tag(tag, digest)
    return digest


def parity_word(parity: Mapping[str, Json]) -> str:
    """`passed`, `failed`, or `unverified` where nothing was compared: what a manifest says for all to see."""
    if not parity.get("verified", parity.get("rows")):
        return "unverified"
    return "passed" if parity.get("passed") is True else "failed"


def modelpack_document(manifest: Manifest, config: Blob, layers: list[Json]) -> bytes:
    """The OCI manifest of a bundle; `layers` are descriptors, each with its path annotation."""
    document: Json = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": config.digest, "size": config.size},
        "layers": layers,
        "annotations": {
            "org.opencontainers.image.title": manifest.name,
            "org.opencontainers.image.licenses": manifest.licence.spdx,
            "org.fluxkiln.target": manifest.target,
            "org.fluxkiln.variant": manifest.variant,
            "org.fluxkiln.checkpoint": manifest.checkpoint.fingerprint,
            PARITY_ANNOTATION: parity_word(manifest.parity),
        },
    }
    return canonical_json(document)


def _layer(blob: Blob, media_type: str, path: str) -> dict[str, Json]:
    annotations: Json = {FILEPATH_ANNOTATION: path}
    return {"mediaType": media_type, "digest": blob.digest, "size": blob.size, "annotations": annotations}


def modelpack_config(manifest: Manifest, diff_ids: tuple[str, ...]) -> bytes:
    """The ModelPack config of a bundle; `diff_ids` are the digests of all layers in the manifest's order."""
    # The schema allows no other keys; further facts are annotations of the manifest.
    schemes: dict[str, int] = {}
    for part in manifest.parts:
        schemes[part.scheme] = schemes.get(part.scheme, 0) + part.size
    formats = sorted({Path(part.file).suffix.lstrip(".") for part in manifest.parts})
    config: Json = {
        "descriptor": {"name": manifest.name, "family": "flux.1", "licenses": [manifest.licence.spdx]},
        "config": {
            "architecture": "flux",
            "format": "+".join(formats),
            # The scheme that most bytes are in stands for the whole; manifest.json has one per part.
            "quantization": max(sorted(schemes), key=lambda scheme: schemes[scheme], default="none"),
            "capabilities": {"inputTypes": ["text"], "outputTypes": ["image"]},
        },
        "modelfs": {"type": "layers", "diffIds": diff_ids},
    }
    return canonical_json(config)
