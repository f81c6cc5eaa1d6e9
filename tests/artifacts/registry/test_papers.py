"""What goes with a bundle: licence, provenance, model card, signature."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.artifacts.registry import papers
from fluxkiln.artifacts.registry.papers import check_licence, find_binding, model_card
from fluxkiln.artifacts.store import Store, open_store
from fluxkiln.build.publish import Terms, inspect_reference, publish_bundle, pull_bundle
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.patches.registry import binding_licences, hub_id_of

ACCEPTED = Terms(accepted=("flux-1-dev",))
SYNTHETIC = b"This is a synthetic checkpoint, written by `fluxkiln synth`.\nApache License\n"


@pytest.fixture
def layout(tmp_path) -> str:
    return f"oci-layout:{tmp_path / 'layout'}"


@pytest.fixture
def key(tmp_path):
    """Make a key pair: (private, public)."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def make(name: str) -> tuple[Path, Path]:
        private = ec.generate_private_key(ec.SECP256R1())
        pem = serialization.Encoding.PEM
        files = tmp_path / f"{name}.pem", tmp_path / f"{name}.pub"
        files[0].write_bytes(
            private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        files[1].write_bytes(private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
        return files

    return make


# licence


def test_dev_needs_its_text_and_its_acceptance(dev_build, layout):
    with pytest.raises(UsageError, match="--accept-license flux-1-dev"):
        publish_bundle(dev_build(), f"{layout}:v1")
    for text in (b"licence text", b"FLUX.1 [dev] Non-Commercial License", b"MIT License " * 500, b""):
        with pytest.raises(UsageError, match="is not the text of the FLUX"):
            publish_bundle(dev_build(text), f"{layout}:v1", ACCEPTED)
    # Another name for the licence, and whatever it is, does not make it another model.
    apache = {"spdx": "Apache-2.0", "file": "LICENSE.md"}
    with pytest.raises(UsageError, match="is not the text of the FLUX"):
        publish_bundle(dev_build(b"Apache License " * 500, licence=apache), f"{layout}:v1", ACCEPTED)
    with pytest.raises(UsageError, match="flux-1-dev"):
        publish_bundle(dev_build(variant="schnell"), f"{layout}:v1")
    assert not Path(layout.removeprefix("oci-layout:")).exists()
    done = publish_bundle(dev_build(), f"{layout}:v1", ACCEPTED)
    assert done.document.find("LICENSE.md") is not None
    assert done.document.annotations["org.opencontainers.image.licenses"] == "LicenseRef-FLUX-1-dev-Non-Commercial"


def test_schnell_and_random_weights_need_nothing(build, dev_build, layout):
    publish_bundle(build(), f"{layout}:schnell")
    publish_bundle(dev_build(SYNTHETIC), f"{layout}:random")


def test_a_licence_nobody_knows_is_not_accepted(build):
    manifest = read_manifest(build() / "bundle")
    with pytest.raises(UsageError, match="no licence is called 'mit'; there is flux-1-dev"):
        check_licence(manifest, b"", ["mit"], binding_licences())


def test_licences_of_adapters_are_carried(build, layout, tmp_path):
    (tmp_path / "style.txt").write_text("be kind")
    publish_bundle(build(), f"{layout}:v1", Terms(lora_licences=(tmp_path / "style.txt",)))
    pull_bundle(f"{layout}:v1", tmp_path / "out")
    assert (tmp_path / "out" / "licenses" / "style.txt").read_text() == "be kind"
    assert "licenses/style.txt" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(UsageError, match="there is no such file"):
        publish_bundle(build("two"), f"{layout}:v2", Terms(lora_licences=(tmp_path / "none",)))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "style.txt").write_text("be kinder")
    twice = (tmp_path / "style.txt", tmp_path / "more" / "style.txt")
    with pytest.raises(UsageError, match="same file name"):
        publish_bundle(build("two"), f"{layout}:v2", Terms(lora_licences=twice))


# provenance and model card


def test_provenance_is_a_slsa_statement_over_the_very_files(build, layout, tmp_path):
    folder = build(settings={"vae": "kl", "seed": 3, "steps": 2})
    publish_bundle(folder, f"{layout}:v1")
    pull_bundle(f"{layout}:v1", tmp_path / "out")
    statement = json.loads((tmp_path / "out" / "provenance.json").read_bytes())
    assert set(statement) == {"_type", "subject", "predicateType", "predicate"}
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    bundle = tmp_path / "out" / "bundle"
    subjects = {one["name"]: one["digest"]["sha256"] for one in statement["subject"]}
    files = {path.relative_to(bundle).as_posix(): path for path in bundle.rglob("*") if path.is_file()}
    assert subjects == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    definition = statement["predicate"]["buildDefinition"]
    assert set(definition) == {"buildType", "externalParameters", "internalParameters", "resolvedDependencies"}
    assert definition["externalParameters"]["target"] == "bm1684x"
    assert definition["externalParameters"]["vae"] == "kl"
    assert definition["internalParameters"] == {"seed": 3, "steps": 2}
    manifest = read_manifest(bundle)
    [checkpoint, *tools] = definition["resolvedDependencies"]
    assert "sha256:" + checkpoint["digest"]["sha256"] == manifest.checkpoint.fingerprint
    assert [tool["uri"] for tool in tools] == ["pkg:generic/fluxkiln@0.1.0", "pkg:generic/tpu_mlir@1.30.2"]
    [report] = statement["predicate"]["runDetails"]["byproducts"]
    assert report["digest"]["sha256"] == hashlib.sha256((tmp_path / "out" / "report.json").read_bytes()).hexdigest()


def front_matter(card: bytes) -> dict[str, str]:
    _, front, _ = card.decode().split("---\n", 2)
    return dict(re.fullmatch(r"(\w+): (.*)", line).groups() for line in front.splitlines())


def card_of(folder: Path, licence: bytes, title: str) -> bytes:
    manifest = read_manifest(folder)
    bound = find_binding(manifest, licence, binding_licences())
    return model_card(manifest, licence, title, hub_id_of(manifest.variant), bound)


def test_card_of_dev(dev_build):
    folder = dev_build(checkpoint={"source": "flux-dev", "fingerprint": "sha256:" + "ab" * 32}) / "bundle"
    front = front_matter(card_of(folder, (folder / "LICENSE.md").read_bytes(), "FLUX.1-dev"))
    facts = json.loads(front.pop("fluxkiln"))
    assert (facts["target"], facts["schemes"], facts["parity"]) == ("bm1684x", ["BF16", "F16", "W4BF16"], "passed")
    assert facts["shapes"] == {"height": 64, "width": 64, "tokens": 32}
    assert front == {
        "license": "other",
        "license_name": "flux-1-dev-non-commercial-license",
        "license_link": '"LICENSE.md"',
        "base_model": "black-forest-labs/FLUX.1-dev",
        "base_model_relation": "quantized",
        "library_name": "fluxkiln",
        "pipeline_tag": "text-to-image",
        "tags": '[fluxkiln, "bm1684x", flux-1-dev]',
    }


def test_card_of_schnell_of_a_fine_tune_and_of_random_weights(build):
    schnell = build("schnell") / "bundle"
    front = front_matter(card_of(schnell, b"Apache", "FLUX.1-schnell"))
    assert (front["license"], front["base_model"]) == ("apache-2.0", "black-forest-labs/FLUX.1-schnell")
    tuned = build("tuned", checkpoint={"source": "ann/flux-knitting", "fingerprint": "sha256:" + "ab" * 32}) / "bundle"
    assert front_matter(card_of(tuned, b"Apache", "FLUX.1-dev"))["base_model"] == "ann/flux-knitting"
    card = card_of(schnell, SYNTHETIC, "FLUX.1-schnell")
    assert "base_model" not in front_matter(card)
    assert b"Random weights" in card


def test_card_says_what_parity_was(build):
    failed = {"verified": True, "passed": False, "failure": "tail | missed", "rows": 9, "failed_rows": 2}
    for name, parity, words in (
        ("a", {"verified": True, "passed": True, "rows": 12}, "passed: 12 comparisons"),
        ("b", failed, "**FAILED**: 2 of 9 comparisons. tail \\| missed"),
        ("c", {"verified": False}, "| parity | not verified |"),
    ):
        card = card_of(build(name, parity=parity) / "bundle", b"Apache", "FLUX.1-dev").decode()
        assert words in card


# signature


def test_a_signature_is_verified_and_anything_else_is_refused(build, layout, key, tmp_path):
    private, public = key("ann")
    _, other = key("eve")
    done = publish_bundle(build(), f"{layout}:signed", Terms(sign_key=private))
    assert done.signed
    publish_bundle(build("plain"), f"{layout}:plain")
    assert pull_bundle(f"{layout}:signed", tmp_path / "a", verify_key=public).signature == "verified"
    assert pull_bundle(f"{layout}:signed", tmp_path / "b").signature == "not checked"
    assert pull_bundle(f"{layout}:plain", tmp_path / "c").signature == "unsigned"
    for tag, public_key, sentence in (
        ("signed", other, "does not hold for the key"),
        ("plain", public, "without a signature"),
    ):
        for required in (False, True):
            with pytest.raises(IntegrityError, match=sentence) as found:
                pull_bundle(f"{layout}:{tag}", tmp_path / "d", verify_key=public_key, require_signature=required)
            assert found.value.exit_code == 4
    with pytest.raises(UsageError, match="--require-signature needs the publisher's key"):
        pull_bundle(f"{layout}:signed", tmp_path / "d", require_signature=True)
    assert not (tmp_path / "d").exists()


def replace_layer(tmp_path: Path, tag: str, path: str, data: bytes) -> None:
    """What somebody who can write to the registry would do: another file, and manifests that agree with it."""
    store = open_store(tmp_path / "layout")
    document = json.loads(store.read(store.resolve(tag)))
    blob = store.add_bytes(data)
    for layer in document["layers"]:
        if layer["annotations"]["org.cncf.model.filepath"] == path:
            layer.update(digest=blob.digest, size=blob.size)
    config = json.loads(store.read(document["config"]["digest"]))
    config["modelfs"]["diffIds"] = [layer["digest"] for layer in document["layers"]]
    blob = store.add_bytes(json.dumps(config).encode())
    document["config"].update(digest=blob.digest, size=blob.size)
    store.tag(tag, store.add_bytes(json.dumps(document).encode()).digest)


@pytest.mark.parametrize("path", ["provenance.json", "README.md", "report.json"])
def test_what_lies_beside_the_bundle_is_signed_as_well(build, layout, key, tmp_path, path):
    private, public = key("ann")
    publish_bundle(build(), f"{layout}:v1", Terms(sign_key=private))
    replace_layer(tmp_path, "v1", path, b"{}")
    # Whole it is: without the key nobody can tell.
    inspect_reference(f"{layout}:v1")
    with pytest.raises(IntegrityError, match="does not hold"):
        pull_bundle(f"{layout}:v1", tmp_path / "out", verify_key=public)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"mediaType": "x"}'])
def test_what_is_no_signature_is_refused(build, layout, key, tmp_path, data):
    private, public = key("ann")
    publish_bundle(build(), f"{layout}:v1", Terms(sign_key=private))
    replace_layer(tmp_path, "v1", "model.sig", data)
    with pytest.raises(IntegrityError, match="does not hold"):
        pull_bundle(f"{layout}:v1", tmp_path / "out", verify_key=public)


def test_model_signing_itself_agrees(build, layout, key, tmp_path):
    """Its own command reads the pulled files and compares them with our signature; and notices a flipped byte."""
    private, public = key("ann")
    publish_bundle(build(), f"{layout}:v1", Terms(sign_key=private))
    out = tmp_path / "out"
    pull_bundle(f"{layout}:v1", out)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(out), "--signature", str(out / "model.sig"),
               "--public_key", str(public)]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    path = out / "bundle" / "transformer.bmodel"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "transformer.bmodel" in done.stderr + done.stdout


def test_keys_that_are_none(build, layout, key, tmp_path, monkeypatch):
    private, public = key("ann")
    with pytest.raises(UsageError, match="there is no such file"):
        publish_bundle(build(), f"{layout}:v1", Terms(sign_key=tmp_path / "none"))
    with pytest.raises(UsageError, match="no private key that can sign"):
        publish_bundle(build("b"), f"{layout}:v1", Terms(sign_key=public))
    with pytest.raises(UsageError, match="no public key that can verify"):
        papers.verify_signature({"a": "sha256:" + "0" * 64}, b"{}", tmp_path / "b" / "bundle" / "LICENSE.md")
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(ToolchainError, match=r"pip install 'fluxkiln\[signing\]'"):
        publish_bundle(build("c"), f"{layout}:v1", Terms(sign_key=private))
    assert Store(tmp_path / "layout").tags() == {}
