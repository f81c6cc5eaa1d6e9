"""A repository of an OCI registry. Source: OCI distribution-spec v1.1.

Where a blob was seen is kept as a hint in `$XDG_CACHE_HOME/fluxkiln`, so that another repository of the registry takes
it over; one that cannot starts an upload as if nothing had been said. The folder may be removed at any time.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import httpx2

from fluxkiln.artifacts.modelpack import MAX_DOCUMENT_BYTES, Document, Layer
from fluxkiln.artifacts.registry.place import (
    BlobMissingError,
    RegistryReference,
    changed,
    check_departure,
    is_loopback,
    is_repository,
)
from fluxkiln.artifacts.registry.session import Answer, AuthorizationError, Session, follow, read_answer, refused
from fluxkiln.artifacts.registry.transfer import Arrival, Departure, Patience, Stop, TransientError, retrying
from fluxkiln.artifacts.store import MANIFEST_TYPE
from fluxkiln.digests import digest_bytes
from fluxkiln.documents import read_object, read_object_file
from fluxkiln.errors import IntegrityError, RegistryError, ResourceError, UsageError
from fluxkiln.files import write_durably

# A chunk that fails is sent again from where the registry says it stands; smaller blobs go in one request.
CHUNK_BYTES = 64 << 20
MAX_TAG_PAGES = 1000
MAX_TAGS = 100_000
# Of one blob, after its upload was lost.
MAX_RESTARTS = 3
MOST_HINTS = 20_000
_RANGE = re.compile(r"(?:bytes=)?0-(\d+)")
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(?:\d+|\*)")


class OciPlace:
    """One repository, over one session."""

    def __init__(self, reference: RegistryReference, session: Session) -> None:
        self._host, self._repository = reference.host, reference.repository
        self._base = f"/v2/{reference.repository}"
        self._hints = read_hints(reference.host)
        self._session = session

    @property
    def name(self) -> str:
        return f"{self._host}/{self._repository}"

    def close(self) -> None:
        self._session.close()

    def manifest(self, reference: str) -> bytes:
        what = f"manifest {reference} of {self.name}"

        def once() -> Answer:
            answer = self._session.ask(
                "GET", f"{self._base}/manifests/{quote(reference, safe=':')}", headers={"Accept": MANIFEST_TYPE},
                accept=(200, 404), what=what,
            )  # fmt: skip
            expected = reference if reference.startswith("sha256:") else answer.headers.get("Docker-Content-Digest", "")
            if answer.status == 200 and expected and digest_bytes(answer.body) != expected:
                raise TransientError(f"its bytes do not have the digest {expected}")
            return answer

        try:
            answer = retrying(replace(self._session.patience, attempts=3), self._session.stop, what, once)
        except RegistryError as error:
            if isinstance(error.__cause__, TransientError) and "digest" in str(error.__cause__):
                raise IntegrityError(
                    f"{what}: {error.__cause__}, however often it is asked for; publish it again"
                ) from error
            raise
        if answer.status == 404:
            raise UsageError(
                f"{self.name} has no tag or manifest {reference!r}; `fluxkiln ls {self.name}` shows its tags"
            )
        if len(answer.body) > MAX_DOCUMENT_BYTES:
            raise IntegrityError(f"{what} is larger than {MAX_DOCUMENT_BYTES} bytes, which no manifest of a bundle is")
        return answer.body

    def has(self, layer: Layer) -> bool:
        answer = self._session.ask(
            "HEAD", f"{self._base}/blobs/{layer.digest}", accept=(200, 404), what=f"{layer.path} in {self.name}"
        )
        return answer.status == 200 and answer.headers.get("Content-Length", str(layer.size)) == str(layer.size)

    def send(self, layer: Layer, departure: Departure) -> int:
        what = f"sending {layer.path or 'the config'} to {self.name}"
        if departure.actual_size() != layer.size:
            raise changed(departure.source, layer)
        upload = _Upload(self._session, self._base, layer, departure, what)
        if not self._take_over(layer, what):
            retrying(self._session.patience, self._session.stop, what, upload.go_on, lambda: upload.offset)
        check_departure(departure, layer)
        return upload.sent

    def receive(self, layer: Layer, arrival: Arrival) -> None:
        url = f"{self._base}/blobs/{layer.digest}"
        fetch(self._session, url, arrival, f"fetching {layer.path or 'the config'} from {self.name}")

    def publish(self, document: Document, tag: str) -> None:
        # By digest first: the registry then compares every byte before a tag can lead to them.
        self._put(document, document.digest)
        self.retag(document, tag)
        digests = [document.config.digest, *(layer.digest for layer in document.layers)]
        add_hints(self._host, self._repository, digests)

    def retag(self, document: Document, tag: str) -> None:
        def once() -> None:
            self._put(document, tag)
            # The tag's request could have been changed on its way as well.
            answer = self._session.ask(
                "HEAD", f"{self._base}/manifests/{tag}", headers={"Accept": MANIFEST_TYPE}, accept=(200, 404),
                what=f"tag {tag} of {self.name}",
            )  # fmt: skip
            if (
                answer.headers.get("Docker-Content-Digest", "") != document.digest
                and self.manifest(tag) != document.data
            ):
                raise TransientError(f"{self.name}:{tag} is another manifest than the one that was sent")

        retrying(self._session.patience, self._session.stop, f"tag {tag} of {self.name}", once)

    def tags(self) -> list[str]:
        found: list[str] = []
        url = f"{self._base}/tags/list"
        for _ in range(MAX_TAG_PAGES):
            answer = self._session.ask("GET", url, accept=(200, 404), what=f"tags of {self.name}")
            if answer.status == 404:
                raise UsageError(f"there is no repository {self.name}; check its name, or publish to it first")
            remedy = "check the registry's address"
            listed = read_object(answer.body, f"the tags of {self.name}", error=RegistryError, remedy=remedy)
            tags = listed.get("tags") or []
            if not isinstance(tags, list) or not all(isinstance(tag, str) and len(tag) <= 256 for tag in tags):
                raise RegistryError(f"{self.name} answers no list of tags; {remedy}")
            found += tags
            if len(found) > MAX_TAGS:
                raise RegistryError(f"{self.name} has more than {MAX_TAGS} tags, which are not listed; {remedy}")
            after = re.match(r'<([^>]+)>;\s*rel="?next', answer.headers.get("Link", ""))
            if after is None:
                break
            url = after.group(1)
        return found

    def _take_over(self, layer: Layer, what: str) -> bool:
        """Whether the registry had the blob in another repository and could link it into this one."""
        source = self._hints.get(layer.digest, self._repository)
        if source == self._repository:
            return False
        url = f"{self._base}/blobs/uploads/?mount={layer.digest}&from={quote(source)}"
        try:
            # 202 begins an upload, which the registry forgets by itself.
            return self._session.ask("POST", url, accept=(201, 202), what=what).status == 201
        except AuthorizationError:
            return False  # not ours to read; to send it is another matter

    def _put(self, document: Document, reference: str) -> None:
        what = f"manifest of {self.name}"
        answer = self._session.ask(
            "PUT", f"{self._base}/manifests/{reference}", headers={"Content-Type": MANIFEST_TYPE}, body=document.data,
            accept=(201, 400, 404), what=what,
        )  # fmt: skip
        if answer.status == 201:
            return
        if b"UNKNOWN" in answer.body or b"DIGEST_INVALID" in answer.body:
            raise BlobMissingError(str(refused(answer, what)))
        raise refused(answer, what)


class _Upload:
    """One blob's way into a registry; `go_on` is called again after a failure and goes on from where it stands."""

    def __init__(self, session: Session, base: str, layer: Layer, departure: Departure, what: str) -> None:
        self.sent, self.offset = 0, 0
        self._session, self._base, self._layer, self._departure, self._what = session, base, layer, departure, what
        # Empty while none was begun.
        self._location = httpx2.URL("")
        self._restarts = 0

    def go_on(self) -> None:
        size = self._layer.size
        if not str(self._location):
            self._begin()
        elif self.offset or size > CHUNK_BYTES:
            self._ask_where()
        while size > CHUNK_BYTES and self.offset < size:
            end = min(self.offset + CHUNK_BYTES, size)
            answer = self._send("PATCH", self._location, end, 202)
            self._location = self._next(answer)
            self.offset = _standing(answer, end)
        self._send("PUT", self._location.copy_merge_params({"digest": self._layer.digest}), size, 201)

    def _begin(self) -> None:
        answer = self._session.ask("POST", f"{self._base}/blobs/uploads/", accept=(202,), what=self._what)
        self._location, self.offset = self._next(answer), 0

    def _ask_where(self) -> None:
        answer = self._session.ask("GET", self._location, accept=(204, 400, 404, 416), what=self._what)
        if answer.status != 204:
            self._restarts += 1
            if self._restarts > MAX_RESTARTS:
                raise refused(answer, self._what)
            self._begin()
            return
        self._location = self._next(answer)
        self.offset = min(_standing(answer, 0), self._layer.size)

    def _send(self, method: str, location: httpx2.URL, end: int, accept: int) -> Answer:
        """Send the bytes up to `end`; raise when the registry does not take them."""
        headers = {"Content-Type": "application/octet-stream"}
        if method == "PATCH":
            headers["Content-Range"] = f"{self.offset}-{end - 1}"
        pieces, length = self._counted(end), end - self.offset
        with self._session.stream(method, location, headers=headers, pieces=pieces, length=length) as response:
            answer = read_answer(response, self._what, self._session.stop)
        if answer.status == accept:
            return answer
        # The upload cannot go on; a few times it is begun anew, unless it is not allowed at all.
        self._location, self.offset = httpx2.URL(""), 0
        if self._departure.digest not in (None, self._layer.digest):
            raise changed(self._departure.source, self._layer)
        self._restarts += 1
        if answer.status in (401, 403, 405, 413) or self._restarts > MAX_RESTARTS:
            raise refused(answer, self._what)
        raise TransientError(f"the registry answers {answer.status} to the upload, which is begun again")

    def _counted(self, end: int) -> Iterator[bytes]:
        for piece in self._departure.pieces(self.offset, end):
            self._session.stop.check()
            self.sent += len(piece)
            yield piece

    def _next(self, answer: Answer) -> httpx2.URL:
        location = answer.headers.get("Location")
        if not location:
            raise RegistryError(f"{self._what}: the registry does not say where to; check its address")
        return follow(answer.url, location)


def fetch(session: Session, url: str, arrival: Arrival, what: str) -> None:
    """Get a file from where `arrival` stands to its end, by Range, as often as it takes.

    Raises RegistryError: no progress for too long. IntegrityError: it is not there, though a manifest names it.
    """

    def once() -> None:
        headers = {"Range": f"bytes={arrival.received}-"} if arrival.received else {}
        with session.stream("GET", url, headers=headers) as response:
            if response.status_code == 206:
                found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if found is None or int(found.group(1)) != arrival.received:
                    arrival.restart()
                    raise TransientError("another range was sent than was asked for")
            elif response.status_code == 200:
                if arrival.received:
                    arrival.restart()
            elif response.status_code == 416:
                arrival.restart()
                raise TransientError("the file is shorter there than the manifest says")
            elif response.status_code == 404:
                raise IntegrityError(f"{what}: it is not there, though the manifest names it; have it published again")
            else:
                raise refused(read_answer(response, what, session.stop), what)
            for piece in response.iter_raw():
                session.stop.check()
                arrival.write(piece)
        if not arrival.complete:
            raise TransientError(f"{arrival.received} of {arrival.size} bytes were sent")

    if not arrival.complete or not arrival.size:
        retrying(session.patience, session.stop, what, once, lambda: arrival.received)


def _standing(answer: Answer, otherwise: int) -> int:
    """How many bytes of an upload the registry has. `0-0` says one byte, or none: it cannot say nothing."""
    found = _RANGE.fullmatch(answer.headers.get("Range", ""))
    if found is None:
        return otherwise
    return int(found.group(1)) + 1 if found.group(1) != "0" else 0


def open_registry(
    reference: RegistryReference,
    *,
    plain_http: bool = False,
    patience: Patience | None = None,
    stop: Stop | None = None,
) -> OciPlace:
    """The repository that `reference` names; nothing is asked yet.

    Args:
        plain_http: no TLS; to this machine itself there is none anyway.
    """
    host = "registry-1.docker.io" if reference.host == "docker.io" else reference.host
    scheme = "http" if plain_http or is_loopback(reference.host) else "https"
    return OciPlace(reference, Session(f"{scheme}://{host}", patience=patience, stop=stop))


def read_hints(host: str) -> dict[str, str]:
    """Digest -> repository; empty where nothing is known or the file cannot be read."""
    try:
        found = read_object_file(_hints_file(host))
    except (OSError, IntegrityError):
        return {}
    return {digest: name for digest, name in found.items() if isinstance(name, str) and is_repository(name)}


def add_hints(host: str, repository: str, digests: Iterable[str]) -> None:
    """Remember that `repository` has these blobs; without a sound where nothing can be written."""
    hints = read_hints(host)
    for digest in digests:
        # Again at the end: the oldest ones are at the front, and go first.
        hints.pop(digest, None)
        hints[digest] = repository
    kept = dict(list(hints.items())[-MOST_HINTS:])
    with suppress(OSError, ResourceError):
        _hints_file(host).parent.mkdir(parents=True, exist_ok=True)
        write_durably(_hints_file(host), json.dumps(kept).encode())


def _hints_file(host: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fluxkiln" / "registries" / (re.sub(r"[^A-Za-z0-9.-]", "_", host) + ".json")
