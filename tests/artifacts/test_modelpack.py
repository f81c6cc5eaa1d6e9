from __future__ import annotations

import json
import shutil
import subprocess

import pytest

from fluxkiln.artifacts.bundle import write_bundle
from fluxkiln.artifacts.intact import encode_record, read_manifest
from fluxkiln.artifacts.modelpack import FILEPATH_ANNOTATION, store_bundle
from fluxkiln.artifacts.store import open_store
from fluxkiln.errors import IntegrityError, UsageError

TAG = "tiny-dev:bm1684x"


@pytest.fixture
def bundle(tmp_path, blobs, manifest_parts, store):
    write_bundle(tmp_path / "bundle", blobs, manifest_parts, store)
    return tmp_path / "bundle"


def test_manifest_is_a_modelpack_with_one_raw_layer_per_file(store, bundle, bundle_bytes):
    digest = store_bundle(store, bundle, TAG)
    assert store.resolve(TAG) == digest
    manifest = json.loads(store.read(digest))
    assert manifest["schemaVersion"] == 2
    assert manifest["mediaType"] == "application/vnd.oci.image.manifest.v1+json"
    assert manifest["artifactType"] == "application/vnd.cncf.model.manifest.v1+json"
    types = {layer["annotations"][FILEPATH_ANNOTATION]: layer["mediaType"] for layer in manifest["layers"]}
    prefix = "application/vnd.cncf.model."
    assert types == {
        "manifest.json": prefix + "weight.config.v1.raw",
        "LICENSE.md": prefix + "doc.v1.raw",
        "text_encoder/model.onnx": prefix + "weight.v1.raw",
        "tokenizer/vocab.json": prefix + "weight.config.v1.raw",
        "transformer.bmodel": prefix + "weight.v1.raw",
    }
    for layer in manifest["layers"]:
        path = layer["annotations"][FILEPATH_ANNOTATION]
        expected = bundle_bytes.get(path) or (bundle / path).read_bytes()
        assert store.read(layer["digest"]) == expected
        assert layer["size"] == len(expected)
    [entry] = json.loads((store.root / "index.json").read_text())["manifests"]
    assert entry["artifactType"] == manifest["artifactType"]
    assert entry["annotations"] == {"org.opencontainers.image.ref.name": TAG}


def test_config_has_the_keys_that_its_schema_allows(store, bundle):
    manifest = json.loads(store.read(store_bundle(store, bundle, TAG)))
    assert manifest["config"]["mediaType"] == "application/vnd.cncf.model.config.v1+json"
    config = json.loads(store.read(manifest["config"]["digest"]))
    assert set(config) == {"descriptor", "config", "modelfs"}
    assert set(config["descriptor"]) <= {"name", "family", "licenses", "title", "description", "version"}
    assert set(config["config"]) <= {"architecture", "format", "precision", "quantization", "capabilities"}
    assert config["descriptor"]["licenses"] == ["LicenseRef-FLUX-1-dev-Non-Commercial"]
    assert config["config"]["quantization"] == "W4BF16"
    assert config["modelfs"] == {"type": "layers", "diffIds": [layer["digest"] for layer in manifest["layers"]]}


def test_same_bundle_has_the_same_digest_in_every_store_and_shares_its_blobs(store, bundle, tmp_path):
    before = set(store.digests())
    digest = store_bundle(store, bundle, TAG)
    assert len(set(store.digests()) - before) == 3  # manifest.json, config, OCI manifest
    (bundle / "build.json").write_bytes(encode_record({"created": "now"}, [read_manifest(bundle).digest]))
    assert store_bundle(store, bundle, "again:cpu") == digest
    assert store_bundle(open_store(tmp_path / "other"), bundle, TAG) == digest


def test_bundle_with_a_flipped_byte_is_not_tagged(bundle, tmp_path):
    data = bytearray((bundle / "transformer.bmodel").read_bytes())
    data[7] ^= 1
    (bundle / "transformer.bmodel").write_bytes(data)
    other = open_store(tmp_path / "other")
    with pytest.raises(IntegrityError, match=r"transformer\.bmodel"):
        store_bundle(other, bundle, TAG)
    assert other.tags() == {}


def test_illegal_tag_is_refused(store, bundle):
    with pytest.raises(UsageError):
        store_bundle(store, bundle, "not a tag")


def test_independent_client_reads_the_layout(store, bundle, tmp_path):
    skopeo = shutil.which("skopeo")
    if skopeo is None:
        pytest.skip("skopeo, the independent client, is not installed")
    digest = store_bundle(store, bundle, "tiny-dev")
    source = f"oci:{store.root}:tiny-dev"
    raw = subprocess.run([skopeo, "inspect", "--raw", source], capture_output=True, check=True).stdout
    assert raw == store.read(digest)
    copied = tmp_path / "copied"
    policy = tmp_path / "policy.json"
    policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    copy = [skopeo, "--policy", str(policy), "copy", source, f"oci:{copied}:tiny-dev"]
    subprocess.run(copy, capture_output=True, check=True)
    assert open_store(copied).verify(digest)
