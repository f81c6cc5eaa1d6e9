"""Documents that others wrote, read by one reader: JSON within limits, of the types that a schema names.

A document may come from a disk, a registry, a browser or an attacker. What is read here is UTF-8, has no key twice, no
NaN, no half of a surrogate pair and no more of anything than its limits allow. Memory: about 100 bytes for each of its
entries, of which there are as many as it may have.

Schemas are the types of annotations, with `msgspec.Meta` where a number or a text has a range. Keys that a schema does
not name pass: configs have many that nobody here reads.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fluxkiln.digests import Json
from fluxkiln.errors import FluxkilnError, IntegrityError
from fluxkiln.files import open_regular

_REMEDY = "fetch or build it again"
_SURROGATE = re.compile(rb"\\u[dD][89abcdefABCDEF]")
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]")


@dataclass(frozen=True, slots=True)
class DocumentLimits:
    """The most that a document may have.

    Attributes:
        nbytes: of the whole. entries: keys, items and brackets. depth: brackets within brackets.
        digits: characters of a number.
    """

    nbytes: int = 16 << 20
    entries: int = 1_000_000
    depth: int = 32
    digits: int = 64


# What a person or a program asks for: a request, a credential, a record of few facts.
SMALL = DocumentLimits(nbytes=1 << 20, entries=50_000)
DOCUMENT = DocumentLimits()
# A row for each part at each rung and step.
REPORT = DocumentLimits(nbytes=256 << 20, entries=20_000_000)


def read_json(
    data: bytes, where: str, *, error: type[FluxkilnError] = IntegrityError, remedy: str = _REMEDY,
    limits: DocumentLimits = DOCUMENT,
) -> Json:  # fmt: skip
    """The value of a JSON document.

    Args:
        where: what it is, for the message. error: what is raised, with `remedy` at the end of its sentence.

    Raises:
        FluxkilnError: as `error`; it is no strict JSON, or more than `limits` allow.
    """
    try:
        return _parse(data, limits)
    except (ValueError, RecursionError) as fault:
        raise error(f"{where} is not valid JSON ({fault}); {remedy}") from fault


def read_object(
    data: bytes, where: str, schema: Any = None, *, error: type[FluxkilnError] = IntegrityError,
    remedy: str = _REMEDY, limits: DocumentLimits = DOCUMENT,
) -> dict[str, Any]:  # fmt: skip
    """The JSON object in `data`; with a schema, one that fits it. Arguments and errors as `read_json`."""
    found = read_json(data, where, error=error, remedy=remedy, limits=limits)
    if not isinstance(found, dict):
        raise error(f"{where} holds a JSON {_kind(found)}, no object; {remedy}")
    if schema is not None:
        check_schema(found, schema, where, error=error, remedy=remedy)
    return found


def read_object_file(
    path: Path, schema: Any = None, *, error: type[FluxkilnError] = IntegrityError, remedy: str = _REMEDY,
    limits: DocumentLimits = DOCUMENT,
) -> dict[str, Any]:  # fmt: skip
    """The same of a regular file. FileNotFoundError is for the caller, who knows what its absence means."""
    return read_object(read_file(path, limits.nbytes, error, remedy), str(path), schema, error=error, remedy=remedy,
                       limits=limits)  # fmt: skip


def read_file(path: Path, most: int, error: type[FluxkilnError] = IntegrityError, remedy: str = _REMEDY) -> bytes:
    """The bytes of a regular file with at most `most`, or `error`; FileNotFoundError as `read_object_file`."""
    try:
        with open_regular(path) as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}; {remedy}") from fault
    if len(data) > most:
        raise error(f"{path} is larger than {most} bytes, the most that are read of it; {remedy}")
    return data


def check_schema(
    value: Json, schema: Any, where: str, *, error: type[FluxkilnError] = IntegrityError, remedy: str = _REMEDY
) -> None:
    """Compare a value with the type it must have; `error` names the first place that differs, its value and the rule.

    Args:
        schema: a TypedDict, say; what only it names is looked at.
    """
    import msgspec

    try:
        msgspec.convert(value, schema)
    except msgspec.ValidationError as fault:
        rule, _, place = str(fault).partition(" - at ")
        found = _shown(value, place.strip("`"))
        raise error(f"{where}{found}: {rule[:1].lower()}{rule[1:].replace('`', '')}; {remedy}") from fault


def _parse(data: bytes, limits: DocumentLimits) -> Json:
    if len(data) > limits.nbytes:
        raise ValueError(f"it has {len(data)} bytes, {limits.nbytes} are the most")
    # Commas and brackets of texts count too: an upper bound, found without making anything of what was sent.
    entries = sum(map(data.count, (b",", b"[", b"{")))
    if entries > limits.entries:
        raise ValueError(f"it has about {entries} entries, {limits.entries} are the most")

    def number(text: str) -> str:
        if len(text) > limits.digits:
            raise ValueError(f"a number has {len(text)} digits, {limits.digits} are the most")
        return text

    def finite(text: str) -> float:
        found = float(number(text))
        if not math.isfinite(found):
            raise ValueError(f"the number {text} is too large")
        return found

    parsed: Json = json.loads(
        data.decode(), object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=finite,
        parse_int=lambda text: int(number(text)),
    )  # fmt: skip
    if _SURROGATE.search(data):
        # Halves that stand alone have no UTF-8; what follows here writes them into files and answers.
        json.dumps(parsed, ensure_ascii=False).encode()
    _check_depth(parsed, limits.depth)
    return parsed


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    # Python's own parser takes the last of two equal keys: two readers could see two different documents.
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice[:80]!r} appears twice")
    return found


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _check_depth(value: Json, most: int) -> None:
    level, depth = [value], 1
    while level := [child for one in level if isinstance(one, dict | list) for child in _children(one)]:
        depth += 1
        if depth > most:
            raise ValueError(f"it has brackets {depth} deep, {most} are the most")


def _children(value: dict[str, Json] | list[Json]) -> list[Json]:
    return [child for child in (value.values() if isinstance(value, dict) else value) if isinstance(child, dict | list)]


def _kind(value: Json) -> str:
    names = {list: "list", str: "text", bool: "truth value", int: "number", float: "number"}
    return names.get(type(value), "null")


def _shown(value: Any, place: str) -> str:
    """` has num_layers = 'many'`: where a fault is and what is there, cut where it is long."""
    steps = [name or int(index) for name, index in _STEP.findall(place)]
    for step in steps:
        try:
            value = value[step]
        except (LookupError, TypeError):  # a key with a dot in it
            return f" at {place}"
    return f" has {place.removeprefix('$.')} = {str(value)[:80]!r}" if steps else ""
