"""HTTP to one registry: authorization, redirects, time-outs. Authorization goes to the registry's own origin only.

Sources: OCI distribution-spec v1.1; docs.docker.com, "Token authentication specification" and `docker login`
(config.json, credential stores); containers-auth.json(5); RFC 9110.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import httpx2

from fluxkiln import __version__
from fluxkiln.artifacts.registry.credentials import Credential, find_credential
from fluxkiln.artifacts.registry.place import is_loopback
from fluxkiln.artifacts.registry.transfer import Patience, Stop, TransientError, Watch, retrying
from fluxkiln.documents import SMALL, read_object
from fluxkiln.errors import FluxkilnError, RegistryError

MAX_REDIRECTS = 5
CONNECTIONS = 8
# Of an answer that is read whole: manifests and lists of tags.
MAX_ANSWER_BYTES = 16 << 20
_LATER = (408, 425, 429, 500, 502, 503, 504)
_REDIRECT = (301, 302, 303, 307, 308)
_TOKEN = re.compile(r"[\x21-\x7e]+")
_PARAMETER = re.compile(r'([A-Za-z_]+)="([^"]*)"')


class AuthorizationError(RegistryError):
    """The registry does not let us: no credential, the wrong one, or one that may not do this."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that was read whole."""

    status: int
    headers: httpx2.Headers
    body: bytes
    url: httpx2.URL


class Session:
    """Requests to one origin. Blocking, and safe to use from several threads.

    Args:
        origin: `https://HOST`, or `http://HOST` where that was allowed.
        authorization: a header to begin with; otherwise credentials are looked for when the registry asks.
        transport: in place of the network, for tests.
        login: where `authorization` is all there is, how to get another; no other is then looked for.
    """

    def __init__(
        self,
        origin: str,
        *,
        patience: Patience | None = None,
        stop: Stop | None = None,
        authorization: str | None = None,
        transport: httpx2.BaseTransport | None = None,
        login: str = "",
    ) -> None:
        self.origin = httpx2.URL(origin)
        self.patience = patience or Patience()
        self.stop = stop or Stop()
        self._authorization = authorization
        self._login = login
        self._lock = threading.Lock()
        self._host = self.origin.netloc.decode()
        self.watch = Watch(self.stop)
        self._client = httpx2.Client(
            event_hooks={"request": [self.watch.follow]},
            timeout=httpx2.Timeout(self.patience.read, connect=self.patience.connect, pool=None),
            transport=transport,
            follow_redirects=False,
            # A proxy of the environment is for other machines.
            trust_env=not is_loopback(self._host),
            limits=httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            headers={"User-Agent": f"fluxkiln/{__version__}", "Accept-Encoding": "identity"},
        )

    def close(self) -> None:
        self.watch.close()
        self._client.close()

    def ask(
        self,
        method: str,
        url: str | httpx2.URL,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes = b"",
        accept: Iterable[int],
        what: str,
    ) -> Answer:
        """A request whose answer is read whole, repeated while it fails in a way that may pass.

        Raises AuthorizationError: not allowed. RegistryError: unreachable, or another status than those of `accept`.
        """

        def once() -> Answer:
            with self.stream(method, url, headers=headers, body=body) as response:
                answer = read_answer(response, what, self.stop)
            if answer.status not in accept:
                raise refused(answer, what)
            return answer

        return retrying(self.patience, self.stop, what, once)

    @contextmanager
    def stream(
        self,
        method: str,
        url: str | httpx2.URL,
        *,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
        pieces: Iterator[bytes] | None = None,
        length: int = 0,
    ) -> Iterator[httpx2.Response]:
        """One request; the answer's body is read by the caller. Redirects are followed, a challenge is answered.

        Args:
            pieces: a body of `length` bytes that can be sent once only: a challenge then is a TransientError, and the
                next try carries what it asks for.

        Raises:
            TransientError: the connection, the server or a proxy failed in a way that may pass.
            AuthorizationError: not allowed.
        """
        target = follow(self.origin, url)
        challenged = False
        for _ in range(MAX_REDIRECTS + 1):
            self._check_scheme(target)
            sent = dict(headers or {})
            own = _origin(target) == _origin(self.origin)
            if own and (authorization := self._authorization):
                sent["Authorization"] = authorization
            if pieces is not None:
                sent["Content-Length"] = str(length)
            self._check_clear(target, sent)
            request = self._client.build_request(
                method, target, headers=sent, content=pieces or body or None, timeout=self._timeout()
            )
            try:
                response = self._client.send(request, stream=True)
            except httpx2.TransportError as error:
                raise TransientError(_describe(error, target)) from error
            try:
                if response.status_code == 401 and own:
                    if challenged:
                        raise self._refuse(self._credential())
                    challenged = True
                    self._answer_challenge(response, sent.get("Authorization"))
                    if pieces is not None:
                        raise TransientError("the registry asked for authorization")
                    continue
                if response.status_code in _REDIRECT and method in ("GET", "HEAD") and "Location" in response.headers:
                    target = follow(target, response.headers["Location"])
                    continue
                if response.status_code in _LATER:
                    after = response.headers.get("Retry-After", "")
                    wait = float(after) if re.fullmatch(r"[0-9]{1,6}", after) else 0.0
                    raise TransientError(f"{target.host} answers {_status(response.status_code)}", wait=wait)
                yield response
                return
            except httpx2.TransportError as error:
                raise TransientError(_describe(error, target)) from error
            finally:
                response.close()
        raise RegistryError(
            f"{self.origin.host} redirects more than {MAX_REDIRECTS} times; check the registry's address"
        )

    def _check_scheme(self, target: httpx2.URL) -> None:
        plain = target.scheme == "http" and self.origin.scheme == "http"
        if plain or target.scheme == "https" or is_loopback(target.netloc.decode()):
            return
        raise RegistryError(f"{self.origin.host} sends us to {target.scheme}://{target.host}, which is not encrypted; "
                            "that is not followed")  # fmt: skip

    def _check_clear(self, target: httpx2.URL, sent: Mapping[str, str]) -> None:
        """Raise AuthorizationError before a credential or a token travels where everybody can read it."""
        if "Authorization" in sent and target.scheme != "https" and not is_loopback(target.netloc.decode()):
            raise AuthorizationError(
                f"{target.host} is spoken to without TLS, and a credential is not sent unencrypted; use its https "
                "address, or log out of it"
            )

    def _timeout(self) -> httpx2.Timeout:
        left = max(self.stop.left(), 0.1)
        return httpx2.Timeout(min(self.patience.read, left), connect=min(self.patience.connect, left), pool=None)

    def _credential(self) -> Credential | None:
        return find_credential(self._host, self.stop.left())

    def _answer_challenge(self, response: httpx2.Response, tried: str | None) -> None:
        """Find the authorization that the registry asks for; AuthorizationError when there is none left to try."""
        if self._login:
            raise AuthorizationError(f"{self._host} does not let us in; {self._login}")
        scheme, _, rest = response.headers.get("WWW-Authenticate", "").partition(" ")
        parameters = dict(_PARAMETER.findall(rest))
        with self._lock:
            if self._authorization != tried:
                return  # another thread was faster
            credential = self._credential()
            if scheme.lower() == "bearer":
                self._authorization = self._fetch_token(parameters, credential)
            elif scheme.lower() == "basic" and credential is not None and credential.basic() != tried:
                self._authorization = credential.basic()
            else:
                raise self._refuse(credential)

    def _fetch_token(self, parameters: Mapping[str, str], credential: Credential | None) -> str:
        realm = follow(self.origin, parameters.get("realm", ""))
        if "realm" not in parameters:
            raise RegistryError(
                f"{self._host} asks for a token and does not say where from; check the registry's address"
            )
        self._check_scheme(realm)
        wanted = {name: parameters[name] for name in ("service", "scope") if name in parameters}
        headers = {"Authorization": credential.basic()} if credential and not credential.identity_token else {}
        if credential is not None:
            self._check_clear(realm, {"Authorization": "what there is"})
            if not _belongs(realm.host, self.origin.host):
                raise AuthorizationError(
                    f"{self._host} wants its login sent to {realm.host}, which is neither its own host nor in its "
                    "domain; that is not done: check the registry's address"
                )
        if credential is not None and credential.identity_token:
            form = {"grant_type": "refresh_token", "refresh_token": credential.identity_token, "client_id": "fluxkiln"}
            request = self._client.build_request("POST", realm, data={**form, **wanted}, timeout=self._timeout())
        else:
            request = self._client.build_request("GET", realm, params=wanted, headers=headers, timeout=self._timeout())
        try:
            response = self._client.send(request, stream=True)
            try:
                answer = read_answer(response, f"a token of {realm.host}", self.stop, SMALL.nbytes)
            finally:
                response.close()
        except httpx2.TransportError as error:
            raise TransientError(_describe(error, realm)) from error
        if answer.status in _LATER:
            raise TransientError(f"{realm.host} answers {_status(answer.status)}")
        if answer.status != 200:
            raise self._refuse(credential)
        remedy = "check the registry's address"
        document = read_object(answer.body, f"the token of {realm.host}", error=RegistryError, remedy=remedy)
        token = document.get("token") or document.get("access_token")
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise RegistryError(f"{realm.host} answers no token; {remedy}")
        return f"Bearer {token}"

    def _refuse(self, credential: Credential | None) -> AuthorizationError:
        again = f"docker login {self._host} (or skopeo login {self._host})"
        if credential is None:
            return AuthorizationError(f"{self._host} asks for a login and there is none for it; run: {again}")
        who = f" of {credential.user}" if credential.user else ""
        return AuthorizationError(f"{self._host} does not accept the credential{who}; log in again: {again}")


def _belongs(host: str, registry: str) -> bool:
    """Whether a registry's logins may go to `host`: itself, or a neighbour under the domain it is in.

    A domain of two short names, `co.uk` say, is nobody's.
    """
    if host == registry:
        return True
    domain = registry.split(".")[1:] if registry.count(".") > 1 else registry.split(".")
    owned = len(domain) > 2 or (len(domain) == 2 and (len(domain[0]) > 3 or len(domain[1]) > 2))
    return owned and not is_loopback(registry) and (host == ".".join(domain) or host.endswith("." + ".".join(domain)))


def read_answer(response: httpx2.Response, what: str, stop: Stop, most: int | None = None) -> Answer:
    """An answer read whole, as it was sent; RegistryError when it is larger than `most`, or too slow."""
    most = MAX_ANSWER_BYTES if most is None else most
    found = bytearray()
    for piece in response.iter_raw():
        stop.check()
        found += piece
        if len(found) > most:
            raise RegistryError(f"{what}: the answer is larger than {most} bytes, which none is; check the "
                                "registry's address")  # fmt: skip
    stop.check()  # it may have been cut short for that
    return Answer(response.status_code, response.headers, bytes(found), response.url)


def refused(answer: Answer, what: str) -> FluxkilnError:
    """The error for a status that is not one of those that were expected."""
    answers = f"{what}: {answer.url.netloc.decode()} answers {_status(answer.status)}"
    detail = re.sub(r"[^\x20-\x7e]+", " ", answer.body[:300].decode(errors="replace").strip())
    if answer.status in (401, 403):
        return AuthorizationError(
            f"{answers}: the credential may not do that. Log in as somebody who may (docker login, HF_TOKEN)"
        )
    if answer.status == 405:
        return RegistryError(f"{answers}: the registry, or this repository, is read-only; publish to another")
    return RegistryError(f"{answers}{': ' if detail else ''}{detail}; check the reference and the registry's log")


def follow(base: httpx2.URL, address: str | httpx2.URL) -> httpx2.URL:
    """The address as seen from `base`; TransientError when it is none, as after a flipped bit."""
    try:
        return base.join(address)
    except (httpx2.InvalidURL, ValueError) as error:
        raise TransientError(f"{base.netloc.decode()} sends us to an address that is none") from error


def _origin(url: httpx2.URL) -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port or {"https": 443, "http": 80}.get(url.scheme)


def _status(status: int) -> str:
    return f"{status} {httpx2.codes.get_reason_phrase(status).lower()}".strip()


def _describe(error: httpx2.TransportError, target: httpx2.URL) -> str:
    # The address may hold a state that is worth as much as a password: the host is enough.
    kind = {
        httpx2.ConnectError: "cannot be reached",
        httpx2.ConnectTimeout: "does not answer",
        httpx2.ReadTimeout: "stopped answering",
        httpx2.WriteTimeout: "stopped taking bytes",
    }.get(type(error), "ended the connection")
    hint = ""
    if isinstance(error, httpx2.ConnectError) and target.scheme == "https" and "SSL" in str(error).upper():
        hint = " (TLS failed; a registry without TLS needs --plain-http)"
    return f"{target.netloc.decode()} {kind}{hint}"
