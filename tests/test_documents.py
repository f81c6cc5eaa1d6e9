"""The one reader of foreign documents: what it refuses, in which words, and that nothing it takes costs much."""

from __future__ import annotations

import os
import resource
from typing import Annotated, NotRequired, TypedDict

import msgspec
import pytest

from fluxkiln.documents import DOCUMENT, SMALL, DocumentLimits, check_schema, read_json, read_object, read_object_file
from fluxkiln.errors import CheckpointError, IntegrityError

Depth = Annotated[int, msgspec.Meta(ge=1, le=512)]


class Config(TypedDict):
    num_layers: Depth
    shift: float
    axes: NotRequired[list[Depth]]


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b'{"a": 1, "b": 2, "a": 2}', "key 'a' appears twice"),
        (b'{"a": {"b": 1, "b": 1}}', "key 'b' appears twice"),
        (b"NaN", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e400]", "the number 1e400 is too large"),
        (b"[1" + b"0" * 400 + b"]", "a number has 401 digits, 64 are the most"),
        (b"[0." + b"1" * 5000 + b"]", "a number has 5002 digits"),
        (b"{", "Expecting property name"),
        (b"", "Expecting value"),
        (b"\xff", "can't decode byte 0xff"),
        ('"kiln"'.encode("utf-16"), "can't decode byte 0xff"),
        (b"\xef\xbb\xbf{}", "Unexpected UTF-8 BOM"),
        (b'"\\ud800"', "surrogates not allowed"),
        (b'{"\\udc00x": 1}', "surrogates not allowed"),
        (b"[" * 60_000, "recursion"),
        (b"[" * 33 + b"]" * 33, "it has brackets 33 deep, 32 are the most"),
        (b'{"a":' * 33 + b"1" + b"}" * 33, "it has brackets 33 deep, 32 are the most"),
        (b"[" + b"0," * 1_000_000 + b"0]", "it has about 1000001 entries"),
        (b"[" + b" " * DOCUMENT.nbytes + b"]", "bytes, 16777216 are the most"),
    ],
)
def test_what_is_not_strict_or_too_much_is_refused(data, fault):
    with pytest.raises(IntegrityError, match=r"^here is not valid JSON") as caught:
        read_json(data, "here")
    assert fault in str(caught.value)
    assert str(caught.value).endswith("; fetch or build it again")


def test_what_is_strict_is_taken():
    text = '{"größe": [1, -2.5e3, true, null, "\\ud83d\\ude00", ""], "x": {}}'
    assert read_json(text.encode(), "here") == {"größe": [1, -2500.0, True, None, "\U0001f600", ""], "x": {}}
    deep = b"[" * 32 + b"]" * 32
    assert read_json(deep, "here") is not None


@pytest.mark.parametrize(("data", "kind"), [(b"[]", "list"), (b'"a"', "text"), (b"1", "number"), (b"null", "null")])
def test_an_object_is_asked_for(data, kind):
    with pytest.raises(CheckpointError, match=f"here holds a JSON {kind}, no object; copy it again"):
        read_object(data, "here", error=CheckpointError, remedy="copy it again")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"shift": 1.0}, "here: object missing required field num_layers; again"),
        ({"num_layers": 10**40, "shift": 1}, f"here has num_layers = '{10**40}': expected int <= 512; again"),
        ({"num_layers": 0, "shift": 1}, "here has num_layers = '0': expected int >= 1; again"),
        ({"num_layers": True, "shift": 1}, "here has num_layers = 'True': expected int, got bool; again"),
        ({"num_layers": "2", "shift": 1}, "here has num_layers = '2': expected int, got str; again"),
        ({"num_layers": 2, "shift": None}, "here has shift = 'None': expected float, got null; again"),
        ({"num_layers": 2, "shift": 1, "axes": "abc"}, "here has axes = 'abc': expected array, got str; again"),
        ({"num_layers": 2, "shift": 1, "axes": [1, 0]}, "here has axes[1] = '0': expected int >= 1; again"),
    ],
)
def test_a_schema_names_place_value_and_rule(value, sentence):
    with pytest.raises(CheckpointError) as caught:
        check_schema(value, Config, "here", error=CheckpointError, remedy="again")
    assert str(caught.value) == sentence


def test_a_schema_lets_other_keys_pass():
    found = read_object(b'{"num_layers": 2, "shift": 3, "other": {}}', "here", Config)
    assert found == {"num_layers": 2, "shift": 3, "other": {}}


def test_only_regular_files_of_the_right_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "large").write_bytes(b"[" + b" " * SMALL.nbytes + b"]")
    (tmp_path / "hole").touch()
    os.truncate(tmp_path / "hole", 1 << 40)
    with pytest.raises(IntegrityError, match="fifo cannot be read: it is no regular file; fetch"):
        read_object_file(tmp_path / "fifo")
    with pytest.raises(IntegrityError, match="cannot be read: it is no regular file"):
        read_object_file(tmp_path)
    for name in ("large", "hole"):
        with pytest.raises(IntegrityError, match=f"{name} is larger than 1048576 bytes, the most that are read of it"):
            read_object_file(tmp_path / name, limits=SMALL)
    with pytest.raises(FileNotFoundError):
        read_object_file(tmp_path / "absent")


@pytest.mark.parametrize("piece", [b"[],", b"{},", b'{"a":{}},', b'"",', b"[[[]]],"])
def test_the_worst_document_takes_little_memory(piece):
    limits = DocumentLimits()
    count = min(limits.nbytes // len(piece), limits.entries // sum(map(piece.count, (b",", b"[", b"{")))) - 2
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert read_json(b"[" + piece * count + b"0]", "here", limits=limits)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < 400 << 20
