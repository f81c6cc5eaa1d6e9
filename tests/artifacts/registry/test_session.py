"""What is sent to whom: a stub registry and a stub token server, in this process. The real registry is in test_oci."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from fluxkiln.artifacts.registry.session import AuthorizationError, Session, _belongs
from fluxkiln.artifacts.registry.transfer import Patience, Stop, StoppedError
from fluxkiln.errors import RegistryError

QUICK = Patience(3, 1.0, 0.5, 0.01, 0.02)
Answer = tuple[int, dict[str, str], bytes]


class Stub:
    """A web server whose answers a test gives; `seen` are (method, path, Authorization)."""

    def __init__(self, answer: Callable[[str, str, str | None], Answer]) -> None:
        stub = self
        self.seen: list[tuple[str, str, str | None]] = []

        class Requests(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                stub.bodies.append(self.rfile.read(length))
                authorization = self.headers.get("Authorization")
                stub.seen.append((self.command, self.path, authorization))
                status, headers, body = answer(self.command, self.path, authorization)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_PATCH = answer

            def log_message(self, *arguments: object) -> None:
                pass

        self.bodies: list[bytes] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Requests)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    started = []

    def start(answer: Callable[[str, str, str | None], Answer]) -> Stub:
        started.append(Stub(answer))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def session() -> Iterator[Callable[..., Session]]:
    opened = []

    def start(host: str, **more) -> Session:
        opened.append(Session(f"http://{host}", patience=QUICK, **more))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def log_in(config, host: str, **entry: str) -> None:
    config.write_text(json.dumps({"auths": {host: entry}}))


def basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def test_authorization_does_not_follow_a_redirect_to_another_host(stub, session):
    elsewhere = stub(lambda method, path, authorization: (200, {}, b"bytes"))
    registry = stub(
        lambda method, path, authorization: (
            (307, {"Location": f"http://{elsewhere.host}/signed?x=1"}, b"")
            if path == "/far"
            else (302, {"Location": "/near"}, b"")
            if path == "/here"
            else (200, {}, b"near")
        )
    )
    one = session(registry.host, authorization="Bearer secret")
    assert one.ask("GET", "/far", accept=(200,), what="x").body == b"bytes"
    assert elsewhere.seen == [("GET", "/signed?x=1", None)]
    assert one.ask("GET", "/here", accept=(200,), what="x").body == b"near"
    # The control: to the registry itself it does go, also after a redirect.
    assert [authorization for _, _, authorization in registry.seen] == ["Bearer secret"] * 3


def test_a_challenge_of_another_host_is_not_answered(stub, session, own_credentials):
    challenge = {"WWW-Authenticate": 'Basic realm="give me"'}
    elsewhere = stub(lambda method, path, authorization: (401, challenge, b""))
    registry = stub(lambda method, path, authorization: (302, {"Location": f"http://{elsewhere.host}/"}, b""))
    config = {"auths": {host: {"auth": basic("ann", "secret")} for host in (registry.host, elsewhere.host)}}
    own_credentials.write_text(json.dumps(config))
    with pytest.raises(AuthorizationError):
        session(registry.host).ask("GET", "/", accept=(200,), what="x")
    assert {authorization for _, _, authorization in elsewhere.seen} == {None}


def test_redirect_to_plain_http_is_not_followed(stub, session):
    registry = stub(lambda method, path, authorization: (302, {"Location": "http://example.invalid/x"}, b""))
    one = session(registry.host)
    one.origin = one.origin.copy_with(scheme="https")
    with pytest.raises(RegistryError, match="not encrypted"):
        one._check_scheme(one.origin.copy_with(scheme="http", host="example.invalid"))
    one._check_scheme(one.origin.copy_with(scheme="http", host="127.0.0.1"))
    with pytest.raises(RegistryError, match="not encrypted"):
        one._check_scheme(one.origin.copy_with(scheme="ftp", host="example.invalid"))


@pytest.mark.parametrize("address", ["http://[::1", "http://a\x7fb/", "\x01", "http://host:99999999/"])
def test_an_address_that_is_none_is_no_bug(stub, session, address):
    """As after a flipped bit in a header."""
    registry = stub(lambda method, path, authorization: (302, {"Location": address}, b""))
    with pytest.raises(RegistryError):
        session(registry.host).ask("GET", "/", accept=(200,), what="x")


def test_redirects_in_a_circle_end(stub, session):
    registry = stub(lambda method, path, authorization: (302, {"Location": "/again"}, b""))
    with pytest.raises(RegistryError, match="redirects more than 5 times"):
        session(registry.host).ask("GET", "/", accept=(200,), what="x")


def bearer_registry(stub, token_path: str = "/token"):
    def answer(method: str, path: str, authorization: str | None) -> Answer:
        if path.startswith(token_path):
            return (
                (200, {}, b'{"token": "T1"}') if authorization == "Basic " + basic("ann", "secret") else (401, {}, b"")
            )
        if authorization == "Bearer T1":
            return 200, {}, b"yes"
        realm = f'Bearer realm="http://{registry.host}{token_path}",service="s",scope="repository:a:pull,push"'
        return 401, {"WWW-Authenticate": realm}, b""

    registry = stub(answer)
    return registry


def test_a_token_is_fetched_once_and_used(stub, session, own_credentials):
    registry = bearer_registry(stub)
    log_in(own_credentials, registry.host, auth=basic("ann", "secret"))
    one = session(registry.host)
    for _ in range(3):
        assert one.ask("GET", "/v2/", accept=(200,), what="x").body == b"yes"
    asked = [path for _, path, _ in registry.seen if path.startswith("/token")]
    assert asked == ["/token?service=s&scope=repository%3Aa%3Apull%2Cpush"]
    assert {authorization for _, path, authorization in registry.seen if path == "/v2/"} == {None, "Bearer T1"}


def test_a_token_server_that_refuses(stub, session, own_credentials):
    registry = bearer_registry(stub)
    log_in(own_credentials, registry.host, auth=basic("ann", "wrong"))
    with pytest.raises(AuthorizationError, match="does not accept the credential of ann") as found:
        session(registry.host).ask("GET", "/v2/", accept=(200,), what="x")
    assert "wrong" not in str(found.value)


def test_an_identity_token_is_exchanged_and_not_shown_around(stub, session, own_credentials):
    def answer(method: str, path: str, authorization: str | None) -> Answer:
        if path == "/token":
            return 200, {}, b'{"access_token": "T2"}'
        if authorization == "Bearer T2":
            return 200, {}, b"yes"
        return 401, {"WWW-Authenticate": f'Bearer realm="http://{registry.host}/token",service="s"'}, b""

    registry = stub(answer)
    log_in(own_credentials, registry.host, identitytoken="I AM ANN")
    assert session(registry.host).ask("GET", "/v2/", accept=(200,), what="x").body == b"yes"
    assert [method for method, path, _ in registry.seen if path == "/token"] == ["POST"]
    assert b"refresh_token=I+AM+ANN" in b"".join(registry.bodies)


def test_what_may_pass_is_tried_again_and_what_may_not_is_not(stub, session):
    answers = [(503, {}, b""), (429, {"Retry-After": "0"}, b""), (200, {}, b"at last")]
    registry = stub(lambda method, path, authorization: answers.pop(0))
    assert session(registry.host).ask("GET", "/", accept=(200,), what="x").body == b"at last"
    for status, sentence in ((403, "may not do that"), (405, "read-only"), (418, "i'm a teapot")):
        refusing = stub(lambda method, path, authorization, status=status: (status, {}, b"why\x1b[31m not"))
        with pytest.raises(RegistryError, match=sentence) as found:
            session(refusing.host).ask("PUT", "/", accept=(200,), what="x")
        assert len(refusing.seen) == 1
        assert "\x1b" not in str(found.value)
    down = stub(lambda method, path, authorization: (503, {}, b""))
    with pytest.raises(RegistryError, match="503 service unavailable; tried 3 times"):
        session(down.host).ask("GET", "/", accept=(200,), what="x")
    assert len(down.seen) == 3


def test_an_endless_answer_is_not_read(stub, session, monkeypatch):
    monkeypatch.setattr("fluxkiln.artifacts.registry.session.MAX_ANSWER_BYTES", 1000)
    registry = stub(lambda method, path, authorization: (200, {}, b"x" * 5000))
    with pytest.raises(RegistryError, match="larger than 1000 bytes"):
        session(registry.host).ask("GET", "/", accept=(200,), what="x")


def test_a_stopped_session_asks_nothing(stub, session):
    stop = Stop()
    registry = stub(lambda method, path, authorization: (200, {}, b""))
    one = session(registry.host, stop=stop)
    stop.event.set()
    with pytest.raises(StoppedError):
        one.ask("GET", "/", accept=(200,), what="x")
    assert registry.seen == []


def challenging(realm: str):
    """An answer that asks for a token from `realm`, unless there is one."""
    header = {"WWW-Authenticate": f'Bearer realm="{realm}",service="s"'}
    return lambda method, path, authorization: (200, {}, b"") if authorization else (401, header, b"")


@pytest.mark.parametrize(
    ("headers", "body", "fault"),
    [
        ({}, b'{"token": "' + b"x" * (1 << 21) + b'"}', "larger than 1048576 bytes"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b'{"token": "x"}'), "is not valid JSON"),
        ({}, b'{"token": "x\\r\\nEvil: 1"}', "answers no token"),
        ({}, b'{"token": ["x"]}', "answers no token"),
        ({}, b"[" * 60_000, "is not valid JSON"),
    ],
)
def test_a_token_is_small_and_a_token(stub, session, headers, body, fault):
    tokens = stub(lambda method, path, authorization: (200, headers, body))
    registry = stub(challenging(f"http://{tokens.host}/token"))
    with pytest.raises(RegistryError, match=fault):
        session(registry.host).ask("GET", "/", accept=(200,), what="x")


def test_a_deadline_ends_slow_answers(stub, session):
    slow = stub(lambda method, path, authorization: (503, {"Retry-After": "60"}, b""))
    one = session(slow.host, stop=Stop(seconds=0.3))
    with pytest.raises(RegistryError, match=r"its deadline of 0 s is over.*--deadline gives it more"):
        one.ask("GET", "/", accept=(200,), what="x")


@pytest.mark.parametrize("start", [b"", b"HTTP/1.1 200 OK\r\nX-Long: ", b"HTTP/1.1 200 OK\r\n\r\n"])
def test_a_deadline_ends_an_answer_that_comes_byte_by_byte(session, start):
    """Every byte begins the time limit of a read anew. Without a deadline of all of them the answer would be taken."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def drip() -> None:
            peer, _ = server.accept()
            with peer, contextlib.suppress(OSError):  # the other side has had enough
                peer.sendall(start)
                for _ in range(600):
                    time.sleep(0.05)
                    peer.sendall(b"x")
                peer.sendall(b"\r\n\r\n")

        threading.Thread(target=drip, daemon=True).start()
        one = session(f"127.0.0.1:{server.getsockname()[1]}", stop=Stop(seconds=1.0))
        with pytest.raises(RegistryError, match="its deadline of 1 s is over"):
            one.ask("GET", "/", accept=(200,), what="x")


def test_a_credential_is_not_sent_in_clear():
    one = Session("http://registry.example", authorization="Basic eDp5")
    with pytest.raises(AuthorizationError, match="a credential is not sent unencrypted"):
        one.ask("GET", "/", accept=(200,), what="x")


@pytest.mark.parametrize(
    ("host", "registry", "belongs"),
    [
        ("auth.docker.io", "registry-1.docker.io", True),
        ("gitlab.com", "registry.gitlab.com", True),
        ("ghcr.io", "ghcr.io", True),
        ("evil.example", "registry.docker.io", False),
        ("evildocker.io", "registry.docker.io", False),
        ("evil.co.uk", "registry.co.uk", False),
        ("127.0.0.2", "127.0.0.1", False),
    ],
)
def test_where_logins_may_go(host, registry, belongs):
    assert _belongs(host, registry) is belongs
