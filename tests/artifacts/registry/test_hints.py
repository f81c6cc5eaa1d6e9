from __future__ import annotations

import pytest

from fluxkiln.artifacts.registry import oci
from fluxkiln.artifacts.registry.oci import add_hints, read_hints

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64


def test_hints_are_kept_per_registry():
    add_hints("ghcr.io", "a/b", [ONE, TWO])
    add_hints("[::1]:5000", "c", [ONE])
    add_hints("ghcr.io", "d", [TWO])
    assert read_hints("ghcr.io") == {ONE: "a/b", TWO: "d"}
    assert read_hints("[::1]:5000") == {ONE: "c"}
    assert read_hints("elsewhere") == {}


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"sha256:1": "../../x?from=y"}', b'{"sha256:1": 5}', b"\xff"])
def test_a_file_that_makes_no_sense_is_no_hint(data):
    add_hints("ghcr.io", "a", [ONE])
    oci._hints_file("ghcr.io").write_bytes(data)
    assert read_hints("ghcr.io") == {}
    add_hints("ghcr.io", "a", [ONE])
    assert read_hints("ghcr.io") == {ONE: "a"}


def test_the_oldest_go_first(monkeypatch):
    monkeypatch.setattr(oci, "MOST_HINTS", 3)
    for number in range(5):
        add_hints("ghcr.io", "a", [f"sha256:{number}"])
    add_hints("ghcr.io", "b", ["sha256:2"])
    assert list(read_hints("ghcr.io")) == ["sha256:3", "sha256:4", "sha256:2"]


def test_where_nothing_can_be_written_nothing_happens(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    add_hints("ghcr.io", "a", [ONE])
    assert read_hints("ghcr.io") == {}
