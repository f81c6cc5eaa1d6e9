from __future__ import annotations

import re
from pathlib import Path

import pytest

from fluxkiln.artifacts.registry.place import (
    HubReference,
    LayoutReference,
    RegistryReference,
    is_loopback,
    looks_like_reference,
    parse_reference,
    with_tag,
)
from fluxkiln.errors import UsageError

DIGEST = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oci-layout:build/store:tiny-dev:cpu", LayoutReference(Path("build/store"), tag="tiny-dev:cpu")),
        ("oci-layout:/a b/c:v1", LayoutReference(Path("/a b/c"), tag="v1")),
        (f"oci-layout:x@{DIGEST}", LayoutReference(Path("x"), digest=DIGEST)),
        ("localhost/x:v1", RegistryReference("localhost", "x", tag="v1")),
        ("registry:5000/a/b_c/d-e.f:V_1.0", RegistryReference("registry:5000", "a/b_c/d-e.f", tag="V_1.0")),
        ("[::1]:5000/a:v", RegistryReference("[::1]:5000", "a", tag="v")),
        (f"ghcr.io/a/b@{DIGEST}", RegistryReference("ghcr.io", "a/b", digest=DIGEST)),
        (f"ghcr.io/a/b:v1@{DIGEST}", RegistryReference("ghcr.io", "a/b", digest=DIGEST)),
        ("hf://org/Repo.x@v1", HubReference("org/Repo.x", tag="v1")),
    ],
)
def test_forms(text, expected):
    assert parse_reference(text) == expected
    assert parse_reference(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "begins with no host"),
        ("nohost/x:v1", "begins with no host ('nohost')"),
        ("https://ghcr.io/a:v1", "leave it out"),
        ("s3://bucket/a:v1", "begins with s3://"),
        ("ghcr.io/UPPER:v1", "lower-case"),
        ("ghcr.io/a/../b:v1", "lower-case"),
        ("ghcr.io/a", "has no tag; add :TAG"),
        ("ghcr.io/a:-v", "tag '-v' is not legal"),
        ("ghcr.io/a:" + "v" * 129, "at most 128"),
        ("ghcr.io/a@sha256:12", "64 hex digits"),
        ("ghcr.io/a@md5:" + "a" * 32, "64 hex digits"),
        ("ghcr.io/" + "a" * 256 + ":v", "255 at most"),
        ("user:pass@ghcr.io/a:v1", "begins with no host"),
        ("ghcr.io/a:v1\nHost: evil", "not legal"),
        ("oci-layout::v1", "names no folder"),
        ("oci-layout:x", "has no tag; add :TAG"),
        ("oci-layout:x:../y", "not legal"),
        ("hf://org@v1", "write hf://ORG/REPO@REV"),
        ("hf://org/repo", "add @REV"),
        ("hf://org/repo@../x", "not legal"),
        ("hf://org/../x@v1", "write hf://ORG/REPO@REV"),
    ],
)
def test_refused(text, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        parse_reference(text)


def test_a_tag_may_be_left_out_where_none_is_needed():
    assert parse_reference("ghcr.io/a", tagged=False) == RegistryReference("ghcr.io", "a")
    assert str(with_tag(parse_reference("hf://o/r", tagged=False), "v2")) == "hf://o/r@v2"
    assert with_tag(RegistryReference("h:1", "a", digest=DIGEST), "v2") == RegistryReference("h:1", "a", tag="v2")


@pytest.mark.parametrize("host", ["localhost", "localhost:5000", "127.0.0.1", "127.9.9.9:80", "[::1]:5000", "[::1]"])
def test_loopback(host):
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.evil.com", "128.0.0.1:5000", "127.0.0.1.evil.com", "[::2]:1", "ghcr.io"])
def test_not_loopback(host):
    assert not is_loopback(host)


def test_a_folder_is_no_reference(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.b" / "c").mkdir(parents=True)
    assert not looks_like_reference("a.b/c")
    assert not looks_like_reference("build/cpu/tiny")
    assert not looks_like_reference("./a.c/d:v1")
    assert looks_like_reference("a.c/d:v1")
    assert looks_like_reference("oci-layout:x:y")
