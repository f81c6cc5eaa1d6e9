"""Nothing wrong gets through a manifest: bits that flip, and what somebody writes who knows the format."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.artifacts.manifest import SCHEMA_VERSION, Manifest, manifest_from_json, parse_manifest
from fluxkiln.build.make import build
from fluxkiln.compile.opener import open_bundle
from fluxkiln.errors import FluxkilnError, IntegrityError, ToolchainError
from fluxkiln.settings import Settings
from tests.eager import make_bundle
from tests.hostile.forged import forge

# of builds of tiny-dev: a manifest as it is written for each toolchain
MANIFESTS = {path.stem: path.read_bytes() for path in sorted(Path(__file__).with_name("manifests").glob("*.json"))}
TARGETS = ("bm1684x", "cpu", "trn1")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tiny_checkpoint, tmp_path_factory):
    """A bundle; not to be written to."""
    return make_bundle(tiny_checkpoint(), tmp_path_factory.mktemp("made"))


@pytest.fixture
def bundle(folder, tmp_path):
    """A copy of it, to be spoilt."""
    import shutil

    return Path(shutil.copytree(folder, tmp_path / "bundle"))


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def accepted(data: bytes, true: Manifest, parse: Any = parse_manifest) -> bool:
    """Whether a manifest is accepted with another meaning; whatever is raised besides is a bug."""
    try:
        return bool(parse(data, "here") != true)
    except FluxkilnError:
        return False


def parse_unsealed(data: bytes, where: str) -> Manifest:
    """As before there was a digest: the same checks of keys, types, paths and references."""
    try:
        document = json.loads(data)
    except ValueError as error:
        raise IntegrityError(str(error)) from error
    if not isinstance(document, dict):
        raise IntegrityError("no object")
    document.pop("digest", None)
    return manifest_from_json(document, where)


def flips(target: str, count: int, seed: int) -> list[bytes]:
    data = MANIFESTS[target]
    bits = random.Random(seed).choices(range(8 * len(data)), k=count)
    return [flipped(data, bit) for bit in bits]


@pytest.mark.parametrize("target", TARGETS)
def test_samples_are_current(target):
    manifest = parse_manifest(MANIFESTS[target], target)
    assert (manifest.schema_version, manifest.target) == (SCHEMA_VERSION, target)
    assert manifest.to_bytes() == MANIFESTS[target]


@pytest.mark.parametrize(
    ("target", "count"),
    [
        *((target, 1000) for target in TARGETS),
        *(pytest.param(target, 34_000, marks=pytest.mark.thorough) for target in TARGETS),
    ],
)
def test_no_flipped_bit_is_accepted(target, count):
    true = parse_manifest(MANIFESTS[target], target)
    assert sum(accepted(data, true) for data in flips(target, count, count)) == 0


@pytest.mark.parametrize("target", TARGETS)
def test_without_its_digest_flipped_bits_would_be(target):
    """The control: what the digest catches."""
    true = parse_manifest(MANIFESTS[target], target)
    assert sum(accepted(data, true, parse_unsealed) for data in flips(target, 300, 0)) > 10


def test_the_same_in_another_spelling_is_the_same():
    for data in MANIFESTS.values():
        document = json.loads(data)
        turned = json.dumps(dict(reversed(document.items())), indent=7).encode()
        assert parse_manifest(turned, "here") == parse_manifest(data, "here")


def _part(document, name):
    return next(part for part in document["parts"] if part["name"] == name)


def _exchange(key, one, other):
    def change(document):
        first, second = _part(document, one), _part(document, other)
        first[key], second[key] = second[key], first[key]

    return change


def _set(name, **values):
    return lambda document: _part(document, name).update(values)


def _swap_graphs(document):
    """The graph of one block in the place of another's, and all else that is said of it."""
    for key in ("file", "net", "digest", "size"):
        _exchange(key, "double_modulation.00", "double_modulation.01")(document)


def _reorder(document):
    document["parts"].reverse()


def _without(name):
    def change(document):
        document["parts"] = [part for part in document["parts"] if part["name"] != name]

    return change


FORGED = {
    "the other's graph": (_swap_graphs, "double_modulation.00 is said to be the graph double_modulation.01 in"),
    "the other's file": (
        _exchange("file", "double_modulation.00", "double_modulation.01"), "double_modulation.00 has the digest",
    ),
    "a renamed net": (_set("tail", net="tail_00"), "part tail is said to be the graph tail_00"),
    "parts exchanged": (_exchange("name", "double.00", "double.01"), r"part 14 is double.01 \(double_modulated\)"),
    "kinds exchanged": (_exchange("kind", "double.00", "single.00"), r"is double.00 \(single_modulated\), FLUX.1 with"),
    "another order": (_reorder, r"part 1 is vae_decoder \(vae_decoder\), FLUX.1 with these configs has clip"),
    "a block less": (_without("single.02"), r"part 18 is tail \(tail_modulated\), .* has single.02"),
    "the last part less": (_without("vae_decoder"), r"part 20 is nothing, .* has vae_decoder"),
    "a block more": (
        lambda d: d["parts"].append({**d["parts"][-1], "name": "x", "net": "x", "file": "onnx/tail.onnx"}),
        r"part 21 is x \(vae_decoder\), .* has nothing there, of 20 in all",
    ),
    "another digest": (_set("clip", digest="sha256:" + "0" * 64), "part clip has the digest sha256:0000"),
    "another size": (_set("clip", size=7), r"part clip has the digest .* \(7 bytes\), its file"),
    "another shape": (
        lambda d: _part(d, "tail")["inputs"][0].update(shape=[1, 8, 256]), r"takes hidden_states \[1, 8, 256\]",
    ),
    "another input": (lambda d: _part(d, "tail")["inputs"].pop(), "part tail takes hidden_states .*, at this size"),
    "inputs exchanged": (lambda d: _part(d, "tail")["inputs"].reverse(), "part tail takes modulation"),
    "another type": (lambda d: _part(d, "tail")["inputs"][0].update(dtype="int64"), "part tail takes and gives"),
    "another output": (lambda d: _part(d, "tail")["outputs"][0].update(name="x"), "part tail takes and gives"),
    "another size of the image": (lambda d: d["shapes"].update(width=128), "at this size it must be"),
    "fewer tokens": (lambda d: d["shapes"].update(tokens=16), "at this size it must be"),
    "another variant": (lambda d: d.update(variant="schnell"), "its variant is 'schnell', by configs.json it is 'dev'"),
    "another form": (lambda d: d["settings"].update(modulation="inline"), r"these configs has head \(head\) there"),
    "no form": (lambda d: d["settings"].pop("modulation"), "what it says does not go with configs.json"),
    "components less": (lambda d: d["settings"]["components"].remove("vae"), "vae_decoder .* has nothing there"),
    "a file that is not there": (
        lambda d: d["files"].append({**d["files"][0], "path": "LICENSE.md"}), "LICENSE.md: missing",
    ),
    "a file unnamed": (
        lambda d: d["files"].remove(next(f for f in d["files"] if f["path"] == "tokenizer/vocab.json")),
        "tokenizer/vocab.json: not named by the manifest",
    ),
    "a role of another name": (lambda d: d["files"][1].update(role="doc"), "gives 'configs.json' the role doc"),
}  # fmt: skip


@pytest.mark.parametrize("what", FORGED)
@pytest.mark.parametrize("known", [False, True])
def test_a_forged_manifest_is_refused(bundle, what, known):
    """It has its own digest, and the record of the build names it: all else must be true as well."""
    change, words = FORGED[what]
    if known:
        open_bundle(bundle)
    forge(bundle, change)
    with pytest.raises(IntegrityError, match=words):
        open_bundle(bundle)


def test_what_was_not_forged_is_opened(bundle):
    """The control: nothing but the change was wrong."""
    manifest = open_bundle(bundle).manifest
    assert open_bundle(forge(bundle, lambda document: None)).manifest == manifest
    renamed = forge(bundle, lambda document: document.update(name="another"))
    assert open_bundle(renamed).digest != manifest.digest


def test_weights_outside_of_the_manifest_are_not_read(bundle):
    """A graph may name any file beside it; a loader would read that."""
    import onnx

    from fluxkiln.compile.onnx.external_data import external_tensor
    from fluxkiln.files import digest_file

    for location in ("../LICENSE", "weights.data", "../../secret", "/etc/passwd"):
        path = bundle / "onnx/tail.onnx"
        model = onnx.load(path, load_external_data=False)
        del model.graph.initializer[:]
        model.graph.initializer.append(external_tensor("x", onnx.TensorProto.FLOAT, (1,), location, 0, 4))
        path.write_bytes(model.SerializeToString())
        digest, size = digest_file(path)

        def change(document, digest=digest, size=size):
            _part(document, "tail").update(digest=digest, size=size)
            entry = next(file for file in document["files"] if file["path"] == "onnx/tail.onnx")
            entry.update(sha256=digest.removeprefix("sha256:"), size=size)

        forge(bundle, change)
        with pytest.raises(IntegrityError, match=r"part tail reads .*, which is none of the manifest's weights"):
            open_bundle(bundle)


@pytest.mark.parametrize("layers", [10**6, 10**40, -1, 0, "two", None, [1], 1.5e300])
def test_configs_that_cannot_be(bundle, layers):
    """They decide how many parts there are; whoever changes them has to change the manifest's digest of them too."""
    from fluxkiln.files import digest_file

    path = bundle / "configs.json"
    configs = json.loads(path.read_bytes())
    configs["transformer"]["num_layers"] = layers
    path.write_text(json.dumps(configs))
    digest, size = digest_file(path)

    def change(document):
        entry = next(file for file in document["files"] if file["path"] == "configs.json")
        entry.update(sha256=digest.removeprefix("sha256:"), size=size)

    forge(bundle, change)
    with pytest.raises(IntegrityError, match=r"what it says does not go with configs.json|1 is|part 8 is"):
        open_bundle(bundle)


def files_of(bundle: Path) -> list[Path]:
    return sorted(path for path in bundle.rglob("*") if path.is_file())


def missed_flips(bundle: Path, count: int, seed: int) -> list[str]:
    """Flip a bit of one byte, open the bundle, put it back; those that were not found, of files chosen by turns."""
    order, missed = random.Random(seed), []
    for number in range(count):
        path = files_of(bundle)[number % len(files_of(bundle))]
        data = path.read_bytes()
        bit = order.randrange(8 * len(data))
        path.unlink()  # it may be a link to the store's
        path.write_bytes(flipped(data, bit))
        try:
            open_bundle(bundle)
            missed.append(f"{path.relative_to(bundle)}: bit {bit}")
        except FluxkilnError:
            pass
        path.unlink()
        path.write_bytes(data)
    return missed


def test_a_flipped_bit_in_any_file_is_found(bundle):
    open_bundle(bundle)
    assert missed_flips(bundle, 120, 0) == []
    open_bundle(bundle)


@pytest.mark.thorough
@pytest.mark.parametrize("target", ["cpu", "trn1", pytest.param("bm1684x", marks=pytest.mark.tpu_mlir)])
def test_a_flipped_bit_in_any_file_of_a_build_is_found(target, tmp_path):
    settings = Settings(target=target, model="tiny-dev", verify=False, build_dir=tmp_path / "build")
    try:
        build(settings)
    except ToolchainError:  # no neuronx-cc: the bundle is there
        assert target == "trn1"
    (made,) = (tmp_path / "build" / target).glob("*/bundle")
    open_bundle(made)
    assert missed_flips(made, 334, 1) == []
    assert read_manifest(made).target == target
    open_bundle(made)
