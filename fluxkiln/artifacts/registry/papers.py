"""What goes with a published bundle: terms, model card, provenance, signature. The same bundle gives the same bytes.

What is signed are the digests of all files of a pulled folder, but for the signature and the record of the pull, so
`model_signing verify key DIR --signature DIR/model.sig` agrees. The files are not read again: their digests are known.
Sources: huggingface.co/docs/hub/model-cards, "Model card metadata"; in-toto attestation framework v1, statement.md and
resource_descriptor.md; slsa.dev/spec/v1.0/provenance; github.com/sigstore/model-transparency, manifest.py.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from fluxkiln import __version__
from fluxkiln.artifacts.about import RANDOM, read_about
from fluxkiln.artifacts.intact import PULLED_FILE
from fluxkiln.artifacts.manifest import Manifest
from fluxkiln.artifacts.modelpack import SIGNATURE, parity_word
from fluxkiln.digests import Json, canonical_json
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.types import BindingLicence

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:fluxkiln:build:v1"
BUILDER = "urn:fluxkiln:builder"

# Of the text itself, which is far longer; a title or a note is no licence.
_LEAST_BYTES = 1000
# Settings that are about the reference run and not about what is built.
_INTERNAL = ("seed", "steps", "prompt")
_SIGNED_NAME = "bundle"


def find_binding(manifest: Manifest, licence: bytes, known: Iterable[BindingLicence]) -> BindingLicence | None:
    """The licence of `known` that a bundle with this licence text is under; random weights are under none."""
    if licence.startswith(RANDOM):
        return None
    return next((one for one in known if one.spdx == manifest.licence.spdx or one.variant == manifest.variant), None)


def check_licence(
    manifest: Manifest, licence: bytes, accepted: Collection[str], known: Collection[BindingLicence]
) -> None:
    """Refuse to publish what may not be passed on like this.

    Args:
        licence: the text in the bundle.
        accepted: names of licences that the publisher has accepted. known: those that all models have.

    Raises:
        UsageError: derived from a model whose licence binds, and its text is missing or was not accepted; or an
            unknown name.
    """
    names = [one.accepted_as for one in known]
    for name in accepted:
        if name not in names:
            raise UsageError(f"no licence is called {name!r}; there is {', '.join(names)} to accept")
    found = find_binding(manifest, licence, known)
    if found is None:
        return
    if len(licence) < _LEAST_BYTES or not re.search(found.pattern.encode(), licence, re.IGNORECASE):
        raise UsageError(
            f"{manifest.name} is derived from {found.model}, and its {manifest.licence.file} is not the text of the "
            f"{found.title}, which must go with it; put LICENSE.md of the model's page into the checkpoint's folder "
            "and build the bundle again"
        )
    if found.accepted_as not in accepted:
        raise UsageError(
            f"{manifest.name} is derived from {found.model}: who passes it on is bound by the {found.title}. Read the "
            f"bundle's {manifest.licence.file}; if you may and will, add --accept-license {found.accepted_as}"
        )


def model_card(
    manifest: Manifest,
    licence: bytes,
    title: str,
    base: str,
    bound: BindingLicence | None,
    *,
    extra_licences: Sequence[str] = (),
    signed: bool = False,
) -> bytes:
    """README.md of a bundle.

    Args:
        licence: the text in the bundle; random weights of ours name no base model.
        title, base: what people call the model, FLUX.1-dev say, and its id on the Hub.
        bound: the licence that binds who passes it on, if one does.
        extra_licences: paths of licences of adapters, beside the bundle.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["cell"] = lambda text: " ".join(str(text).replace("|", "\\|").split())
    source, spdx = manifest.checkpoint.source, manifest.licence.spdx
    counts = sorted(Counter(part.scheme for part in manifest.parts).items())
    card = environment.get_template("model_card.md.j2").render(
        manifest=manifest,
        title=title,
        synthetic=licence.startswith(RANDOM),
        about=read_about(manifest.parity),
        # A fine-tune that was built from its own hub id is the nearer ancestor.
        base=source if source.count("/") == 1 and not source.startswith(("/", ".")) else base or source,
        licence_name=bound.card_name if bound else "" if spdx == "Apache-2.0" else json.dumps(spdx),
        tag=re.sub(r"\W+", "-", title.lower()),
        schemes=", ".join(f"{scheme} ({count} parts)" for scheme, count in counts),
        # What no hub has a field for, for programs that read cards. JSON in a line is YAML too.
        facts={
            "target": manifest.target,
            "schemes": [scheme for scheme, _ in counts],
            "shapes": asdict(manifest.shapes),
            "parity": parity_word(manifest.parity),
            "checkpoint": manifest.checkpoint.fingerprint,
        },
        extra_licences=extra_licences,
        signed=signed,
        dumps=json.dumps,
    )
    return card.encode()


def provenance_statement(manifest: Manifest, manifest_digest: str, report_digest: str = "") -> bytes:
    """The in-toto statement about a bundle, with a SLSA v1 predicate.

    Args:
        manifest_digest: of `manifest.json`; `report_digest`: of the parity report, where there is one.
    """
    named = {"manifest.json": manifest_digest, **{file.path: file.digest for file in manifest.files}}
    checkpoint: Json = {
        "name": manifest.checkpoint.source,
        "digest": _sha256(manifest.checkpoint.fingerprint),
        "annotations": {"covers": "name, type, shape and bytes of every tensor", "variant": manifest.variant},
    }
    tools: list[Json] = [
        {"name": name, "uri": f"pkg:generic/{name}@{found}"} for name, found in sorted(manifest.tools.items())
    ]
    schemes: dict[str, dict[str, None]] = {}
    for part in manifest.parts:
        schemes.setdefault(part.kind, {})[part.scheme] = None
    external: Json = {
        "name": manifest.name,
        "target": manifest.target,
        "variant": manifest.variant,
        "shapes": asdict(manifest.shapes),
        "schemes": {kind: ", ".join(names) for kind, names in schemes.items()},
        **{name: value for name, value in manifest.settings.items() if name not in _INTERNAL},
    }
    # A bundle that does not name the fluxkiln that built it has the one that publishes it.
    version = manifest.tools.get("fluxkiln", __version__)
    details: dict[str, Json] = {"builder": {"id": BUILDER, "version": {"fluxkiln": version}}}
    if report_digest:
        report: Json = {"name": "report.json", "digest": _sha256(report_digest), "mediaType": "application/json"}
        details["byproducts"] = [report]
    statement: Json = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": path, "digest": _sha256(digest)} for path, digest in named.items()],
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


def _sha256(digest: str) -> Json:
    return {"sha256": digest.removeprefix("sha256:")}


def sign(digests: Mapping[str, str], key: Path) -> bytes:
    """The signature of files by their paths in a pulled folder.

    Args:
        digests: path -> `sha256:<hex>`. key: a private key in PEM: P-256, P-384 or P-521, without a password.

    Raises UsageError: no such key, or none that can be used. ToolchainError: model-signing is not installed.
    """
    signing, _ = _signing_library()
    _require_key(key, "--sign")
    with tempfile.TemporaryDirectory(prefix="fluxkiln-sign-") as folder:
        path = Path(folder, SIGNATURE)
        try:
            config = signing.Config().use_elliptic_key_signer(private_key=key)
        except Exception as error:  # cryptography has many ways to refuse a key
            raise UsageError(
                f"{key} is no private key that can sign ({_first_line(error)}); make one: openssl ecparam -name "
                f"prime256v1 -genkey -noout -out {key.name}"
            ) from None
        config.set_hashing_config(_Known(digests)).sign(Path(_SIGNED_NAME), path)
        return path.read_bytes()


def verify_signature(digests: Mapping[str, str], signature: bytes, key: Path) -> None:
    """Compare a signature with the files' digests.

    Raises:
        IntegrityError: made with another key, over other files, or no signature at all.
        UsageError: no such key. ToolchainError: model-signing is not installed.
    """
    _, verifying = _signing_library()
    _require_key(key, "--verify")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise UsageError(
            f"{key} is no public key that can verify ({_first_line(error)}); take it from the private one: openssl ec "
            f"-in PRIVATE -pubout -out {key.name}"
        ) from None
    with tempfile.TemporaryDirectory(prefix="fluxkiln-sign-") as folder:
        path = Path(folder, SIGNATURE)
        path.write_bytes(signature)
        try:
            config.set_hashing_config(_Known(digests)).verify(Path(_SIGNED_NAME), path)
        except Exception as error:  # whatever is wrong with it, it is no signature of these files by that key
            raise IntegrityError(
                f"the signature does not hold for the key {key} ({_first_line(error)}); do not use the bundle: ask its "
                "publisher, or give the publisher's own key"
            ) from None


@dataclass(frozen=True, slots=True)
class _Known:
    """In place of model-signing's own reading of files: the digests that are known already."""

    digests: Mapping[str, str]

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest

        serialization = manifest.SerializationType.from_args(
            {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": [SIGNATURE, PULLED_FILE],
            }
        )
        items = [
            manifest.FileManifestItem(
                path=PurePosixPath(path), digest=Digest("sha256", bytes.fromhex(digest.removeprefix("sha256:")))
            )
            for path, digest in sorted(self.digests.items())
        ]
        return manifest.Manifest(_SIGNED_NAME, items, serialization)

    def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
        """Which files count is decided by the layers; the signature has no say in it."""


def _signing_library() -> tuple[Any, Any]:
    try:
        from model_signing import signing, verifying
    except ImportError as error:
        raise ToolchainError(
            f"signatures need the package model-signing ({error.name} is missing); install it: "
            "pip install 'fluxkiln[signing]'"
        ) from error
    return signing, verifying


def _require_key(key: Path, option: str) -> None:
    if not key.is_file():
        raise UsageError(f"{option} {key}: there is no such file; give a key in PEM")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
