"""Valid inputs spoiled: hypothesis strategies for bytes and for JSON documents, from samples."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

# Numbers where something overflows, ends or begins.
NUMBERS = (0, -1, 1, 2, 255, 2**16, 10**6, 2**31, 2**32 - 1, 2**63, 2**64, 10**40, -(2**63), 0.5, -0.0, 1e308, 5e-324)
TEXTS = (
    "", " ", "0", "NaN", "../x", "/etc/passwd", "a/../../b", "C:x", "a\\b", "a\x00b", "\ud800", "\u202e", "\x1b[2J",
    "sha256:" + "0" * 64, "(a+)+$", "9" * 80, "x" * 5000, "-x", ".", "..", "\n",
)  # fmt: skip
ODD = st.one_of(
    st.sampled_from((None, True, False, float("nan"), float("inf"), [], {}, [[]], [None], {"": None})),
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.sampled_from(NUMBERS), max_size=4),
    st.integers(1, 70).map(lambda depth: json.loads("[" * depth + "]" * depth)),
).map(copy.deepcopy)  # what is spoiled further is not what the next example begins with


def spoiled(seeds: Sequence[bytes], document: bool) -> st.SearchStrategy[bytes]:
    """Bytes that are nearly a valid input, and some that are nothing of the kind."""
    kinds = [edited_bytes(seeds), st.binary(max_size=400)]
    if document:
        trees = [json.loads(seed) for seed in seeds]
        kinds = [edited_documents(trees), edited_documents(trees), ODD.map(encode), *kinds]
    return st.one_of(kinds)


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


@st.composite
def edited_bytes(draw: st.DrawFn, seeds: Sequence[bytes]) -> bytes:
    """A sample with some bytes changed, cut out, repeated, or replaced by a number of four or eight bytes."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place, count = draw(st.integers(0, max(len(data) - 1, 0))), draw(st.sampled_from((1, 2, 4, 8, 64, 4096)))
        how = draw(st.sampled_from(("flip", "number", "cut", "repeat", "end", "random")))
        if how == "flip" and data:
            data[place] ^= 1 << draw(st.integers(0, 7))
        elif how == "number":
            width = draw(st.sampled_from((2, 4, 8)))
            number = draw(st.sampled_from(NUMBERS[:13])) & (2 ** (8 * width) - 1)
            data[place : place + width] = number.to_bytes(width, "little")
        elif how == "cut":
            del data[place : place + count]
        elif how == "repeat":
            data[place:place] = data[place : place + count]
        elif how == "end":
            del data[place:]
        else:
            data[place : place + 8] = draw(st.binary(max_size=8))
    return bytes(data)


@st.composite
def edited_documents(draw: st.DrawFn, trees: Sequence[Any]) -> bytes:
    """A sample with some values replaced, left out, renamed, repeated or exchanged."""
    tree = [copy.deepcopy(draw(st.sampled_from(trees)))]  # its root can be replaced as well
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        owner, key = places[draw(st.integers(0, len(places) - 1))]
        how = draw(st.sampled_from(("replace", "replace", "remove", "rename", "repeat", "exchange")))
        if how == "replace" or owner is tree:
            owner[key] = draw(ODD)
        elif how == "remove":
            del owner[key]
        elif how == "rename" and isinstance(owner, dict):
            owner[draw(st.sampled_from(TEXTS))] = owner.pop(key)
        elif how == "exchange":
            other, there = places[draw(st.integers(0, len(places) - 1))]
            owner[key] = copy.deepcopy(other[there])
        elif isinstance(owner, list):
            owner[key:key] = [copy.deepcopy(owner[key]) for _ in range(draw(st.sampled_from((1, 2, 300))))]
    return encode(tree[0])


def _places(owner: Any) -> Any:
    """(list or object, index or key) of every value."""
    for key in range(len(owner)) if isinstance(owner, list) else list(owner):
        yield owner, key
        if isinstance(owner[key], list | dict):
            yield from _places(owner[key])
