from __future__ import annotations

import pytest

from fluxkiln.artifacts.manifest import resolve_inside, validate_manifest_path, validate_manifest_paths
from fluxkiln.errors import IntegrityError

ATTACKS = [
    "",
    "/etc/passwd",
    "../outside",
    "a/../../outside",
    "a/..",
    "./a",
    "a//b",
    "a/",
    "a\\b",
    "..\\outside",
    "a\0b",
    "a\nb",
    "C:evil",
    "c:/evil",
    "\ud800",
    "x" * 256,
    "/".join(["x" * 200] * 6),
    "manifest.json",
    "MANIFEST.json",
    "build.json",
]


@pytest.mark.parametrize("path", ATTACKS)
def test_attack_is_refused(path):
    with pytest.raises(IntegrityError) as error:
        validate_manifest_path(path)
    assert error.value.exit_code == 4


@pytest.mark.parametrize(
    "path", ["transformer.bmodel", "tokenizer_2/spiece.model", "a/manifest.json", "..a/b..", "vae/.keep", "ü/日本"]
)
def test_ordinary_path_is_taken_as_it_is(path):
    assert str(validate_manifest_path(path)) == path


@pytest.mark.parametrize(
    "paths",
    [
        ("LICENSE", "license"),
        ("a/B", "A/b"),
        ("stra\u00dfe", "STRASSE"),
        ("\u00e9", "e\u0301"),
        ("same", "same"),
        ("a", "a/b"),
        ("a/b", "A"),
    ],
)
def test_two_names_of_one_file_are_refused(paths):
    for path in set(paths):
        validate_manifest_path(path)
    with pytest.raises(IntegrityError):
        validate_manifest_paths(paths)


def test_names_that_share_a_beginning_are_no_collision():
    validate_manifest_paths(["a", "a.b", "ab/c", "b/a"])


def test_link_out_of_the_bundle_is_refused(tmp_path):
    root = tmp_path / "bundle"
    (root / "inner").mkdir(parents=True)
    (root / "way").symlink_to(tmp_path)
    assert resolve_inside(root, "inner/file") == root / "inner" / "file"
    with pytest.raises(IntegrityError, match="symbolic link"):
        resolve_inside(root, "way/file")
