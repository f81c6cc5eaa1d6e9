from __future__ import annotations

import json
import os
import random

import pytest

from fluxkiln.artifacts.actions import Action, ActionCache, collect_garbage
from fluxkiln.artifacts.store import Store, open_store
from fluxkiln.build.publish import publish_bundle, pull_bundle
from fluxkiln.errors import IntegrityError


def untag(store: Store, name: str) -> None:
    """What another program may do to an index."""
    index = json.loads((store.root / "index.json").read_bytes())
    index["manifests"] = [
        one for one in index["manifests"] if one["annotations"].get("org.opencontainers.image.ref.name") != name
    ]
    (store.root / "index.json").write_text(json.dumps(index))


@pytest.fixture
def filled(tmp_path) -> Store:
    return open_store(tmp_path / "layout")


def test_what_a_tag_reaches_stays_and_the_rest_goes(build, filled, tmp_path):
    layout = f"oci-layout:{filled.root}"
    publish_bundle(build("one"), f"{layout}:one")
    publish_bundle(build("two", files={"transformer.bmodel": b"two" * 999}), f"{layout}:two")
    reached = filled.reachable()
    loose = filled.add_bytes(b"loose")
    done = collect_garbage(filled, keep_seconds=0)
    assert done.removed == (loose,)
    assert not filled.has(loose)
    assert {blob.digest for blob in filled.digests()} == reached
    untag(filled, "two")
    assert collect_garbage(filled, keep_seconds=0).size > 2000
    pull_bundle(f"{layout}:one", tmp_path / "out")
    assert collect_garbage(filled, keep_seconds=0).removed == ()


def test_young_blobs_stay_and_a_dry_run_removes_nothing(filled):
    old, young = filled.add_bytes(b"old"), filled.add_bytes(b"young")
    os.utime(filled.path(old.digest), (0, 0))
    for dry_run in (True, False):
        done = collect_garbage(filled, dry_run=dry_run)
        assert (done.removed, done.young, done.kept) == ((old,), (young,), 1)
        assert filled.has(old) == dry_run
    assert filled.has(young)


def test_results_of_builds_stay_unless_they_are_given_up(filled):
    cache = ActionCache(filled)
    blob = filled.add_bytes(b"result")
    action = Action("template", "double", "sha256:" + "0" * 64, {})
    cache.record(action, {"graph": blob}, {})
    assert collect_garbage(filled, keep_seconds=0).removed == ()
    assert cache.lookup(action.key) is not None
    assert collect_garbage(filled, keep_seconds=0, results=True).removed == (blob,)
    assert cache.lookup(action.key) is None


def test_untagged_and_nested_manifests_of_other_programs_stay(filled):
    layer, config = filled.add_bytes(b"layer"), filled.add_bytes(b"{}")
    entry = {"mediaType": "x", "digest": layer.digest, "size": layer.size}
    manifest = {"layers": [entry], "config": {"digest": config.digest, "size": config.size}}
    inner = filled.add_bytes(json.dumps(manifest).encode())
    outer = filled.add_bytes(json.dumps({"manifests": [{"digest": inner.digest, "size": inner.size}]}).encode())
    filled.write_record("index.json", {"schemaVersion": 2, "manifests": [{"digest": outer.digest, "size": outer.size}]})
    assert collect_garbage(filled, keep_seconds=0).removed == ()


@pytest.mark.parametrize("damage", ["index gone", "index no JSON", "manifest damaged", "manifest gone"])
def test_when_in_doubt_nothing_is_removed(build, filled, damage):
    done = publish_bundle(build(), f"oci-layout:{filled.root}:v1")
    filled.add_bytes(b"loose")
    index, manifest = filled.root / "index.json", filled.path(done.document.digest)
    if damage == "index gone":
        index.unlink()
    elif damage == "index no JSON":
        index.write_bytes(b"{")
    elif damage == "manifest gone":
        manifest.unlink()
    else:
        manifest.chmod(0o644)
        manifest.write_bytes(b"{}")
    before = set(filled.digests())
    with pytest.raises(IntegrityError):
        collect_garbage(filled, keep_seconds=0, results=True)
    # A damaged manifest is put aside when it is read; nothing else moves.
    gone = before - set(filled.digests())
    assert {blob.digest for blob in gone} <= {done.document.digest}


def test_random_histories_never_lose_what_a_tag_reaches(filled):
    source = random.Random(6)
    for step in range(60):
        tags = list(filled.tags())
        what = source.choice(("add", "tag", "untag", "collect"))
        if what == "add":
            filled.add_bytes(source.randbytes(20))
        elif what == "tag":
            layers = [filled.add_bytes(bytes([source.randrange(8)]) * 9) for _ in range(3)]
            entries = [{"digest": blob.digest, "size": blob.size} for blob in layers]
            manifest = filled.add_bytes(json.dumps({"config": entries[0], "layers": entries, "step": step}).encode())
            filled.tag(f"t{source.randrange(5)}", manifest.digest)
        elif what == "untag" and tags:
            untag(filled, source.choice(tags))
        else:
            collect_garbage(filled, keep_seconds=0)
        there = {blob.digest for blob in filled.digests()}
        assert filled.reachable() <= there
    collect_garbage(filled, keep_seconds=0)
    assert filled.reachable() == {blob.digest for blob in filled.digests()}
