from __future__ import annotations

import copy

import pytest

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.artifacts.manifest import compare_manifests, is_same


@pytest.fixture
def manifest(build):
    counter = iter(range(100))
    return lambda **more: read_manifest(build(f"b{next(counter)}", **more) / "bundle")


def test_a_bundle_does_not_differ_from_itself(manifest):
    one = manifest()
    found = compare_manifests(one, manifest())
    assert is_same(found)
    assert found["parts"] == {"added": [], "removed": [], "changed": {}}


def test_what_changed_is_named(manifest, manifest_parts):
    parts = copy.deepcopy(manifest_parts["parts"])
    parts[1]["scheme"] = "W8BF16"
    del parts[3]
    found = compare_manifests(
        manifest(),
        manifest(
            parts=parts,
            tools={"tpu_mlir": "1.31", "fluxkiln": "0.1.0", "new": "1"},
            parity={"passed": False, "rows": 12},
            settings={"vae": "tiny", "group_size": 64},
            shapes={"height": 128, "width": 64, "tokens": 32},
            files={"transformer.bmodel": b"other", "more.json": b"{}"},
        ),
    )
    assert not is_same(found)
    assert found["parts"] == {
        "added": [], "removed": ["tail"], "changed": {"double.00": {"scheme": {"from": "W4BF16", "to": "W8BF16"}}},
    }  # fmt: skip
    assert found["tools"] == {"tpu_mlir": {"from": "1.30.2", "to": "1.31"}, "new": {"from": None, "to": "1"}}
    assert found["parity"] == {"passed": {"from": True, "to": False}}
    assert found["settings"] == {"vae": {"from": "kl", "to": "tiny"}}
    assert found["facts"] == {"shapes": {"from": "64x64, 32 tokens", "to": "64x128, 32 tokens"}}
    assert found["files"]["added"] == ["more.json"]
    assert set(found["files"]["changed"]) == {"transformer.bmodel"}
