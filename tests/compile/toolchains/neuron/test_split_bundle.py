"""What a bundle of a model cut over cores says of its parts is compared with its modules, its weights and the model."""

from __future__ import annotations

import json
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from fluxkiln.build.make import build
from fluxkiln.compile.opener import open_bundle
from fluxkiln.digests import digest_json
from fluxkiln.errors import IntegrityError, ToolchainError
from fluxkiln.files import digest_file
from fluxkiln.settings import Settings
from tests.hostile.forged import forge


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("split")
    with suppress(ToolchainError):  # no neuronx-cc: the rest is there
        build(Settings("trn1", "tiny-dev", components=("transformer",), verify=False, build_dir=root))
    (bundle,) = (root / "trn1").glob("*/bundle")
    return bundle


@pytest.fixture
def bundle(built, tmp_path, monkeypatch):
    """A copy of it, to be spoilt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def test_what_is_true_is_taken(bundle):
    assert open_bundle(bundle).parts[0].name == "head"


def put_right(bundle, *labels):
    """Have the manifest tell the truth of changed files, and of all parts that are made of them."""

    def change(document):
        files = {entry["path"]: entry for entry in document["files"]}
        for label in labels:
            digest, size = digest_file(bundle / label)
            files[label].update(sha256=digest.removeprefix("sha256:"), size=size)
        for part in document["parts"]:
            shards = sorted(name for name in files if name.startswith(f"weights/{part['name']}/"))
            hlo, *rest = (f"sha256:{files[name]['sha256']}" for name in (part["file"], *shards))
            part.update(
                digest=digest_json({"hlo": hlo, "shards": rest}), size=sum(files[name]["size"] for name in shards)
            )

    forge(bundle, change)


def rewrite_description(bundle, change):
    described = json.loads((bundle / "neuron.json").read_text())
    change(described)
    (bundle / "neuron.json").unlink()
    (bundle / "neuron.json").write_text(json.dumps(described))
    put_right(bundle, "neuron.json")


def part_of(document, name):
    return next(part for part in document["parts"] if part["name"] == name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda d: part_of(d, "double.00").update(digest=part_of(d, "double.01")["digest"]),
            "part double.00 is not what",
        ),
        (lambda d: part_of(d, "double.00").update(file="hlo/single.hlo_module.pb"), "part double.00 is not what"),
        (lambda d: part_of(d, "double.00").update(net="double.01"), "part double.00 is not what|its net 'double.01'"),
        (lambda d: part_of(d, "double.00").update(size=1), "part double.00 is not what"),
        (lambda d: d["settings"].update(tp_degree=4), "neuron.json has the tp_degree 2, the manifest says 4"),
    ],
)
def test_what_a_manifest_says_of_a_split_part(bundle, change, words):
    forge(bundle, change)
    with pytest.raises(IntegrityError, match=words):
        open_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: part_of(d, "double.00").update(module="single"), "gives double.00 the module single"),
        (lambda d: part_of(d, "double.00")["shards"].reverse(), "gives double.00 the module double and files that are"),
        (lambda d: d["parts"].reverse(), "has the parts tail, .*, the manifest has others"),
        (lambda d: d["parts"].pop(), "the manifest has others"),
        (lambda d: d["modules"]["double"].update(hlo="hlo/single.hlo_module.pb"), "files that are not its own"),
        (lambda d: d["modules"]["double"].update(digest="sha256:" + "0" * 64), "part double.00 is not what"),
        (lambda d: d["modules"]["double"]["slots"].reverse(), "gives the module double other inputs and slots"),
        (lambda d: d.update(target="inf2"), "neuron.json has the target inf2, the manifest says trn1"),
    ],
)
def test_a_description_that_lies(bundle, change, words):
    """All digests are put right: what it says is compared with the modules, the weights and the model."""
    rewrite_description(bundle, change)
    with pytest.raises(IntegrityError, match=words):
        open_bundle(bundle)


def test_weights_of_another_part_or_rank(bundle):
    """Whole in themselves: the bundle says of each file what is in it."""
    labels = [f"weights/{name}/tp0.safetensors" for name in ("double.00", "single.00")]
    one, other = ((bundle / label).read_bytes() for label in labels)
    for label, data in zip(labels, (other, one), strict=True):
        (bundle / label).unlink()
        (bundle / label).write_bytes(data)
    with pytest.raises(IntegrityError, match=r"tp0\.safetensors: "):
        open_bundle(bundle)
    put_right(bundle, *labels)
    with pytest.raises(IntegrityError, match=r"has other tensors in weights/double\.00/tp0\.safetensors than"):
        open_bundle(bundle)
    for label, data in zip(labels, (one, other), strict=True):
        (bundle / label).write_bytes(data)
    put_right(bundle, *labels)
    open_bundle(bundle)  # the control: nothing else was wrong
