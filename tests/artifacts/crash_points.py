"""Not a test: kill a forked child with SIGKILL before its n-th file operation, for every n, and check what is left.

Usage: python crash_points.py action|tag|bundle FOLDER. Prints one JSON object: how often which state was found.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.bundle import heal_bundle, write_bundle
from fluxkiln.artifacts.intact import read_bundle
from fluxkiln.artifacts.store import Blob, Store, open_store

OPERATIONS = ("open", "mkdir", "rename", "replace", "unlink", "rmdir", "fsync", "truncate", "posix_fallocate")
ACTION = Action("cast", "double.00", "code", {"weights": "sha256:00"})


def killed_at(n: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that dies before its n-th file operation; False when it ended before that."""
    child = os.fork()
    if child == 0:
        calls = 0

        def armed(operation: Callable) -> Callable:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == n:
                    os.kill(os.getpid(), signal.SIGKILL)
                return operation(*args, **kwargs)

            return call

        for name in OPERATIONS:
            setattr(os, name, armed(getattr(os, name)))
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def check_store(store: Store) -> None:
    assert os.listdir(store.root / "tmp") == []
    for blob in store.digests():
        assert store.verify(blob.digest) == blob


def produce(workdir: Path) -> tuple[dict[str, Path], dict]:
    for name in ("codes", "scales"):
        (workdir / name).write_bytes(name.encode() * 5000)
    return {name: workdir / name for name in ("codes", "scales")}, {"bytes": 5000}


def action(folder: Path, n: int) -> str | None:
    root = folder / f"store{n}"
    alive = not killed_at(n, lambda: run_action(ActionCache(open_store(root)), ACTION, produce))
    store = open_store(root)
    check_store(store)
    found = ActionCache(store).lookup(ACTION.key)
    again = run_action(ActionCache(store), ACTION, produce)
    expected = {name: store.add_bytes(name.encode() * 5000) for name in ("codes", "scales")}
    assert again.outputs == expected
    assert found is None or found.outputs == expected
    check_store(store)
    return None if alive else "recorded" if found else "not recorded"


def tag(folder: Path, n: int) -> str | None:
    store = open_store(folder / "store")
    digests = []
    for text in ("{}", "[]"):
        config = store.add_bytes(text.encode())
        manifest = {"config": {"digest": config.digest, "size": config.size}, "layers": []}
        digests.append(store.add_bytes(json.dumps(manifest).encode()).digest)
    store.tag("tiny:cpu", digests[0])
    alive = not killed_at(n, lambda: store.tag("tiny:cpu", digests[1]))
    store = open_store(folder / "store")
    check_store(store)
    found = digests.index(store.resolve("tiny:cpu"))
    store.tag("tiny:cpu", digests[1])
    assert store.tags() == {"tiny:cpu": digests[1]}
    return None if alive else ("old", "new")[found]


def bundle(folder: Path, n: int) -> str | None:
    store = open_store(folder / "store")
    destination = folder / "build" / "bundle"
    versions = {}
    for name in ("old", "new"):
        files: dict[str, Blob | Path] = {
            "transformer.bmodel": store.add_bytes(name.encode() * 1000),
            "LICENSE": store.add_bytes(b"licence"),
        }
        manifest = {
            "name": name,
            "target": "cpu",
            "model": "flux1",
            "variant": "dev",
            "shapes": {"height": 16, "width": 16, "tokens": 1},
            "checkpoint": {"source": "x", "fingerprint": "sha256:" + "0" * 64},
            "licence": {"spdx": "Apache-2.0", "file": "LICENSE"},
            "settings": {},
            "parity": {},
            "tools": {},
            "parts": [],
        }
        versions[name] = (files, manifest)
    write_bundle(destination, *versions["old"], store)
    alive = not killed_at(n, lambda: write_bundle(destination, *versions["new"], store))
    heal_bundle(destination)
    assert os.listdir(destination.parent) == ["bundle"], os.listdir(destination.parent)
    found = read_bundle(destination).manifest.name
    undisturbed = write_bundle(destination, *versions["new"], store)
    assert read_bundle(destination).manifest == undisturbed
    assert os.listdir(destination.parent) == ["bundle"]
    return None if alive else found


def main() -> None:
    scenario = {"action": action, "tag": tag, "bundle": bundle}[sys.argv[1]]
    states: Counter[str] = Counter()
    n = 1
    while (state := scenario(Path(sys.argv[2]), n)) is not None:
        states[state] += 1
        n += 1
    print(json.dumps(states))


if __name__ == "__main__":
    main()
