"""JSON in one spelling, so that equal values have equal digests; `documents` reads what others wrote."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import TypeAlias

Json: TypeAlias = "bool | int | float | str | list[Json] | tuple[Json, ...] | Mapping[str, Json] | None"

DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def canonical_json(value: Json) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: the same bytes whatever the order of the mappings was.

    Raises:
        TypeError: something in `value` is no JSON (a path, a set, a key that is not a string).
        ValueError: a NaN or an infinity.
    """
    return _encode(plain_json(value))


def digest_bytes(data: bytes) -> str:
    """`sha256:<hex>` of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def digest_parsed(value: Json) -> str:
    """The same digest as `digest_json`, of what a JSON parser made: nothing in it has to be looked at first."""
    return digest_bytes(_encode(value))


def _encode(plain: Json) -> bytes:
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest_json(value: Json) -> str:
    """`sha256:<hex>` of the canonical JSON of `value`."""
    return digest_bytes(canonical_json(value))


def seal(value: Mapping[str, Json], name: str = "digest") -> dict[str, Json]:
    """The object with the digest of all its other keys as `name`; `is_sealed` tells whether it still has it."""
    rest = {key: item for key, item in value.items() if key != name}
    return {**rest, name: digest_json(rest)}


def is_sealed(value: Mapping[str, Json], name: str = "digest") -> bool:
    """Whether an object is as `seal` made it."""
    return value.get(name) == seal(value, name)[name]


def plain_json(value: Json, where: str = "value") -> Json:
    """A copy made of dicts and lists only, with sorted keys; TypeError or ValueError names what is no JSON."""
    if isinstance(value, Mapping):
        for key in value:
            # json.dumps would turn 1 into "1": two different mappings, one digest.
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r}; keys must be strings")
        return {key: plain_json(value[key], f"{where}.{key}") for key in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}; JSON has finite numbers only")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; only JSON values are allowed")
