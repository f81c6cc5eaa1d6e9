"""One fault on the way between us and a real registry, chosen by a seed: a correct artifact, or an error and nothing.

The proxy is ours; server and clients are the real ones. What a push left is judged by reading it straight from the
server, past the proxy, and comparing every byte with the source.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fluxkiln.artifacts.registry import oci
from fluxkiln.artifacts.registry.transfer import Patience
from fluxkiln.build.publish import Transfers, list_tags, publish_bundle, pull_bundle
from fluxkiln.errors import FluxkilnError, IntegrityError, UsageError

pytestmark = pytest.mark.registry

REPOSITORY = Path(__file__).parents[3]
PATIENCE = Patience(6, 1.0, 0.6, 0.01, 0.05)
# Until the server answers again, the client must hold out.
LONG_PATIENCE = Patience(12, 1.0, 2.0, 0.05, 0.3)
CHUNK = 40_000
UP, DOWN = "up", "down"
BYTE_FAULTS = ("cut", "truncate", "stall", "flip", "server killed", "client killed")
FAULTS = (*BYTE_FAULTS, "5xx", "wrong length", "flip on disk")
CLIENT = """
import sys
from pathlib import Path
from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.registry import oci
from fluxkiln.artifacts.registry.transfer import Patience
from fluxkiln.build import publish
from fluxkiln.build.publish import Transfers, publish_bundle, pull_bundle
publish.open_bundle = lambda folder, progress=None: read_bundle(folder, progress=progress)  # as `small_bundles`
oci.CHUNK_BYTES = {chunk}
work, folder, reference = sys.argv[1:]
transfers = Transfers(patience=Patience(3, 1.0, 1.0, 0.01, 0.05))
if work == "push":
    publish_bundle(Path(folder), reference, transfers=transfers)
else:
    pull_bundle(reference, Path(folder), transfers=transfers)
"""


@dataclass
class Fault:
    """What goes wrong, once: at a byte of one direction, or (5xx, wrong length) in the answer to a request."""

    kind: str
    direction: str = DOWN
    at: int = 0
    act: object = None
    fired: threading.Event = field(default_factory=threading.Event)


class Proxy:
    """Passes bytes on between any client and one server on this machine, but for the fault."""

    def __init__(self, target: int, fault: Fault) -> None:
        self.fault = fault
        self.moved = {UP: 0, DOWN: 0}
        self._requests = 0
        self._target = target
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._sockets:
            _end(one)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _end(client)
                continue
            self._sockets += [client, server]
            for source, target, direction in ((client, server, UP), (server, client, DOWN)):
                threading.Thread(target=self._pump, args=(source, target, direction), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, direction: str) -> None:
        try:
            while data := source.recv(16384):
                data = self._change(data, source, target, direction)
                if data is None:
                    return
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            _end(source)
            _end(target)

    def _change(self, data: bytes, source: socket.socket, target: socket.socket, direction: str) -> bytes | None:
        fault = self.fault
        with self._lock:
            start = self.moved[direction]
            self.moved[direction] += len(data)
            if fault.fired.is_set() or direction != fault.direction or not self._is_place(data, start):
                return data
            here = fault.at - start
            fault.fired.set()
        if fault.kind == "flip":
            return data[:here] + bytes([data[here] ^ (1 << (here % 8))]) + data[here + 1 :]
        if fault.kind == "5xx":
            return b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
        if fault.kind == "wrong length":
            wrong = rb"\g<1>%d" % (fault.at % 7 + 1)
            return re.sub(rb"(?im)^(content-length: )\d+", wrong, data, count=1)
        if fault.kind == "stall":
            time.sleep(4)
            return None
        with suppress(OSError):
            target.sendall(data[:here])
        if fault.kind == "truncate":
            for one in (source, target):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
            return None
        if callable(fault.act):
            fault.act()
        _end(source)
        _end(target)
        return None

    def _is_place(self, data: bytes, start: int) -> bool:
        """Whether the fault belongs into these bytes."""
        fault = self.fault
        if fault.kind in BYTE_FAULTS:
            return start <= fault.at < start + len(data)
        if fault.kind not in ("5xx", "wrong length") or not data.startswith(b"HTTP/1.1 "):
            return False
        if fault.kind == "wrong length" and not re.search(rb"(?im)^content-length: [1-9]", data):
            return False
        self._requests += 1
        return self._requests > fault.at


def _end(one: socket.socket) -> None:
    """As a network does that is gone: a reset, no goodbye."""
    with suppress(OSError):
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.shutdown(socket.SHUT_RDWR)
    with suppress(OSError):
        one.close()


@pytest.fixture
def tmp_path(tmp_path) -> Iterator[Path]:
    """In memory where that is possible: these tests are about what the network does, and sync the disk often."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="fluxkiln-faults-", dir=shared))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def weights() -> dict[str, bytes]:
    source = random.Random(6)
    return {f"weights/{i}.data": source.randbytes(size) for i, size in enumerate((150_000, 90_000, 3000, 1, 0))}


def run_seed(seed: int, build, start_registry, weights, tmp_path, tree, monkeypatch) -> str:
    """One fault; returns how it ended. Asserts what must hold however it ended."""
    monkeypatch.setattr(oci, "CHUNK_BYTES", CHUNK)
    source = random.Random(seed)
    kind = FAULTS[seed % len(FAULTS)]
    work = "pull" if kind == "flip on disk" else source.choice(("push", "pull"))
    direction = DOWN if kind in ("5xx", "wrong length") else source.choice((UP, DOWN))
    bulk = (work, direction) in (("push", UP), ("pull", DOWN))
    # Bytes that surely flow in that direction, headers included; requests that are surely made.
    at = source.randrange(9 if kind in ("5xx", "wrong length") else 240_000 if bulk else 1500)
    server = start_registry()
    folder, out = build(files=weights), tmp_path / "out"
    expected = tree(folder / "bundle")
    del expected["build.json"]
    fault = Fault(kind, direction, at)
    proxy = Proxy(server.port, fault)
    through, straight = f"127.0.0.1:{proxy.port}/group/tiny:v1", f"{server.host}/group/tiny:v1"
    if work == "pull":
        document = publish_bundle(folder, straight).document
    if kind == "flip on disk":
        layer = source.choice([layer for layer in document.layers if layer.size])
        data = bytearray(server.blob(layer.digest).read_bytes())
        data[source.randrange(len(data))] ^= 1 << source.randrange(8)
        server.blob(layer.digest).write_bytes(data)
        fault.fired.set()
    if kind == "server killed":
        fault.act = lambda: threading.Thread(target=lambda: (server.kill(), time.sleep(0.1), server.start())).start()
    transfers = Transfers(patience=LONG_PATIENCE if kind == "server killed" else PATIENCE)
    error: FluxkilnError | None = None
    try:
        if kind == "client killed":
            killed_client(work, folder if work == "push" else out, through, fault)
        elif work == "push":
            publish_bundle(folder, through, transfers=transfers)
        else:
            pull_bundle(through, out, transfers=transfers)
    except FluxkilnError as found:
        error = found
    finally:
        proxy.close()
    assert fault.fired.is_set(), "the fault never came"
    wait_for(server)
    if error is not None:
        assert str(error).count("\n") == 0
        assert len(str(error)) > 20
    if work == "push":
        judge_push(error, kind, straight, tmp_path / "judge", expected, tree)
    elif kind != "client killed":
        assert out.exists() == (error is None)
        if kind == "flip on disk":
            assert isinstance(error, IntegrityError)
            assert layer.path in str(error)
    if out.exists():
        assert tree(out / "bundle") == expected
    if kind != "flip on disk":
        # Whatever it left is no obstacle: the same command, and all is well.
        if work == "push":
            publish_bundle(folder, straight)
        pull_bundle(straight, out)
        assert tree(out / "bundle") == expected
    return f"{kind}: {'error' if error else 'whole'}"


def judge_push(error, kind: str, straight: str, judged: Path, expected: dict[str, bytes], tree) -> None:
    if "v1" not in tags_of(straight):
        assert error is not None or kind == "client killed", "a push that said it was done left no tag"
        return
    # A tag is there: then everything is, whatever the client was told.
    pull_bundle(straight, judged)
    assert tree(judged / "bundle") == expected
    shutil.rmtree(judged)
    assert error is None, f"a tag is there although the push ended in: {error}"


def tags_of(reference: str) -> list[str]:
    try:
        return list(list_tags(reference.rsplit(":", 1)[0])[1])
    except UsageError:
        return []


def killed_client(work: str, folder: Path, reference: str, fault: Fault) -> None:
    script = CLIENT.format(chunk=CHUNK)
    process = subprocess.Popen([sys.executable, "-c", script, work, str(folder), reference], cwd=REPOSITORY)
    fault.act = lambda: os.kill(process.pid, signal.SIGKILL)
    assert process.wait(timeout=60) == -signal.SIGKILL


def wait_for(server) -> None:
    deadline = time.monotonic() + 20
    while server.process is None and time.monotonic() < deadline:
        time.sleep(0.02)
    server._wait()


@pytest.mark.parametrize("seed", range(36))
def test_fault(seed, build, start_registry, weights, tmp_path, tree, monkeypatch):
    run_seed(seed, build, start_registry, weights, tmp_path, tree, monkeypatch)


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(36, 236))
def test_more_faults(seed, build, start_registry, weights, tmp_path, tree, monkeypatch):
    run_seed(seed, build, start_registry, weights, tmp_path, tree, monkeypatch)


def test_the_proxy_without_a_fault_changes_nothing(build, start_registry, weights, tmp_path, tree):
    """The negative control: what is found in the other tests comes from the fault."""
    server = start_registry()
    proxy = Proxy(server.port, Fault("none"))
    folder = build(files=weights)
    publish_bundle(folder, f"127.0.0.1:{proxy.port}/tiny:v1", transfers=Transfers(patience=Patience(1, 1.0, 5.0)))
    pushed = Counter(proxy.moved)
    pull_bundle(
        f"127.0.0.1:{proxy.port}/tiny:v1", tmp_path / "out", transfers=Transfers(patience=Patience(1, 1.0, 5.0))
    )
    proxy.close()
    expected = tree(folder / "bundle")
    del expected["build.json"]
    assert tree(tmp_path / "out" / "bundle") == expected
    # The places where faults are put do come.
    assert pushed[UP] > 240_000
    assert pushed[DOWN] > 1500
    assert proxy.moved[DOWN] - pushed[DOWN] > 240_000
    assert proxy.moved[UP] - pushed[UP] > 1500
