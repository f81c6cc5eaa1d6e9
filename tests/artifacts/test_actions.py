from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path

import pytest

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.store import Store, open_store
from fluxkiln.errors import FluxkilnError, IntegrityError

ACTION = Action(
    stage="cast",
    what="double.00 W4BF16",
    code_version="sha256:" + "1" * 64,
    inputs={"mould": "sha256:" + "2" * 64, "weights": "sha256:" + "3" * 64},
    settings={"scheme": {"name": "W4BF16", "group_size": 64}, "chip": "bm1684x", "size": [64, 64]},
    tools={"tpu_mlir": "1.30.2"},
)

RUN_SAME_ACTION = """
import os, sys, time
from pathlib import Path
from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.store import open_store
root = Path(sys.argv[1])
cache = ActionCache(open_store(root))

def produce(workdir):
    with open(root / "runs", "a") as runs:
        runs.write("run\\n")
    time.sleep(0.3)
    (workdir / "out").write_bytes(b"result")
    return {"out": workdir / "out"}, {}

print("ready", flush=True)
sys.stdin.readline()
result = run_action(cache, Action("mould", "double", "c", {}), produce)
print(result.outputs["out"].digest, int(result.hit))
"""

KILLED_COMPILER = """
import os, signal, sys
from pathlib import Path
from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.store import open_store

def produce(workdir):
    (workdir / "deep").mkdir()
    (workdir / "deep" / "half").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

run_action(ActionCache(open_store(Path(sys.argv[1]))), Action("mould", "double", "c", {}), produce)
"""

IMPORT_ALL = """
import importlib, pkgutil, sys
import fluxkiln.artifacts
for module in pkgutil.iter_modules(fluxkiln.artifacts.__path__):
    importlib.import_module("fluxkiln.artifacts." + module.name)
print(*sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def produce(workdir: Path):
    (workdir / "binary").write_bytes(b"binary")
    return {"binary": workdir / "binary"}, {"matmuls": 12, "shape": (1, 2)}


def refuse(workdir: Path):
    pytest.fail("the action ran again")


@pytest.fixture
def cache(store: Store) -> ActionCache:
    return ActionCache(store)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "mould"},
        {"code_version": "sha256:" + "4" * 64},
        {"inputs": {**ACTION.inputs, "weights": "sha256:" + "4" * 64}},
        {"inputs": {"mould": ACTION.inputs["weights"], "weights": ACTION.inputs["mould"]}},
        {"inputs": {"mould": ACTION.inputs["mould"]}},
        {"settings": {**ACTION.settings, "chip": "bm1688"}},
        {"settings": {**ACTION.settings, "scheme": {"name": "W4BF16", "group_size": 32}}},
        {"settings": {**ACTION.settings, "size": [64, 128]}},
        {"settings": {**ACTION.settings, "new": None}},
        {"tools": {"tpu_mlir": "1.30.3"}},
        {"tools": {**ACTION.tools, "numpy": "2.0"}},
    ],
)
def test_every_ingredient_changes_the_key(cache, change):
    run_action(cache, ACTION, produce)
    changed = dataclasses.replace(ACTION, **change)
    assert changed.key != ACTION.key
    assert cache.lookup(changed.key) is None


def test_order_of_mappings_and_the_human_name_do_not_change_the_key():
    same = dataclasses.replace(
        ACTION,
        what="another name",
        inputs=dict(reversed(ACTION.inputs.items())),
        settings={
            "size": (64, 64),
            "chip": "bm1684x",
            "scheme": dict(reversed(ACTION.settings["scheme"].items())),
        },
    )
    assert list(same.settings) != list(ACTION.settings)
    assert same.key == ACTION.key


def test_path_in_the_settings_is_refused():
    with pytest.raises(TypeError, match=r"settings\.model"):
        _ = dataclasses.replace(ACTION, settings={"model": Path("/models/dev")}).key


def test_second_run_is_a_hit_with_the_same_result(cache):
    first = run_action(cache, ACTION, produce)
    second = run_action(cache, ACTION, refuse)
    assert (first.hit, second.hit) == (False, True)
    assert dataclasses.replace(first, hit=True) == second
    assert second.facts == {"matmuls": 12, "shape": [1, 2]}
    assert cache.store.read(second.outputs["binary"].digest) == b"binary"
    assert os.listdir(cache.store.root / "tmp") == []
    assert os.listdir(cache.store.root / "locks") == []


def test_counts_prove_what_ran(cache):
    run_action(cache, dataclasses.replace(ACTION, stage="mould"), produce)
    before = ActionCache(cache.store)
    run_action(before, dataclasses.replace(ACTION, stage="mould"), refuse)
    run_action(before, ACTION, produce)
    run_action(before, ACTION, refuse)
    assert before.summary() == {
        "hits": 2,
        "misses": 1,
        "stages": {"cast": {"hits": 1, "misses": 1}, "mould": {"hits": 1, "misses": 0}},
    }


def test_blob_that_is_gone_or_cut_short_is_made_again(cache):
    blob = run_action(cache, ACTION, produce).outputs["binary"]
    path = cache.store.path(blob.digest)
    for damage in (path.unlink, lambda: (path.chmod(0o644), path.write_bytes(b"bin"))):
        damage()
        assert cache.lookup(ACTION.key) is None
        assert run_action(cache, ACTION, produce).outputs["binary"] == blob
        assert cache.store.verify(blob.digest) == blob


def test_flipped_byte_found_by_a_reader_makes_the_action_run_again(cache):
    blob = run_action(cache, ACTION, produce).outputs["binary"]
    path = cache.store.path(blob.digest)
    path.chmod(0o644)
    path.write_bytes(b"binarz")
    with pytest.raises(IntegrityError):
        cache.store.verify(blob.digest)
    assert run_action(cache, ACTION, produce).hit is False
    assert cache.store.read(blob.digest) == b"binary"


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"{}", b'{"key": "x", "outputs": {}, "facts": {}}'])
def test_damaged_record_is_a_miss(cache, data):
    run_action(cache, ACTION, produce)
    [record] = (cache.store.root / "actions").iterdir()
    whole = record.read_bytes()
    record.write_bytes(data)
    assert cache.lookup(ACTION.key) is None
    assert list(cache.records()) == []
    run_action(cache, ACTION, produce)
    assert record.read_bytes() == whole


def test_record_under_the_name_of_another_action_is_a_miss(cache):
    run_action(cache, ACTION, produce)
    other = dataclasses.replace(ACTION, stage="mould")
    folder = cache.store.root / "actions"
    shutil.copy(folder / f"{ACTION.key[7:]}.json", folder / f"{other.key[7:]}.json")
    assert cache.lookup(other.key) is None


def test_failure_records_nothing_and_leaves_nothing(cache):
    def fail(workdir):
        (workdir / "half").write_bytes(b"half")
        raise FluxkilnError("compiler failed")

    with pytest.raises(FluxkilnError, match="compiler failed"):
        run_action(cache, ACTION, fail)
    assert cache.lookup(ACTION.key) is None
    assert list(cache.store.digests()) == []
    assert os.listdir(cache.store.root / "tmp") == []
    assert cache.summary()["misses"] == 0


def test_output_that_was_not_written_is_named(cache):
    with pytest.raises(FluxkilnError, match="binary"):
        run_action(cache, ACTION, lambda workdir: ({"binary": workdir / "nothing"}, {}))
    assert cache.lookup(ACTION.key) is None


def test_output_outside_the_work_folder_is_copied(cache, tmp_path):
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")

    def link(workdir):
        (workdir / "link").symlink_to(mine)
        return {"direct": mine, "link": workdir / "link"}, {}

    outputs = run_action(cache, ACTION, link).outputs
    assert mine.read_bytes() == b"mine"
    assert outputs["direct"] == outputs["link"]


def test_record_of_a_blob_that_is_not_in_the_store_is_refused(cache, tmp_path):
    blob = open_store(tmp_path / "other").add_bytes(b"elsewhere")
    with pytest.raises(IntegrityError):
        cache.record(ACTION, {"binary": blob}, {})
    assert cache.lookup(ACTION.key) is None


def test_two_processes_run_the_same_action_once(tmp_path, start_python):
    workers = [start_python(RUN_SAME_ACTION, tmp_path) for _ in range(3)]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    printed = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert (tmp_path / "runs").read_text() == "run\n"
    assert len({digest for digest, _ in printed}) == 1
    assert sorted(hit for _, hit in printed) == ["0", "1", "1"]


def test_threads_share_a_cache(cache):
    runs = []

    def slow(workdir):
        runs.append(1)
        return produce(workdir)

    threads = [threading.Thread(target=run_action, args=(cache, ACTION, slow)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(runs), cache.misses, cache.hits) == (1, 1, 7)


def test_kill_9_in_a_producer_leaves_a_folder_that_the_next_start_removes(tmp_path, start_python):
    assert start_python(KILLED_COMPILER, tmp_path).wait(timeout=60) == -9
    assert len(os.listdir(tmp_path / "tmp")) == 1
    store = open_store(tmp_path)
    assert os.listdir(tmp_path / "tmp") == []
    assert run_action(ActionCache(store), Action("mould", "double", "c", {}), produce).hit is False


def test_reachable_is_what_records_and_tags_need(cache):
    recorded = run_action(cache, ACTION, produce).outputs["binary"].digest
    layer = cache.store.add_bytes(b"layer")
    config = cache.store.add_bytes(b"{}")
    loose = cache.store.add_bytes(b"nobody needs me")
    text = (
        f'{{"config": {{"digest": "{config.digest}", "size": 2}},'
        f'"layers": [{{"digest": "{layer.digest}", "size": 5}}]}}'
    )
    manifest = cache.store.add_bytes(text.encode())
    cache.store.tag("a:b", manifest.digest)
    assert cache.reachable() == {recorded, layer.digest, config.digest, manifest.digest}
    assert loose in cache.store.digests()
    cache.forget(ACTION.key)
    assert recorded not in cache.reachable()


def test_artifacts_import_nothing_but_the_standard_library(run_python):
    assert set(run_python(IMPORT_ALL).split()) - {"__main__", "fluxkiln", "_distutils_hack", "sitecustomize"} == set()
