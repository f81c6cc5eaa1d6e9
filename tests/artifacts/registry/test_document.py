"""A hundred and more manifests that somebody might send us: each is refused before anything is written."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from fluxkiln.artifacts.modelpack import (
    MAX_DOCUMENT_BYTES,
    MAX_FILES,
    check_config,
    parse_document,
)
from fluxkiln.artifacts.registry.place import open_layout
from fluxkiln.artifacts.registry.transfer import Stop
from fluxkiln.artifacts.store import open_store
from fluxkiln.build.publish import inspect_reference, publish_bundle, pull_bundle
from fluxkiln.digests import digest_bytes
from fluxkiln.errors import IntegrityError

PATH = "org.cncf.model.filepath"

BAD_PATHS = [
    "", "/etc/passwd", "//x", "../x", "a/../../x", "a/..", "..", ".", "./x", "a/./b", "a//b", "a/", "a\\b", "..\\x",
    "C:\\x", "C:/x", "a\0b", "a\nb", "a\x1bb", "x" * 256, "a/" * 600 + "a", "manifest.json/x", "MANIFEST.JSON",
    "Manifest.json", "build.json", "\ud800", "transformer.bmodel/inside", "TRANSFORMER.bmodel", "Transformer.Bmodel",
    "tokenizer/VOCAB.json", "Tokenizer/vocab.json", "transformer.bmodel", "tokenizer/vocab.json", "tokenizer",
]  # fmt: skip
BAD_DIGESTS = [
    "", "sha256:", "sha256:" + "g" * 64, "sha256:" + "a" * 63, "sha256:" + "A" * 64, "sha512:" + "a" * 128,
    "md5:" + "a" * 32, "a" * 64, "sha256:" + "../" * 21 + "a", None, 7, ["sha256:" + "a" * 64],
    "sha256:" + "a" * 64 + "\n",
]  # fmt: skip
BAD_SIZES = [-1, 1 << 63, 1 << 41, 1.5, "7", None, True, [], 1e300]
BAD_TYPES = [
    "", None, 5, "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.cncf.model.weight.v1.tar", "application/vnd.cncf.model.weight.v1.tar+zstd", "text/html",
    "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "application/octet-stream",
]  # fmt: skip
BAD_TOPS: list[tuple[str, Any]] = [
    ("schemaVersion", 1), ("schemaVersion", "2"), ("schemaVersion", None), ("schemaVersion", True),
    ("mediaType", "application/vnd.oci.image.index.v1+json"), ("mediaType", None), ("mediaType", ["x"]),
    ("artifactType", None), ("artifactType", "application/vnd.oci.empty.v1+json"), ("artifactType", 3),
    ("config", None), ("config", []), ("config", "x"), ("layers", None), ("layers", []), ("layers", {}),
    ("layers", "x"), ("annotations", []), ("annotations", {"a": 1}), ("annotations", "x"), ("annotations", {"a": {}}),
]  # fmt: skip
BAD_BYTES = [
    b"", b"null", b"[]", b"7", b'"x"', b"{", b"{}", b"\xff\xfe", b'{"a":1,"a":2}', b"[" * 200_000, b'{"a":NaN}',
    b"\0" * 100, b"<html>404</html>", b" " * (MAX_DOCUMENT_BYTES + 1),
]  # fmt: skip


def layer_with(**changes: Any) -> Callable[[dict], None]:
    def change(document: dict) -> None:
        document["layers"][2].update(changes)

    return change


def hostile() -> list[tuple[str, Callable[[dict], Any]]]:
    """(what is wrong, how a good manifest becomes it); bytes are returned, other changes made in place."""
    cases: list[tuple[str, Callable[[dict], Any]]] = []
    for path in BAD_PATHS:
        cases.append((f"path {path[:30]!r} {len(path)}", layer_with(annotations={PATH: path})))
    for path in (None, 5, ["x"], {}):
        cases.append((f"path {path!r}", layer_with(annotations={PATH: path})))
    cases.append(("no annotations", layer_with(annotations=None)))
    for digest in BAD_DIGESTS:
        cases.append((f"digest {str(digest)[:30]!r} {len(str(digest))}", layer_with(digest=digest)))
        cases.append(
            (f"config digest {str(digest)[:30]!r} {len(str(digest))}", lambda d, x=digest: d["config"].update(digest=x))
        )
    for size in BAD_SIZES:
        cases.append((f"size {size!r}", layer_with(size=size)))
        cases.append((f"config size {size!r}", lambda d, x=size: d["config"].update(size=x)))
    for media_type in BAD_TYPES:
        cases.append((f"type {media_type!r}", layer_with(mediaType=media_type)))
        cases.append((f"config type {media_type!r}", lambda d, x=media_type: d["config"].update(mediaType=x)))
    for key, value in BAD_TOPS:
        cases.append((f"{key} {value!r}", lambda d, k=key, v=value: d.update({k: v})))
    for data in BAD_BYTES:
        cases.append((f"bytes {data[:20]!r}", lambda d, x=data: x))
    cases += [
        ("foreign urls", layer_with(urls=["https://elsewhere.example/x"])),
        ("layer is a text", lambda d: d["layers"].__setitem__(0, "x")),
        ("two manifests", lambda d: d["layers"].append(d["layers"][0])),
        ("no manifest", lambda d: d["layers"].pop(0)),
        ("too many layers", lambda d: d.update(layers=d["layers"] * (MAX_FILES // 2))),
        ("one digest, two sizes", lambda d: d["layers"][2].update(digest=d["layers"][3]["digest"], size=1)),
        ("sum too large", lambda d: [layer.update(size=1 << 40) for layer in d["layers"][1:]]),
        ("huge model card", lambda d: d["layers"][-1].update(size=1 << 39)),
    ]
    return cases


CASES = hostile()


def test_there_are_a_hundred_of_them():
    assert len(CASES) >= 100
    assert len({name for name, _ in CASES}) == len(CASES)


@pytest.fixture
def good(published) -> dict:
    return json.loads(published.document.data)


def test_hostile_manifests_are_refused_and_nothing_is_written(good, tmp_path):
    text = json.dumps(good)
    parse_document(text.encode(), "the good one")
    store, out = open_store(tmp_path / "layout"), tmp_path / "out"
    for name, change in CASES:
        document = json.loads(text)
        made = change(document)
        data = made if isinstance(made, bytes) else json.dumps(document).encode()
        for refuse in (
            lambda data=data: parse_document(data, "hostile"),
            lambda data=data: pull_bundle(
                f"oci-layout:{tmp_path / 'layout'}@{store.add_bytes(data).digest}", out / "here"
            ),
        ):
            with pytest.raises(IntegrityError) as found:
                refuse()
            assert (found.value.exit_code, str(found.value).count("\n")) == (4, 0), name
    assert not out.exists() or not any(out.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["build", "docker", "layout", "store"]


def test_truncated_and_flipped_manifests_are_refused(published):
    """By their digest: nobody has to guess what was meant."""
    data, digest = published.document.data, published.document.digest
    random.seed(6)
    for _ in range(50):
        cut = data[: random.randrange(len(data))]
        with pytest.raises(IntegrityError, match="has the digest"):
            parse_document(cut, "cut", digest)
        flipped = bytearray(data)
        flipped[random.randrange(len(data))] ^= 1 << random.randrange(8)
        with pytest.raises(IntegrityError, match="has the digest"):
            parse_document(bytes(flipped), "flipped", digest)


def publish_changed(tmp_path, document: dict, changes: Callable[[dict], None], config: dict | None = None) -> str:
    """A manifest that is legal by itself, in the layout; the digest to ask for."""
    store = open_store(tmp_path / "layout")
    changes(document)
    if config is None:
        config = json.loads(store.read(document["config"]["digest"]))
        config["modelfs"]["diffIds"] = [layer["digest"] for layer in document["layers"]]
    blob = store.add_bytes(json.dumps(config).encode())
    document["config"].update(digest=blob.digest, size=blob.size)
    return f"oci-layout:{tmp_path / 'layout'}@{store.add_bytes(json.dumps(document).encode()).digest}"


def test_layers_must_be_those_of_the_bundle(good, tmp_path):
    reference = publish_changed(tmp_path, good, lambda d: None)
    inspect_reference(reference)

    other = json.loads(json.dumps(good))
    reference = publish_changed(tmp_path, other, lambda d: d["layers"].pop(3))
    with pytest.raises(IntegrityError, match="has no layer for"):
        inspect_reference(reference)

    def swap(document: dict) -> None:
        first, second = document["layers"][2], document["layers"][3]
        first["digest"], second["digest"] = second["digest"], first["digest"]
        first["size"], second["size"] = second["size"], first["size"]

    reference = publish_changed(tmp_path, json.loads(json.dumps(good)), swap)
    with pytest.raises(IntegrityError, match=r"manifest\.json says"):
        pull_bundle(reference, tmp_path / "out")

    def smuggle(document: dict) -> None:
        document["layers"].append({**document["layers"][3], "annotations": {PATH: "bin/sh"}})

    reference = publish_changed(tmp_path, json.loads(json.dumps(good)), smuggle)
    with pytest.raises(IntegrityError, match=r"'bin/sh', which manifest\.json does not name"):
        pull_bundle(reference, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "config", [{}, {"modelfs": {"type": "tar", "diffIds": []}}, {"modelfs": {"type": "layers", "diffIds": []}}]
)
def test_config_must_name_the_same_layers(config, good, tmp_path):
    with pytest.raises(IntegrityError, match="config"):
        inspect_reference(publish_changed(tmp_path, good, lambda d: None, config))


@pytest.mark.parametrize("text", ["\x1b[2J", "a\x07", "\u202egnp.exe", "\x9b31m"])
def test_texts_that_steer_a_terminal_are_refused(good, tmp_path, text, build):
    good["annotations"]["org.opencontainers.image.title"] = text
    with pytest.raises(IntegrityError, match="control character"):
        parse_document(json.dumps(good).encode(), "hostile")
    with pytest.raises(IntegrityError, match="control character"):
        publish_bundle(build("steering", tools={"a": f"1{text}"}), f"oci-layout:{tmp_path / 'layout'}:v2")


def test_config_of_our_own_is_accepted(published, tmp_path):
    place = open_layout(tmp_path / "layout", write=False, stop=Stop())
    data = place.store.read(published.document.config.digest)
    check_config(published.document, data, "ours")
    config = published.document.config
    assert (config.digest, config.size) == (digest_bytes(data), len(data))
