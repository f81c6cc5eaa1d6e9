from __future__ import annotations

import copy
import json

import pytest

from fluxkiln.artifacts.manifest import (
    SCHEMA_VERSION,
    Manifest,
    describe_manifest,
    manifest_from_json,
    parse_manifest,
    role_of,
)
from fluxkiln.digests import seal
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.patches.registry import component_of


@pytest.fixture
def document(manifest_parts, bundle_bytes) -> dict:
    files = [
        {"path": path, "role": role_of(path), "sha256": "ab" * 32, "size": len(data)}
        for path, data in bundle_bytes.items()
    ]
    return {**manifest_parts, "schema_version": SCHEMA_VERSION, "files": files}


def test_bytes_and_value_are_the_same_thing(document):
    manifest = parse_manifest(json.dumps(seal(document)).encode(), "here")
    assert isinstance(manifest, Manifest)
    assert manifest.to_json() == seal(document)
    assert manifest.digest == seal(document)["digest"]
    assert parse_manifest(manifest.to_bytes(), "here") == manifest


def test_order_of_free_mappings_does_not_change_the_bytes(document):
    turned = copy.deepcopy(document)
    for key in ("settings", "parity", "tools"):
        turned[key] = dict(reversed(turned[key].items()))
    assert manifest_from_json(turned).to_bytes() == manifest_from_json(document).to_bytes()


@pytest.mark.parametrize("digest", [None, "", "sha256:" + "0" * 64, 3, ["x"]])
def test_another_digest_than_its_own_is_refused(document, digest):
    with pytest.raises(IntegrityError, match=r"here says that its digest is .*, and what it says has sha256:"):
        parse_manifest(json.dumps({**document, "digest": digest}).encode(), "here")
    sealed = seal(document)
    sealed["parts"] = list(reversed(document["parts"]))
    with pytest.raises(IntegrityError, match="here says that its digest is 'sha256:"):
        parse_manifest(json.dumps(sealed).encode(), "here")


@pytest.mark.parametrize("version", [0, 1, 999])
def test_unknown_schema_version_names_the_remedy(document, version):
    with pytest.raises(UsageError, match=f"schema_version {version}.*build the bundle again"):
        manifest_from_json({"schema_version": version, "anything": "else"}, "here")


@pytest.mark.parametrize("version", [None, "1", True, 1.0])
def test_schema_version_that_is_no_number(document, version):
    with pytest.raises(IntegrityError, match="schema_version"):
        manifest_from_json({**document, "schema_version": version})


def _set(*path):
    *way, last, value = path

    def change(document):
        for key in way:
            document = document[key]
        document[last] = value

    return change


FAULTS = {
    "missing key": (lambda d: d.pop("parity"), "lacks parity"),
    "unknown key": (_set("created", "today"), "unknown key 'created'"),
    "unknown key of a part": (_set("parts", 0, "extra", 1), "unknown key 'extra'"),
    "missing key of a file": (lambda d: d["files"][0].pop("size"), "lacks size"),
    "name not text": (_set("name", 3), "has name 3"),
    "empty target": (_set("target", ""), "has target ''"),
    "empty variant": (_set("variant", ""), "has variant ''"),
    "kind not text": (_set("parts", 0, "kind", 3), "has kind 3"),
    "role": (_set("files", 0, "role", "virus"), "the roles are"),
    "role of another name": (_set("files", 0, "role", "doc"), "the role doc, its name is that of binary"),
    "negative size": (_set("files", 0, "size", -1), "not negative"),
    "true size": (_set("files", 0, "size", True), "whole number"),
    "fractional shape": (_set("parts", 0, "inputs", 0, "shape", [1.5]), "whole number"),
    "shape not a list": (_set("parts", 0, "inputs", 0, "shape", 4), "list of whole numbers"),
    "illegal size": (_set("shapes", "height", 65), "multiple of 16"),
    "short digest": (_set("files", 0, "sha256", "ab"), "64 lower-case hex"),
    "part digest bare": (_set("parts", 0, "digest", "ab" * 32), "'sha256:' and 64"),
    "fingerprint": (_set("checkpoint", "fingerprint", "tiny"), "'sha256:' and 64"),
    "parts not a list": (_set("parts", {}), "must be a list"),
    "part not an object": (_set("parts", 0, "x"), "must be an object"),
    "settings not an object": (_set("settings", []), "must be an object"),
    "tool version not text": (_set("tools", "numpy", 2), "has numpy 2"),
    "file outside": (_set("files", 0, "path", "../x"), "'..'"),
    "part in no file": (_set("parts", 0, "file", "nowhere.bmodel"), "not among its files"),
    "licence in no file": (_set("licence", "file", "NOTHING"), "licence text 'NOTHING'"),
    "part twice": (_set("parts", 0, "name", "tail"), "twice"),
    "net twice": (_set("parts", 1, "net", "double.01"), "twice"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_refused_and_named(document, fault):
    change, message = FAULTS[fault]
    manifest_from_json(document)
    change(document)
    with pytest.raises(IntegrityError) as error:
        manifest_from_json(document, "bundle/manifest.json")
    assert message in str(error.value)
    assert "bundle/manifest.json" in str(error.value) or "manifest" in str(error.value)
    assert error.value.exit_code == 4


def test_two_files_of_one_name_are_refused(document):
    document["files"].append({**document["files"][0], "path": document["files"][0]["path"].upper()})
    with pytest.raises(IntegrityError, match="same file"):
        manifest_from_json(document)


def test_description_counts_parts_and_bytes(document):
    described = describe_manifest(manifest_from_json(document), component_of)
    assert described["size"] == sum(file["size"] for file in document["files"])
    assert {"component": "transformer", "kind": "double", "scheme": "W4BF16", "parts": 2, "size": 20} in described[
        "kinds"
    ]
    assert {role: found["files"] for role, found in described["roles"].items()} == {
        "binary": 2, "licence": 1, "tokenizer": 1,
    }  # fmt: skip
    assert json.loads(json.dumps(described)) == described
