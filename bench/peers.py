"""A registry that lies, waits, drips and never ends, in a process of its own."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

PIECE = b"x" * (1 << 16)
# Each what is sent after a request was read; `body` is a spoiled document.
MODES: dict[str, Callable[[socket.socket, str, bytes], None]] = {}
Setter = Callable[[], object]
Answers = Callable[[int, Sequence[bytes]], Iterator[Setter]]


def mode(work: Callable[[socket.socket, str, bytes], None]) -> Callable[[socket.socket, str, bytes], None]:
    MODES[work.__name__] = work
    return work


@contextmanager
def hostile_registry(folder: Path) -> Iterator[tuple[str, Answers]]:
    """Its address, and a function that gives so many ways to set what it answers from then on."""
    folder.mkdir(parents=True, exist_ok=True)
    listening = socket.create_server(("127.0.0.1", 0), backlog=256)
    child = os.fork()
    if not child:
        _serve(listening, folder)
    host = "{}:{}".format(*listening.getsockname())
    listening.close()

    def answers(count: int, bodies: Sequence[bytes]) -> Iterator[Setter]:
        names = itertools.cycle(["document", "document", "token", *MODES]) if bodies else itertools.repeat("challenge")
        for number, name in zip(range(count), names, strict=False):
            body = bodies[number % len(bodies)] if bodies else b""
            yield lambda name=name, body=body: (folder / "answer").write_bytes(name.encode() + b"\n" + body)

    try:
        yield host, answers
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _serve(listening: socket.socket, folder: Path) -> None:
    while True:
        peer, _ = listening.accept()
        threading.Thread(target=_answer, args=(peer, folder), daemon=True).start()


def _answer(peer: socket.socket, folder: Path) -> None:
    with peer, suppress(OSError):
        data = b""
        while b"\r\n\r\n" not in data:
            piece = peer.recv(1 << 16)
            if not piece:
                return
            data += piece
        name, _, body = (folder / "answer").read_bytes().partition(b"\n")
        path = data.split(b" ", 2)[1].decode(errors="replace")
        peer.settimeout(30)
        MODES[name.decode()](peer, path + (" known" if b"Authorization" in data else ""), body)


def send(peer: socket.socket, status: str, body: bytes = b"", *headers: str) -> None:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    peer.sendall("\r\n".join(lines).encode() + body)


@mode
def document(peer: socket.socket, path: str, body: bytes) -> None:
    send(peer, "200 OK", body)


@mode
def challenge(peer: socket.socket, path: str, body: bytes) -> None:
    send(peer, "401 Unauthorized", b"", 'WWW-Authenticate: Basic realm="x"')


@mode
def token(peer: socket.socket, path: str, body: bytes) -> None:
    host = "{}:{}".format(*peer.getsockname())
    if path.startswith("/token") or path.endswith(" known"):
        return send(peer, "200 OK", body)
    return send(peer, "401 Unauthorized", b"", f'WWW-Authenticate: Bearer realm="http://{host}/token",service="s"')


@mode
def endless_token(peer: socket.socket, path: str, body: bytes) -> None:
    if path.startswith("/token"):
        return endless(peer, path, body)
    return token(peer, path, body)


@mode
def endless(peer: socket.socket, path: str, body: bytes) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        peer.sendall(PIECE)


@mode
def bomb(peer: socket.socket, path: str, body: bytes) -> None:
    send(peer, "200 OK", gzip.compress(bytes(100 << 20), 6), "Content-Encoding: gzip")


@mode
def dripping_headers(peer: socket.socket, path: str, body: bytes) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nX-Long: ")
    _drip(peer)


@mode
def dripping_body(peer: socket.socket, path: str, body: bytes) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
    _drip(peer)


@mode
def dripping_informations(peer: socket.socket, path: str, body: bytes) -> None:
    while True:
        time.sleep(0.05)
        peer.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n")


def _drip(peer: socket.socket) -> None:
    while True:
        time.sleep(0.1)
        peer.sendall(b"x")


@mode
def silent(peer: socket.socket, path: str, body: bytes) -> None:
    time.sleep(3600)


@mode
def later(peer: socket.socket, path: str, body: bytes) -> None:
    send(peer, "503 Service Unavailable", b"", "Retry-After: 60")


@mode
def circle(peer: socket.socket, path: str, body: bytes) -> None:
    send(peer, "302 Found", b"", f"Location: {path.split()[0]}x")


@mode
def pages_without_end(peer: socket.socket, path: str, body: bytes) -> None:
    tags = json.dumps({"tags": [f"t{time.monotonic_ns()}"]}).encode()
    send(peer, "200 OK", tags, f'Link: </v2/flux/tags/list?last={time.monotonic_ns()}>; rel="next"')


@mode
def many_tags(peer: socket.socket, path: str, body: bytes) -> None:
    listed = path.startswith("/v2/flux/tags")
    send(peer, "200 OK", json.dumps({"tags": [f"v{number}" for number in range(20_000)]}).encode() if listed else b"{}")


@mode
def garbage(peer: socket.socket, path: str, body: bytes) -> None:
    peer.sendall(bytes(range(256)) * 40)


@mode
def wide_headers(peer: socket.socket, path: str, body: bytes) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1_000_000 + b"\r\n")


@mode
def cut(peer: socket.socket, path: str, body: bytes) -> None:
    peer.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{")
