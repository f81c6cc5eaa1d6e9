"""HTTP to one registry: authorization, redirects, time-outs. Authorization goes to the registry's own origin only.

Sources: OCI distribution-spec v1.1; docs.docker.com, "Token authentication specification" and `docker login`
(config.json, credential stores); containers-auth.json(5); RFC 9110.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from fluxkiln import __version__
from fluxkiln.artifacts.registry.place import is_loopback
from fluxkiln.artifacts.registry.transfer import Patience, Stop, TransientError, retrying
from fluxkiln.errors import FluxkilnError, RegistryError

MAX_REDIRECTS = 5
CONNECTIONS = 8
# Of an answer that is read whole: manifests and lists of tags.
MAX_ANSWER_BYTES = 16 << 20
_LATER = (408, 425, 429, 500, 502, 503, 504)
_REDIRECT = (301, 302, 303, 307, 308)
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
        self._client = httpx2.Client(
            timeout=httpx2.Timeout(self.patience.read, connect=self.patience.connect, pool=None),
            transport=transport,
            follow_redirects=False,
            # A proxy of the environment is for other machines.
            trust_env=not is_loopback(self._host),
            limits=httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
            headers={"User-Agent": f"fluxkiln/{__version__}", "Accept-Encoding": "identity"},
        )

    def close(self) -> None:
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
                answer = read_answer(response, what)
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
            request = self._client.build_request(method, target, headers=sent, content=pieces or body or None)
            try:
                response = self._client.send(request, stream=True)
            except httpx2.TransportError as error:
                raise TransientError(_describe(error, target)) from error
            try:
                if response.status_code == 401 and own:
                    if challenged:
                        raise self._refuse(find_credential(self._host))
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

    def _answer_challenge(self, response: httpx2.Response, tried: str | None) -> None:
        """Find the authorization that the registry asks for; AuthorizationError when there is none left to try."""
        if self._login:
            raise AuthorizationError(f"{self._host} does not let us in; {self._login}")
        scheme, _, rest = response.headers.get("WWW-Authenticate", "").partition(" ")
        parameters = dict(_PARAMETER.findall(rest))
        with self._lock:
            if self._authorization != tried:
                return  # another thread was faster
            credential = find_credential(self._host)
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
        try:
            if credential is not None and credential.identity_token:
                token = credential.identity_token
                form = {"grant_type": "refresh_token", "refresh_token": token, "client_id": "fluxkiln", **wanted}
                response = self._client.post(realm, data=form)
            else:
                headers = {"Authorization": credential.basic()} if credential else {}
                response = self._client.get(realm, params=wanted, headers=headers)
        except httpx2.TransportError as error:
            raise TransientError(_describe(error, realm)) from error
        if response.status_code in _LATER:
            raise TransientError(f"{realm.host} answers {_status(response.status_code)}")
        if response.status_code != 200:
            raise self._refuse(credential)
        try:
            document: Any = response.json()
            return "Bearer " + str(document.get("token") or document["access_token"])
        except (ValueError, KeyError, AttributeError):
            raise RegistryError(f"{realm.host} answers no token; check the registry's address") from None

    def _refuse(self, credential: Credential | None) -> AuthorizationError:
        again = f"docker login {self._host} (or skopeo login {self._host})"
        if credential is None:
            return AuthorizationError(f"{self._host} asks for a login and there is none for it; run: {again}")
        who = f" of {credential.user}" if credential.user else ""
        return AuthorizationError(f"{self._host} does not accept the credential{who}; log in again: {again}")


def read_answer(response: httpx2.Response, what: str) -> Answer:
    """An answer read whole; RegistryError when it is larger than any of a registry is."""
    found = bytearray()
    for piece in response.iter_raw():
        found += piece
        if len(found) > MAX_ANSWER_BYTES:
            raise RegistryError(f"{what}: the answer is larger than {MAX_ANSWER_BYTES} bytes, which none is; check the "
                                "registry's address")  # fmt: skip
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


HELPER_SECONDS = 30
# What Docker calls its own registry in that file.
_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_TOKEN_USER = "<token>"


@dataclass(frozen=True, slots=True)
class Credential:
    """User and password, or an identity token to be exchanged; nothing of it is ever shown."""

    user: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)

    def basic(self) -> str:
        """As an Authorization header has it."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def find_credential(host: str) -> Credential | None:
    """The credential for a registry, or None when the user has logged in nowhere like it.

    Looked for in `$DOCKER_CONFIG/config.json` or `~/.docker/config.json`: the host's own helper, the store, then the
    file itself; then in the file that skopeo and podman write.

    Raises RegistryError: a file that cannot be read, or a helper that fails.
    """
    names = (host, f"https://{host}", f"https://{host}/v2/", f"http://{host}")
    if host in _DOCKER_HUB:
        names = ("https://index.docker.io/v1/", *_DOCKER_HUB)
    files = [Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")]
    if auth_file := os.environ.get("REGISTRY_AUTH_FILE"):
        files.append(Path(auth_file))
    elif runtime := os.environ.get("XDG_RUNTIME_DIR"):
        files.append(Path(runtime, "containers", "auth.json"))
    for path in files:
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise RegistryError(
                f"{path} cannot be read ({type(error).__name__}); put it right or log in again"
            ) from None
        if not isinstance(config, dict):
            raise RegistryError(f"{path} is no JSON object; put it right or log in again")
        helpers, auths = (config.get(key) or {} for key in ("credHelpers", "auths"))
        asked = [(helpers.get(name), name) for name in names] if isinstance(helpers, Mapping) else []
        for helper, name in [*asked, *((config.get("credsStore"), name) for name in names)]:
            if isinstance(helper, str) and (found := _ask(helper, name)) is not None:
                return found
        for name in names if isinstance(auths, Mapping) else ():
            if isinstance(entry := auths.get(name), Mapping) and (found := _entry(entry, path, name)) is not None:
                return found
    return None


def _entry(entry: Mapping[str, Any], path: Path, name: str) -> Credential | None:
    token = entry.get("identitytoken")
    if isinstance(token, str) and token:
        return Credential(identity_token=token)
    auth = entry.get("auth")
    if not isinstance(auth, str) or not auth:
        return None
    try:
        user, colon, password = base64.b64decode(auth, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = ""
    if not colon:
        raise RegistryError(f"{path} has no usable entry for {name}; log in again: docker login {name}")
    return Credential(user, password)


def _ask(helper: str, name: str) -> Credential | None:
    """What a helper knows; its protocol is the host on stdin and JSON on stdout."""
    if not _HELPER.fullmatch(helper):
        raise RegistryError(f"the credential helper {helper!r} has no legal name; put Docker's config.json right")
    program = f"docker-credential-{helper}"
    try:
        done = subprocess.run(
            [program, "get"], input=name, capture_output=True, text=True, timeout=HELPER_SECONDS, check=False
        )
    except FileNotFoundError:
        raise RegistryError(f"{program} is not installed, Docker's config.json names it; install it or log in "
                            "without it") from None  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RegistryError(
            f"{program} did not answer for {name} in {HELPER_SECONDS} s; unlock it and try again"
        ) from None
    if done.returncode:
        # Its way to say that it has nothing; the sentence goes to stdout.
        if "not found" in done.stdout.lower() or "no credentials" in done.stdout.lower():
            return None
        raise RegistryError(f"{program} failed for {name} (exit code {done.returncode}); unlock it or log in again")
    try:
        answer = json.loads(done.stdout)
        user, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError):
        raise RegistryError(f"{program} answered no credential for {name}; log in again") from None
    return Credential(identity_token=secret) if user == _TOKEN_USER else Credential(user, secret)
