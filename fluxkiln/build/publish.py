"""Publishing and pulling, from a folder to a registry and back: what the commands of that name do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fluxkiln.artifacts.intact import BUNDLE
from fluxkiln.artifacts.manifest import MANIFEST_FILE, Manifest, resolve_inside
from fluxkiln.artifacts.modelpack import (
    CARD,
    LICENCES,
    MAX_EXTRA_BYTES,
    PROVENANCE,
    REPORT,
    SIGNATURE,
    Document,
    Layer,
    bundle_layers,
    check_bundle,
    parity_word,
    parse_document,
    pulled_path,
    write_document,
)
from fluxkiln.artifacts.registry.distribution import (
    Found,
    Pushed,
    check_replaceable,
    look_up,
    pull,
    push,
    receive_small,
)
from fluxkiln.artifacts.registry.papers import (
    check_licence,
    find_binding,
    model_card,
    provenance_statement,
    sign,
    verify_signature,
)
from fluxkiln.artifacts.registry.place import (
    HubReference,
    LayoutReference,
    Place,
    Reference,
    open_layout,
    parse_reference,
    with_tag,
)
from fluxkiln.artifacts.registry.transfer import TRANSFERS, Patience, Stop, each
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.opener import open_bundle
from fluxkiln.digests import Json, digest_bytes
from fluxkiln.documents import REPORT as REPORT_LIMITS
from fluxkiln.documents import read_object
from fluxkiln.errors import IntegrityError, ParityError, UsageError
from fluxkiln.files import digest_file
from fluxkiln.patches.registry import binding_licences, hub_id_of, title_of
from fluxkiln.progress import Progress

UNSIGNED = "unsigned: nothing but the registry vouches for who published it"

SignatureState = Literal["verified", "not checked", "unsigned"]


@dataclass(frozen=True, slots=True)
class Transfers:
    """How a registry is spoken to: without TLS if that was asked for, so many transfers at once, so patiently."""

    plain_http: bool = False
    jobs: int = TRANSFERS
    patience: Patience | None = None


@dataclass(frozen=True, slots=True)
class Terms:
    """What the publisher allows and adds.

    Attributes:
        accepted: licences that were accepted (`flux-1-dev`).
        allow_failed_parity: a bundle that missed a gate goes out all the same, and its manifest says so.
        sign_key: private key in PEM.
        lora_licences: texts of the licences of adapters that are in the weights.
    """

    accepted: tuple[str, ...] = ()
    allow_failed_parity: bool = False
    sign_key: Path | None = None
    lora_licences: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Published:
    """What was published where; see `Pushed` for what had to be sent."""

    reference: str
    document: Document
    pushed: Pushed
    parity: str
    signed: bool


@dataclass(frozen=True, slots=True)
class Pulled:
    """What was pulled to where, and what is known of its publisher."""

    destination: Path
    found: Found
    signature: SignatureState
    parity: str


def publish_bundle(
    bundle: Path,
    reference: str,
    terms: Terms | None = None,
    *,
    transfers: Transfers | None = None,
    progress: Progress | None = None,
) -> Published:
    """Publish a bundle with its report, provenance, model card, licences and, with a key, a signature.

    `bundle` is its folder, or the one around it as a build or a pull makes it.

    Raises:
        IntegrityError: the bundle is not what its manifest says, or its report is another bundle's.
        ParityError: it missed a gate when it was built, and that was not allowed.
        UsageError: no bundle, an illegal reference, or its licence forbids it like this.
        RegistryError: the registry refuses or cannot be reached.
    """
    terms, transfers = terms or Terms(), transfers or Transfers()
    target = parse_reference(reference)
    if not target.tag:
        raise UsageError(f"{reference} names a digest; publish under a tag, the digest comes from the bytes")
    folder = bundle / BUNDLE if not (bundle / MANIFEST_FILE).exists() and (bundle / BUNDLE).is_dir() else bundle
    manifest = open_bundle(folder, progress).manifest
    parity = parity_word(manifest.parity)
    if parity == "failed" and not terms.allow_failed_parity:
        failure = manifest.parity.get("failure") or "a gate of the parity ladder was missed"
        raise ParityError(
            f"{manifest.name} failed its parity when it was built ({failure}); build it so that it passes, or "
            "publish it marked as failed: --allow-failed-parity"
        )
    licence = resolve_inside(folder, manifest.licence.file).read_bytes()
    check_licence(manifest, licence, terms.accepted, binding_licences())
    document, config, sources = _compose(folder, manifest, licence, terms)
    with _open(target, transfers, write=True) as (place, stop):
        pushed = push(place, document, config, sources, target.tag, stop=stop, jobs=transfers.jobs, progress=progress)
    return Published(str(target), document, pushed, parity, terms.sign_key is not None)


def pull_bundle(
    reference: str,
    destination: Path,
    *,
    verify_key: Path | None = None,
    require_signature: bool = False,
    most: int | None = None,
    transfers: Transfers | None = None,
    progress: Progress | None = None,
) -> Pulled:
    """Fetch a bundle into `destination`, checked byte by byte, or leave nothing there.

    Args:
        verify_key: public key in PEM; the bundle then must be signed with its private half.
        require_signature: refuse what is not signed by that key; without a key nothing can be told, so everything is.
        most: refuse what has more bytes; by default what no document may name has (`modelpack.MAX_TOTAL_BYTES`).

    Raises:
        IntegrityError: bytes that are not what the manifest says, or no valid signature where one must be.
        UsageError: no such tag, it is larger than `most`, or `destination` is something else than an earlier pull.
        RegistryError, ResourceError: see `pull`.
    """
    transfers = transfers or Transfers()
    source = parse_reference(reference)
    if require_signature and verify_key is None:
        raise UsageError("--require-signature needs the publisher's key to compare with; add --verify KEY")
    check_replaceable(destination)
    with _open(source, transfers, write=False) as (place, stop):
        found = look_up(place, source.name)
        if most is not None and found.document.size > most:
            raise UsageError(
                f"{source} has {found.document.size} bytes, at most {most} were allowed; give --max-size more, or take "
                "another bundle"
            )
        signature = _signature(place, found.document, verify_key)
        state: SignatureState = "unsigned" if signature is None else "verified" if verify_key else "not checked"
        parity = parity_word(found.manifest.parity)

        # Once more over what lies on the disk, before it gets its name.
        def check(staging: Path, document: Document) -> None:
            open_bundle(staging / BUNDLE)
            if signature is not None and verify_key is not None:
                digests = {pulled_path(layer.path): layer.digest for layer in document.layers}
                del digests[SIGNATURE]
                # Large files were hashed as they came; what lies beside the bundle is read by people.
                beside = [path for name in digests if (path := staging / name).parent == staging]
                digests |= {path.name: digest_file(path)[0] for path in beside}
                verify_signature(digests, signature, verify_key)

        record: dict[str, Json] = {
            "schema": "fluxkiln.pulled/1",
            "reference": str(source),
            "digest": found.document.digest,
            "parity": parity,
            "signature": state,
        }
        pull(place, found, destination, record=record, stop=stop, check=check, jobs=transfers.jobs, progress=progress)
    return Pulled(destination, found, state, parity)


def inspect_reference(reference: str, transfers: Transfers | None = None) -> Found:
    """What lies under a reference: its manifest and the bundle's, checked; no other file is fetched."""
    source = parse_reference(reference)
    with _open(source, transfers or Transfers(), write=False) as (place, _):
        return look_up(place, source.name)


def list_tags(reference: str, transfers: Transfers | None = None) -> tuple[Reference, dict[str, Document | None]]:
    """The tags of a repository, each with its manifest; None where it is none of a bundle."""
    source = parse_reference(reference, tagged=False)
    found: dict[str, Document | None] = {}
    with _open(source, transfers or Transfers(), write=False) as (place, stop):

        def describe(tag: str) -> None:
            try:
                with_tag(source, tag)
            except UsageError:
                return  # no tag that anybody could ask for
            try:
                found[tag] = parse_document(place.manifest(tag), f"manifest {tag} of {place.name}")
            except IntegrityError:
                found[tag] = None

        each(place.tags(), describe, stop, 8)
    return source, dict(sorted(found.items()))


def tag_reference(reference: str, tag: str, transfers: Transfers | None = None) -> tuple[Reference, Document]:
    """Give a published bundle another tag; nothing but its manifest is sent.

    UsageError: no such bundle, or an illegal tag. IntegrityError: what is there is no whole bundle's manifest.
    """
    source = parse_reference(reference)
    target = with_tag(source, tag)
    with _open(source, transfers or Transfers(), write=True) as (place, _):
        document = look_up(place, source.name).document
        place.retag(document, tag)
    return target, document


def read_described(text: str, transfers: Transfers | None = None, progress: Progress | None = None) -> Manifest:
    """The bundle's manifest from a reference, or from a folder, which is checked; errors as `open_bundle`."""
    folder = Path(text)
    for candidate in (folder, folder / BUNDLE):
        if (candidate / MANIFEST_FILE).is_file():
            return open_bundle(candidate, progress).manifest
    return inspect_reference(text, transfers).manifest


def _compose(
    folder: Path, manifest: Manifest, licence: bytes, terms: Terms
) -> tuple[Document, bytes, Mapping[str, Path | bytes]]:
    """The OCI manifest, the config and where every layer's bytes are."""
    manifest_data = (folder / MANIFEST_FILE).read_bytes()
    layers = bundle_layers(manifest, Blob(digest_bytes(manifest_data), len(manifest_data)))
    sources: dict[str, Path | bytes] = {file.path: resolve_inside(folder, file.path) for file in manifest.files}
    sources[MANIFEST_FILE] = manifest_data

    def add(path: str, data: bytes) -> str:
        if path in sources:
            raise UsageError(f"{folder} has a file {path} of its own; that name is for what is published with a bundle")
        layers.append(Layer(path, digest_bytes(data), len(data)))
        sources[path] = data
        return layers[-1].digest

    licences = {f"{LICENCES}/{path.name}": _read_small(path) for path in terms.lora_licences}
    if len(licences) != len(terms.lora_licences):
        raise UsageError("two of the LoRA licences have the same file name; rename one of them")
    for path, data in licences.items():
        add(path, data)
    report = _read_report(folder, manifest)
    report_digest = "" if report is None else add(REPORT, report)
    add(PROVENANCE, provenance_statement(manifest, layers[0].digest, report_digest))
    signed = terms.sign_key is not None
    title, base = title_of(manifest.variant), hub_id_of(manifest.variant)
    bound = find_binding(manifest, licence, binding_licences())
    card = model_card(manifest, licence, title, base, bound, extra_licences=sorted(licences), signed=signed)
    add(CARD, card)
    if terms.sign_key is not None:
        add(SIGNATURE, sign({pulled_path(layer.path): layer.digest for layer in layers}, terms.sign_key))
    config, data = write_document(manifest, layers)
    # What others would refuse is not sent.
    document = parse_document(data, f"the manifest of {folder}")
    check_bundle(document, manifest, f"the manifest of {folder}")
    return document, config, sources


def _read_report(folder: Path, manifest: Manifest) -> bytes | None:
    """The report beside the bundle; None where the bundle was not verified."""
    path = folder.parent / REPORT
    if parity_word(manifest.parity) == "unverified" or not path.is_file():
        return None
    data = _read_small(path)
    provenance = read_object(data, str(path), limits=REPORT_LIMITS).get("provenance", {})
    known = provenance if isinstance(provenance, Mapping) else {"checkpoint": provenance}
    if (checkpoint := known.get("checkpoint", manifest.checkpoint.fingerprint)) != manifest.checkpoint.fingerprint:
        raise IntegrityError(
            f"{path} is about the checkpoint {checkpoint}, the bundle was built from "
            f"{manifest.checkpoint.fingerprint}; build it again"
        )
    return data


def _read_small(path: Path) -> bytes:
    if not path.is_file():
        raise UsageError(f"--lora-license {path}: there is no such file; give the licence's text")
    size = path.stat().st_size
    if size > MAX_EXTRA_BYTES:
        raise UsageError(f"{path} has {size} bytes; {MAX_EXTRA_BYTES} are the most for what lies beside a bundle")
    return path.read_bytes()


def _signature(place: Place, document: Document, key: Path | None) -> bytes | None:
    """The signature, and where there is a key, one that holds: asked for before gigabytes are fetched."""
    layer = document.find(SIGNATURE)
    if layer is None:
        if key is not None:
            raise IntegrityError(
                f"{place.name} has it without a signature, and --verify asks for one by {key}; ask its publisher to "
                "sign it, or leave --verify out"
            )
        return None
    signature = receive_small(place, layer)
    if key is not None:
        digests = {pulled_path(one.path): one.digest for one in document.layers if one is not layer}
        verify_signature(digests, signature, key)
    return signature


@contextmanager
def _open(reference: Reference, transfers: Transfers, *, write: bool) -> Iterator[tuple[Place, Stop]]:
    """The place that a reference names, closed at the end."""
    stop = Stop(seconds=(transfers.patience or Patience()).deadline)
    place: Place
    if isinstance(reference, LayoutReference):
        place = open_layout(reference.path, write=write, stop=stop)
    elif isinstance(reference, HubReference):
        from fluxkiln.artifacts.registry.hub import open_hub

        place = open_hub(reference, patience=transfers.patience, stop=stop)
    else:
        from fluxkiln.artifacts.registry.oci import open_registry

        place = open_registry(reference, plain_http=transfers.plain_http, patience=transfers.patience, stop=stop)
    try:
        yield place, stop
    finally:
        place.close()
