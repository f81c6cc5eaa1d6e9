"""A bundle as an OCI artifact of the CNCF ModelPack kind: one raw layer per file, nothing in a tar.

What is read came from another machine: paths, sizes and numbers of things are checked before a byte is written.
Sources: OCI image-spec v1.1, manifest.md; github.com/modelpack/model-spec, mediatype.go and config-schema.json.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fluxkiln.artifacts.intact import BUNDLE, read_manifest
from fluxkiln.artifacts.manifest import MANIFEST_FILE, Manifest, Role, resolve_inside, validate_manifest_paths
from fluxkiln.artifacts.store import MANIFEST_TYPE, Blob, Store
from fluxkiln.digests import DIGEST, Json, canonical_json, digest_bytes
from fluxkiln.documents import read_object
from fluxkiln.errors import IntegrityError

ARTIFACT_TYPE = "application/vnd.cncf.model.manifest.v1+json"
CONFIG_TYPE = "application/vnd.cncf.model.config.v1+json"
WEIGHT_TYPE = "application/vnd.cncf.model.weight.v1.raw"
WEIGHT_CONFIG_TYPE = "application/vnd.cncf.model.weight.config.v1.raw"
CODE_TYPE = "application/vnd.cncf.model.code.v1.raw"
DOC_TYPE = "application/vnd.cncf.model.doc.v1.raw"
FILEPATH_ANNOTATION = "org.cncf.model.filepath"
PARITY_ANNOTATION = "org.fluxkiln.parity"
MANIFEST_ANNOTATION = "org.fluxkiln.manifest"

LAYER_TYPES: Mapping[Role, str] = {
    "binary": WEIGHT_TYPE,
    "weights": WEIGHT_TYPE,
    "constants": WEIGHT_TYPE,
    "tokenizer": WEIGHT_CONFIG_TYPE,
    "config": WEIGHT_CONFIG_TYPE,
    "licence": DOC_TYPE,
    "doc": DOC_TYPE,
}

CARD, PROVENANCE, REPORT, SIGNATURE = "README.md", "provenance.json", "report.json", "model.sig"
LICENCES = "licenses"
# Beside the files of the bundle.
EXTRAS = (CARD, PROVENANCE, REPORT, SIGNATURE)

# What registries accept, and far above what a bundle has.
MAX_DOCUMENT_BYTES = 4 << 20
MAX_CONFIG_BYTES = 1 << 20
MAX_EXTRA_BYTES = 64 << 20
MAX_FILES = 10_000
MAX_FILE_BYTES = 1 << 40
MAX_TOTAL_BYTES = 4 << 40

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_LAYER_TYPES = (WEIGHT_TYPE, WEIGHT_CONFIG_TYPE, DOC_TYPE, CODE_TYPE)


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of an artifact: where it belongs, and which bytes it must have."""

    path: str
    digest: str
    size: int
    media_type: str = DOC_TYPE


@dataclass(frozen=True, slots=True)
class Document:
    """An OCI manifest that was checked, and its very bytes: the digest is over them."""

    data: bytes
    config: Layer
    layers: tuple[Layer, ...]
    annotations: Mapping[str, str]

    @property
    def digest(self) -> str:
        return digest_bytes(self.data)

    @property
    def size(self) -> int:
        """Bytes of all layers."""
        return sum(layer.size for layer in self.layers)

    def find(self, path: str) -> Layer | None:
        """The layer of that path, if there is one."""
        return next((layer for layer in self.layers if layer.path == path), None)


def is_extra(path: str) -> bool:
    """Whether a layer of that path lies beside the bundle and not in it."""
    return path in EXTRAS or path.startswith(LICENCES + "/")


def pulled_path(path: str) -> str:
    """Where a layer of that path lies in a pulled folder."""
    return path if is_extra(path) else f"{BUNDLE}/{path}"


def store_bundle(store: Store, bundle: Path, tag: str) -> str:
    """Put a bundle into the store under `tag` and return the digest of its OCI manifest.

    The same bundle gives the same digest: `build.json` stays outside, and no time is written. Blobs that the store
    has are not read again. The tag comes last: without it nothing counts as stored.

    Args:
        tag: `<name>:<target>`.

    Raises:
        IntegrityError: a file of the bundle does not have the digest its manifest says; the tag is unchanged.
        UsageError: `bundle` is no bundle, or `tag` no legal tag. ResourceError: the disk is full.
    """
    manifest = read_manifest(bundle)
    first = store.add_file(bundle / MANIFEST_FILE)
    layers = bundle_layers(manifest, first)
    for layer in layers[1:]:
        blob = Blob(layer.digest, layer.size)
        if not store.has(blob):
            found = store.add_file(resolve_inside(bundle, layer.path))
            if found != blob:
                raise IntegrityError(
                    f"{bundle / layer.path} has {found.digest} ({found.size} bytes), its manifest says {blob.digest} "
                    f"({blob.size} bytes); build the bundle again"
                )
    config, document = write_document(manifest, layers)
    store.add_bytes(config)
    digest = store.add_bytes(document).digest
    store.tag(tag, digest)
    return digest


def parity_word(parity: Mapping[str, Json]) -> str:
    """`passed`, `failed`, or `unverified` where nothing was compared: what a manifest says for all to see."""
    if not parity.get("verified", parity.get("rows")):
        return "unverified"
    return "passed" if parity.get("passed") is True else "failed"


def bundle_layers(manifest: Manifest, manifest_file: Blob) -> list[Layer]:
    """One layer for every file of a bundle, its manifest first."""
    first = Layer(MANIFEST_FILE, manifest_file.digest, manifest_file.size, WEIGHT_CONFIG_TYPE)
    return [first, *(Layer(file.path, file.digest, file.size, LAYER_TYPES[file.role]) for file in manifest.files)]


def write_document(manifest: Manifest, layers: Sequence[Layer]) -> tuple[bytes, bytes]:
    """The ModelPack config of a bundle, and the OCI manifest that names it and the layers."""
    # The schema allows no other keys; further facts are annotations of the manifest.
    schemes: Counter[str] = Counter()
    for part in manifest.parts:
        schemes[part.scheme] += part.size
    formats = sorted({Path(part.file).suffix.lstrip(".") for part in manifest.parts})
    config = canonical_json(
        {
            "descriptor": {"name": manifest.name, "family": "flux.1", "licenses": [manifest.licence.spdx]},
            "config": {
                "architecture": "flux",
                "format": "+".join(formats),
                # The scheme that most bytes are in stands for the whole; manifest.json has one per part.
                "quantization": max(sorted(schemes), key=lambda scheme: schemes[scheme], default="none"),
                "capabilities": {"inputTypes": ["text"], "outputTypes": ["image"]},
            },
            "modelfs": {"type": "layers", "diffIds": [layer.digest for layer in layers]},
        }
    )
    document: Json = {
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "artifactType": ARTIFACT_TYPE,
        "config": {"mediaType": CONFIG_TYPE, "digest": digest_bytes(config), "size": len(config)},
        "layers": [
            {
                "mediaType": layer.media_type,
                "digest": layer.digest,
                "size": layer.size,
                "annotations": {FILEPATH_ANNOTATION: layer.path},
            }
            for layer in layers
        ],
        "annotations": {
            "org.opencontainers.image.title": manifest.name,
            "org.opencontainers.image.licenses": manifest.licence.spdx,
            "org.fluxkiln.target": manifest.target,
            "org.fluxkiln.variant": manifest.variant,
            "org.fluxkiln.checkpoint": manifest.checkpoint.fingerprint,
            PARITY_ANNOTATION: parity_word(manifest.parity),
            MANIFEST_ANNOTATION: manifest.digest,
        },
    }
    return config, canonical_json(document)


def parse_document(data: bytes, where: str, digest: str = "") -> Document:
    """Check the bytes of an OCI manifest.

    Args:
        where: what they are, for messages. digest: what their digest must be; empty where nothing says so.

    Raises:
        IntegrityError: another digest, too large, no strict JSON, not a ModelPack manifest, an illegal path, size or
            digest, two layers for one file, too many or too large layers.
    """
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _refuse(where, f"is larger than {MAX_DOCUMENT_BYTES} bytes")
    if digest and digest_bytes(data) != digest:
        raise IntegrityError(
            f"{where} has the digest {digest_bytes(data)}, {digest} was asked for; fetch it again, or publish it again"
        )
    value = read_object(data, where)
    if value.get("schemaVersion") != 2 or isinstance(value.get("schemaVersion"), bool):
        raise _refuse(where, f"has schemaVersion {value.get('schemaVersion')!r}; 2 is the one that is read")
    if value.get("mediaType") != MANIFEST_TYPE:
        raise _refuse(where, f"has the media type {value.get('mediaType')!r}; a bundle's is {MANIFEST_TYPE}")
    if value.get("artifactType") != ARTIFACT_TYPE:
        raise _refuse(where, f"has the artifact type {value.get('artifactType')!r}; a bundle's is {ARTIFACT_TYPE}")
    config = _layer(value.get("config"), f"{where}: config", (CONFIG_TYPE,), MAX_CONFIG_BYTES, with_path=False)
    entries = value.get("layers")
    if not isinstance(entries, list) or not entries:
        raise _refuse(where, "has no layers")
    if len(entries) > MAX_FILES:
        raise _refuse(where, f"has {len(entries)} layers; {MAX_FILES} are the most")
    layers = tuple(_layer(entry, f"{where}: layer {i}", _LAYER_TYPES) for i, entry in enumerate(entries))
    annotations = value.get("annotations", {})
    if not isinstance(annotations, Mapping) or not all(isinstance(text, str) for text in annotations.values()):
        raise _refuse(where, "has annotations that are no texts")
    _check_texts(annotations, f"{where}: annotations")
    _check_layers(layers, where)
    return Document(data, config, layers, {name: str(text) for name, text in annotations.items()})


def check_config(document: Document, data: bytes, where: str) -> None:
    """Compare the ModelPack config with the manifest that names it; IntegrityError where they differ."""
    modelfs = read_object(data, f"{where}: config").get("modelfs")
    if not isinstance(modelfs, Mapping) or modelfs.get("type") != "layers":
        raise _refuse(f"{where}: config", "has no modelfs of type 'layers'")
    if modelfs.get("diffIds") != [layer.digest for layer in document.layers]:
        raise _refuse(f"{where}: config", "lists other layers than the manifest that names it")


def check_bundle(document: Document, manifest: Manifest, where: str) -> None:
    """Compare an artifact with the bundle's own `manifest.json`: its digest, and in the layers the same files, digests
    and sizes, and nothing else.

    Raises IntegrityError: names the first file that differs.
    """
    if (found := document.annotations.get(MANIFEST_ANNOTATION)) != manifest.digest:
        raise _refuse(where, f"is for a bundle whose manifest has the digest {found}, its {MANIFEST_FILE} has "
                          f"{manifest.digest}")  # fmt: skip
    _check_texts(manifest.to_json(), f"{where}: {MANIFEST_FILE}")
    layers = {layer.path: layer for layer in document.layers if layer.path != MANIFEST_FILE}
    for file in manifest.files:
        layer = layers.pop(file.path, None)
        if layer is None:
            raise _refuse(where, f"has no layer for {file.path!r}, which {MANIFEST_FILE} names")
        if (layer.digest, layer.size) != (file.digest, file.size):
            raise _refuse(where, f"gives {file.path!r} as {layer.digest} ({layer.size} bytes), {MANIFEST_FILE} says "
                              f"{file.digest} ({file.size} bytes)")  # fmt: skip
    for path in layers:
        if not is_extra(path):
            raise _refuse(where, f"has a layer for {path!r}, which {MANIFEST_FILE} does not name")


def _check_texts(value: Json, where: str) -> None:
    """IntegrityError where a text holds what would steer the terminal that it is shown on."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            _check_texts(name, where)
            _check_texts(item, where)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_texts(item, where)
    elif isinstance(value, str) and (found := _CONTROL.search(value)):
        raise _refuse(where, f"holds the control character {found.group()!r}")


def _layer(
    value: Json, where: str, types: Iterable[str], most: int = MAX_FILE_BYTES, *, with_path: bool = True
) -> Layer:
    if not isinstance(value, Mapping):
        raise _refuse(where, "is no descriptor")
    media_type, digest, size = value.get("mediaType"), value.get("digest"), value.get("size")
    if not isinstance(media_type, str) or media_type not in types:
        raise _refuse(where, f"has the media type {media_type!r}; it may be {', '.join(types)}")
    if not isinstance(digest, str) or not DIGEST.fullmatch(digest):
        raise _refuse(where, f"has the digest {digest!r}; it must be 'sha256:' and 64 lower-case hex digits")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size <= most:
        raise _refuse(where, f"has the size {size!r}; it must be a whole number from 0 to {most}")
    if "urls" in value:
        raise _refuse(where, "says that its bytes lie at another address; a registry must hold them itself")
    if not with_path:
        return Layer("", digest, size, media_type)
    annotations = value.get("annotations")
    path = annotations.get(FILEPATH_ANNOTATION) if isinstance(annotations, Mapping) else None
    if not isinstance(path, str):
        raise _refuse(where, f"has no annotation {FILEPATH_ANNOTATION}; each layer is one file and says which")
    return Layer(path, digest, size, media_type)


def _check_layers(layers: tuple[Layer, ...], where: str) -> None:
    paths = [layer.path for layer in layers]
    if paths.count(MANIFEST_FILE) != 1:
        raise _refuse(where, f"has {paths.count(MANIFEST_FILE)} layers for {MANIFEST_FILE}; a bundle has one")
    validate_manifest_paths(path for path in paths if path != MANIFEST_FILE)
    sizes: dict[str, int] = {}
    for layer in layers:
        if sizes.setdefault(layer.digest, layer.size) != layer.size:
            raise _refuse(where, f"gives {layer.digest} two sizes")
        if is_extra(layer.path) and layer.size > MAX_EXTRA_BYTES:
            raise _refuse(where, f"gives {layer.path} {layer.size} bytes; {MAX_EXTRA_BYTES} are the most")
    total = sum(layer.size for layer in layers)
    if total > MAX_TOTAL_BYTES:
        raise _refuse(where, f"has layers of {total} bytes in all; {MAX_TOTAL_BYTES} are the most")


def _refuse(where: str, fault: str) -> IntegrityError:
    return IntegrityError(f"{where} {fault}. It is refused: have it published again, or use another tag")
