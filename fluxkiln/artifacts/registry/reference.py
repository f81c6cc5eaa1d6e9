"""What a user may write for a place in a registry, and nothing else.

    oci-layout:PATH:TAG     oci-layout:PATH@sha256:HEX      a folder; no server
    HOST/REPO:TAG           HOST/REPO@sha256:HEX            an OCI registry
    hf://ORG/REPO@REV                                       the Hugging Face Hub

Source: OCI distribution-spec v1.1, "pulling manifests" (names and tags); the layout's tags follow image-spec.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias, TypeVar

from fluxkiln.errors import UsageError

LAYOUT_PREFIX, HUB_PREFIX = "oci-layout:", "hf://"
_FORMS = "oci-layout:PATH:TAG, HOST/REPO:TAG or hf://ORG/REPO@REV"
MAX_REPOSITORY = 255

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_HOST = re.compile(
    r"(?:localhost|[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)+|[A-Za-z0-9-]+(?=:)|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?"
)
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_LAYOUT_TAG = re.compile(r"[A-Za-z0-9]+(?:(?:[-._:@+/]|--)[A-Za-z0-9]+)*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)*")


@dataclass(frozen=True, slots=True)
class _Tagged:
    """A manifest by its tag or its digest; either may be empty."""

    tag: str = field(default="", kw_only=True)
    digest: str = field(default="", kw_only=True)

    @property
    def name(self) -> str:
        """What the manifest is asked for by."""
        return self.digest or self.tag

    @property
    def _ending(self) -> str:
        return f"@{self.digest}" if self.digest else f":{self.tag}" if self.tag else ""


@dataclass(frozen=True, slots=True)
class LayoutReference(_Tagged):
    """A manifest in an OCI image layout on this machine."""

    path: Path

    def __str__(self) -> str:
        return f"{LAYOUT_PREFIX}{self.path}{self._ending}"


@dataclass(frozen=True, slots=True)
class RegistryReference(_Tagged):
    """A manifest in a repository of an OCI registry."""

    host: str
    repository: str

    def __str__(self) -> str:
        return f"{self.host}/{self.repository}{self._ending}"


@dataclass(frozen=True, slots=True)
class HubReference(_Tagged):
    """A revision (branch, tag or commit) of a model repository on the Hugging Face Hub; it has no digest."""

    repository: str

    def __str__(self) -> str:
        return f"{HUB_PREFIX}{self.repository}{'@' + self.tag if self.tag else ''}"


Reference: TypeAlias = LayoutReference | RegistryReference | HubReference
_R = TypeVar("_R", bound=_Tagged)


def looks_like_reference(text: str) -> bool:
    """Whether `text` is meant as a reference and not as a folder."""
    if text.startswith((LAYOUT_PREFIX, HUB_PREFIX)):
        return True
    host, slash, _ = text.partition("/")
    return bool(slash and _HOST.fullmatch(host) and not text.startswith(".") and not Path(text).exists())


def parse_reference(text: str, *, tagged: bool = True) -> Reference:
    """The reference that `text` spells.

    Args:
        tagged: a tag, digest or revision must be there; otherwise it may be left out, as for a list of tags.

    Raises:
        UsageError: none of the forms; names the rule that is broken.
    """
    if text.startswith(LAYOUT_PREFIX):
        found: Reference = _parse_layout(text)
    elif text.startswith(HUB_PREFIX):
        found = _parse_hub(text)
    else:
        found = _parse_registry(text)
    if tagged and not found.name:
        mark = "@REV" if isinstance(found, HubReference) else ":TAG"
        raise UsageError(f"reference {text!r} has no tag; add {mark}")
    return found


def with_tag(reference: _R, tag: str) -> _R:
    """The same place under another tag; UsageError when the tag is not legal there."""
    pattern, rule = {
        LayoutReference: (_LAYOUT_TAG, "letters and digits joined by one of - . _ : / +"),
        RegistryReference: (_TAG, "at most 128 letters, digits, _ . -, not beginning with . or -"),
        HubReference: (_REVISION, "letters, digits, _ . - and / between them"),
    }[type(reference)]
    if not pattern.fullmatch(tag):
        raise UsageError(f"tag {tag!r} is not legal; use {rule}")
    return replace(reference, tag=tag, digest="")


def is_repository(name: str) -> bool:
    """Whether an OCI registry could have a repository of that name."""
    return len(name) <= MAX_REPOSITORY and _REPOSITORY.fullmatch(name) is not None


def is_loopback(host: str) -> bool:
    """Whether `host` (an address, or a name with or without a port) is this machine by name or address."""
    name = host[1:].split("]")[0] if host.startswith("[") else host.split(":")[0] if host.count(":") == 1 else host
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _parse_layout(text: str) -> LayoutReference:
    rest = text.removeprefix(LAYOUT_PREFIX)
    path, at, digest = rest.partition("@")
    if at and _DIGEST.fullmatch(digest):
        if not path:
            raise UsageError(f"reference {text!r} names no folder; write {LAYOUT_PREFIX}PATH@sha256:HEX")
        return LayoutReference(Path(path), digest=digest)
    path, colon, tag = rest.partition(":")
    if not path or "\0" in path:
        raise UsageError(f"reference {text!r} names no folder; write {LAYOUT_PREFIX}PATH:TAG")
    found = LayoutReference(Path(path))
    return with_tag(found, tag) if colon else found


def _parse_hub(text: str) -> HubReference:
    repository, at, revision = text.removeprefix(HUB_PREFIX).partition("@")
    names = repository.split("/")
    if len(names) != 2 or not all(_HUB_NAME.fullmatch(name) for name in names):
        raise UsageError(f"reference {text!r} names no repository of the Hub; write {HUB_PREFIX}ORG/REPO@REV")
    found = HubReference(repository)
    return with_tag(found, revision) if at else found


def _parse_registry(text: str) -> RegistryReference:
    if "://" in text:
        scheme = text.split("://")[0]
        raise UsageError(f"reference {text!r} begins with {scheme}://; leave it out: TLS is the rule, --plain-http the "
                         f"exception. The forms are {_FORMS}")  # fmt: skip
    host, slash, rest = text.partition("/")
    if not slash or not _HOST.fullmatch(host):
        raise UsageError(
            f"reference {text!r} begins with no host ({host!r}); a host has a dot, a port, or is localhost. The forms "
            f"are {_FORMS}"
        )
    rest, at, digest = rest.partition("@")
    if at and not _DIGEST.fullmatch(digest):
        raise UsageError(f"reference {text!r} has the digest {digest!r}; a digest is 'sha256:' and 64 hex digits")
    repository, colon, tag = rest.partition(":")
    if not is_repository(repository):
        raise UsageError(
            f"reference {text!r} has the repository {repository!r}; use lower-case letters and digits joined by one of "
            ". _ - /, 255 at most"
        )
    found = RegistryReference(host, repository)
    found = with_tag(found, tag) if colon else found
    # With both, the digest decides what is meant, as for other clients.
    return replace(found, tag="", digest=digest) if digest else found
