"""Signatures over a published bundle, by model-signing (an optional dependency) with an elliptic-curve key.

What is signed are the digests of all files of a pulled folder, but for the signature and the record of the pull, so
`model_signing verify key DIR --signature DIR/model.sig` agrees. The files are not read again: their digests are known.
Source: github.com/sigstore/model-transparency, model_signing/manifest.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fluxkiln.artifacts.registry.document import RECORD, SIGNATURE
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError

IGNORED = (SIGNATURE, RECORD)
_NAME = "bundle"


def sign(digests: Mapping[str, str], key: Path) -> bytes:
    """The signature of files by their paths in a pulled folder.

    Args:
        digests: path -> `sha256:<hex>`.
        key: a private key in PEM: P-256, P-384 or P-521, without a password.

    Raises:
        UsageError: no such key, or none that can be used. ToolchainError: model-signing is not installed.
    """
    signing, _ = _library()
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
        config.set_hashing_config(_Known(digests)).sign(Path(_NAME), path)
        return path.read_bytes()


def verify(digests: Mapping[str, str], signature: bytes, key: Path) -> None:
    """Compare a signature with the files' digests.

    Raises:
        IntegrityError: made with another key, over other files, or no signature at all.
        UsageError: no such key. ToolchainError: model-signing is not installed.
    """
    _, verifying = _library()
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
            config.set_hashing_config(_Known(digests)).verify(Path(_NAME), path)
        except Exception as error:  # whatever is wrong with it, it is no signature of these files by that key
            raise IntegrityError(
                f"the signature does not hold for the key {key} ({_first_line(error)}); do not use the bundle: ask its "
                "publisher, or give the publisher's own key"
            ) from None


class _Known:
    """In place of model-signing's own reading of files: the digests that are known already."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = digests

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        from model_signing import manifest
        from model_signing._hashing.hashing import Digest

        serialization = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": list(IGNORED)}
        )
        items = [
            manifest.FileManifestItem(
                path=PurePosixPath(path), digest=Digest("sha256", bytes.fromhex(digest.removeprefix("sha256:")))
            )
            for path, digest in sorted(self._digests.items())
        ]
        return manifest.Manifest(_NAME, items, serialization)

    def add_ignored_paths(self, *, model_path: Any, paths: Any) -> None:
        """Which files count is decided by the layers; the signature has no say in it."""


def _library() -> tuple[Any, Any]:
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
