"""Push and pull of a bundle of 2 GB in 40 files, beside `skopeo copy` of the same content: time, memory, bytes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.figure import WORK, Figure, Run, fluxkiln, ratio, run
from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.store import open_store

FILES, FILE_BYTES = 40, 50_000_000
TURNS = 2
ROOT = WORK / "registry"
_CHANGED = 17


def measure() -> Figure:
    for program in ("docker-registry", "skopeo"):
        if shutil.which(program) is None:
            raise RuntimeError(f"{program} is not installed: run .ci/test-tools as root")
    shutil.rmtree(ROOT, ignore_errors=True)
    ROOT.mkdir(parents=True)
    try:
        return _measure()
    finally:
        shutil.rmtree(ROOT, ignore_errors=True)


def _measure() -> Figure:
    (ROOT / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    bundle, changed = _write(ROOT / "one"), ROOT / "two"
    layout = f"{ROOT / 'layout'}:v1"
    _fluxkiln("publish", str(bundle), f"oci-layout:{layout}")
    taken: dict[str, list[Run]] = {}
    noop = part = {}
    for turn in range(TURNS):
        with _server() as host:
            ours = f"{host}/bench/ours:v1"
            taken.setdefault("push", []).append(_fluxkiln("publish", str(bundle), ours, "--json"))
            if turn == 0:
                noop = _fluxkiln("publish", str(bundle), ours, "--json").document()
            pulled = ROOT / "pulled"
            taken.setdefault("pull", []).append(_fluxkiln("pull", ours, str(pulled), "--json"))
            shutil.rmtree(pulled)
            if turn == 0:
                _write(changed, _CHANGED)
                part = _fluxkiln("publish", str(changed), f"{host}/bench/ours:v2", "--json").document()
                shutil.rmtree(changed)
        with _server() as host:
            theirs = f"docker://{host}/bench/theirs:v1"
            taken.setdefault("skopeo push", []).append(_skopeo("--dest-tls-verify=false", f"oci:{layout}", theirs))
            copied = f"oci:{ROOT / 'copied'}:v1"
            taken.setdefault("skopeo pull", []).append(_skopeo("--src-tls-verify=false", theirs, copied))
            shutil.rmtree(ROOT / "copied")
    rows = []
    for what in ("push", "pull"):
        mine, other = (min(one.seconds for one in taken[name]) for name in (what, f"skopeo {what}"))
        rows.append(
            (
                f"{what} {FILES * FILE_BYTES / 1e9:.0f} GB, {FILES} files",
                f"{mine:.1f} s",
                f"{other:.1f} s",
                f"{ratio(other, mine)}x",
                f"{max(one.peak_bytes for one in taken[what]) / 1e6:.0f} MB",
                f"{max(one.peak_bytes for one in taken[f'skopeo {what}']) / 1e6:.0f} MB",
                "all",
            )
        )
    for name, document in (("push again, nothing changed", noop), ("push with one changed part", part)):
        sent = f"{document['sent']} B: {', '.join(document['sent_files']) or 'nothing'}"
        rows.append((name, "", "", "", "", "", sent))
    return Figure(
        "Registry: push and pull beside skopeo",
        ("what", "fluxkiln", "skopeo", "throughput of skopeo's", "peak memory", "skopeo's", "bytes sent"),
        tuple(rows),
        (
            "Debian's docker-registry on loopback, an empty one for each client and turn; the best of "
            f"{TURNS} turns, the highest memory of all. fluxkiln hashes every file of the bundle and every byte that "
            "comes back, and syncs to disk; skopeo copies from and to an OCI layout. The manifest itself, a few kB, is "
            "sent in any case and not counted. Aim: at most 60 MB, at least 0.8x.",
        ),
    )


def _write(folder: Path, changed: int = -1) -> Path:
    """A bundle of files that are the same in every call, but for the number `changed`."""
    store = open_store(ROOT / "store")
    files = {f"weights/{i:02}.data": store.add_bytes(_content(i + 1000 * (i == changed))) for i in range(FILES)}
    files["LICENSE"] = store.add_bytes(b"numbers of no meaning\n")
    manifest = {
        "name": "bench",
        "target": "cpu",
        "variant": "schnell",
        "shapes": {"height": 64, "width": 64, "tokens": 32},
        "checkpoint": {"source": "bench", "fingerprint": "sha256:" + "0" * 64},
        "licence": {"spdx": "Apache-2.0", "file": "LICENSE"},
        "settings": {},
        "parity": {"verified": False},
        "tools": {},
        "parts": [],
    }
    write_bundle(folder / "bundle", files, manifest, store)
    shutil.rmtree(ROOT / "store")
    return folder


def _content(seed: int) -> bytes:
    import numpy as np

    return np.random.default_rng(seed).bytes(FILE_BYTES)


def _fluxkiln(*arguments: str) -> Run:
    # Nothing is known of the registry, and nothing of it is remembered.
    return run(fluxkiln(*arguments), {"XDG_CACHE_HOME": str(ROOT / "cache"), "DOCKER_CONFIG": str(ROOT)})


def _skopeo(*arguments: str) -> Run:
    return run(["skopeo", "--policy", str(ROOT / "policy.json"), "copy", *arguments])


@contextmanager
def _server() -> Iterator[str]:
    """An empty registry; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    folder = ROOT / "server"
    folder.mkdir()
    config = {
        "version": 0.1,
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(folder / "data")}},
        "http": {"addr": host, "secret": "of the benchmark"},
    }
    (folder / "config.yml").write_text(json.dumps(config))
    process = subprocess.Popen(
        ["docker-registry", "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(500):
            with socket.socket() as probe:
                if probe.connect_ex((host.split(":")[0], int(host.split(":")[1]))) == 0:
                    break
            time.sleep(0.02)
        yield host
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder)
        os.sync()
