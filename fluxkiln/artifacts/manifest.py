"""`manifest.json`: what a bundle is made of. Strict in both directions, and the same bytes for the same contents.

It holds no time, host or folder: an interrupted build that is run again must end with the digests of one that was
not. Those facts go into `build.json`, which no digest covers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from fluxkiln.artifacts.paths import validate_manifest_paths
from fluxkiln.artifacts.store import read_object
from fluxkiln.digests import Json, plain_json
from fluxkiln.errors import IntegrityError, ShapeError, UsageError
from fluxkiln.types import Shapes, TensorSpec

SCHEMA_VERSION = 1

Role = Literal["binary", "weights", "tokenizer", "config", "constants", "licence", "doc"]

_T = TypeVar("_T")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class PartEntry:
    """One compiled part: which net of which file it is, and the digest of its own binary before nets were combined."""

    name: str
    kind: str
    scheme: str
    file: str
    net: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    digest: str
    size: int


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle; `sha256` is bare hex, as `sha256sum` prints it."""

    path: str
    sha256: str
    size: int
    role: Role

    @property
    def digest(self) -> str:
        return f"sha256:{self.sha256}"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where the weights came from: a preset, a hub id or a folder's last name, and a digest over all tensors."""

    source: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Licence:
    """The model's licence: SPDX expression, and the file of the bundle that holds its text."""

    spdx: str
    file: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of `manifest.json`. `parts` are in the order they run; `settings` and `parity` are free JSON objects."""

    schema_version: int
    name: str
    target: str
    variant: str
    shapes: Shapes
    checkpoint: Checkpoint
    licence: Licence
    settings: Mapping[str, Json]
    parity: Mapping[str, Json]
    tools: Mapping[str, str]
    parts: tuple[PartEntry, ...]
    files: tuple[FileEntry, ...]

    def to_json(self) -> dict[str, Json]:
        """Plain JSON; `parse_manifest` of its bytes gives an equal value."""
        return {
            "schema_version": self.schema_version,
            "name": self.name,
            "target": self.target,
            "variant": self.variant,
            "shapes": {"height": self.shapes.height, "width": self.shapes.width, "tokens": self.shapes.tokens},
            "checkpoint": {"source": self.checkpoint.source, "fingerprint": self.checkpoint.fingerprint},
            "licence": {"spdx": self.licence.spdx, "file": self.licence.file},
            "settings": plain_json(self.settings, "settings"),
            "parity": plain_json(self.parity, "parity"),
            "tools": dict(sorted(self.tools.items())),
            "parts": [
                {
                    "name": part.name,
                    "kind": part.kind,
                    "scheme": part.scheme,
                    "file": part.file,
                    "net": part.net,
                    "digest": part.digest,
                    "size": part.size,
                    "inputs": [_spec_to_json(spec) for spec in part.inputs],
                    "outputs": [_spec_to_json(spec) for spec in part.outputs],
                }
                for part in self.parts
            ],
            "files": [{"path": f.path, "role": f.role, "sha256": f.sha256, "size": f.size} for f in self.files],
        }

    def to_bytes(self) -> bytes:
        """The bytes of `manifest.json`: indented for people, one spelling for digests."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Parse the bytes of a `manifest.json`.

    Raises:
        UsageError: a schema version that this fluxkiln does not read.
        IntegrityError: no JSON, a missing or unknown key, a value of the wrong type, an illegal path, a part or a
            licence in a file that is not listed.
    """
    return manifest_from_json(read_object(data, where), where)


def manifest_from_json(value: Mapping[str, Json], where: str = "manifest") -> Manifest:
    """The manifest that a JSON object describes; same errors as `parse_manifest`."""
    version = value.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise _bad(where, f"has schema_version {version!r}; it must be a whole number")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{where} has schema_version {version}, this fluxkiln reads {SCHEMA_VERSION}; use the fluxkiln that wrote "
            "it, or build the bundle again"
        )
    _keys(value, where, Manifest.__slots__)
    shapes = _object(value["shapes"], f"{where}: shapes")
    checkpoint = _object(value["checkpoint"], f"{where}: checkpoint")
    licence = _object(value["licence"], f"{where}: licence")
    _keys(shapes, f"{where}: shapes", Shapes.__slots__)
    _keys(checkpoint, f"{where}: checkpoint", Checkpoint.__slots__)
    _keys(licence, f"{where}: licence", Licence.__slots__)
    tools = _object(value["tools"], f"{where}: tools")
    try:
        sizes = Shapes(*(_count(shapes, name, f"{where}: shapes") for name in ("height", "width", "tokens")))
    except ShapeError as error:
        raise _bad(where, f"has illegal shapes: {error}") from error
    manifest = Manifest(
        schema_version=version,
        name=_text(value, "name", where),
        target=_text(value, "target", where),
        variant=_text(value, "variant", where),
        shapes=sizes,
        checkpoint=Checkpoint(
            _text(checkpoint, "source", f"{where}: checkpoint"), _digest(checkpoint, "fingerprint", where)
        ),
        licence=Licence(_text(licence, "spdx", f"{where}: licence"), _text(licence, "file", f"{where}: licence")),
        settings=_object(value["settings"], f"{where}: settings"),
        parity=_object(value["parity"], f"{where}: parity"),
        tools={name: _text(tools, name, f"{where}: tools") for name in tools},
        parts=_each(value["parts"], f"{where}: parts", _part),
        files=_each(value["files"], f"{where}: files", _file),
    )
    _check_references(manifest, where)
    return manifest


def describe_manifest(manifest: Manifest, component_of: Callable[[str], str]) -> dict[str, Json]:
    """The summary that `fluxkiln inspect` shows: per kind and scheme how many parts and bytes, per role how many.

    Args:
        component_of: kind -> its component.
    """
    groups: dict[tuple[str, str, str], list[int]] = {}
    for part in manifest.parts:
        group = groups.setdefault((component_of(part.kind), part.kind, part.scheme), [0, 0])
        group[0] += 1
        group[1] += part.size
    roles: dict[str, list[int]] = {}
    for file in manifest.files:
        role = roles.setdefault(file.role, [0, 0])
        role[0] += 1
        role[1] += file.size
    described = manifest.to_json()
    del described["parts"]
    return {
        **described,
        "parts": len(manifest.parts),
        "size": sum(file.size for file in manifest.files),
        "kinds": [
            {"component": component, "kind": kind, "scheme": scheme, "parts": count, "size": size}
            for (component, kind, scheme), (count, size) in groups.items()
        ],
        "roles": {role: {"files": count, "size": size} for role, (count, size) in sorted(roles.items())},
    }


def _check_references(manifest: Manifest, where: str) -> None:
    validate_manifest_paths(file.path for file in manifest.files)
    files = {file.path for file in manifest.files}
    names: set[str] = set()
    nets: set[tuple[str, str]] = set()
    for part in manifest.parts:
        if part.name in names or (part.file, part.net) in nets:
            raise _bad(where, f"names the part {part.name} or its net {part.net!r} of {part.file} twice")
        names.add(part.name)
        nets.add((part.file, part.net))
        if part.file not in files:
            raise _bad(where, f"says that part {part.name} is in {part.file!r}, which is not among its files")
    if manifest.licence.file not in files:
        raise _bad(where, f"names the licence text {manifest.licence.file!r}, which is not among its files")


def _part(value: Mapping[str, Json], where: str) -> PartEntry:
    _keys(value, where, PartEntry.__slots__)
    return PartEntry(
        name=_text(value, "name", where),
        kind=_text(value, "kind", where),
        scheme=_text(value, "scheme", where),
        file=_text(value, "file", where),
        net=_text(value, "net", where),
        inputs=_each(value["inputs"], f"{where}: inputs", _spec),
        outputs=_each(value["outputs"], f"{where}: outputs", _spec),
        digest=_digest(value, "digest", where),
        size=_count(value, "size", where),
    )


def _file(value: Mapping[str, Json], where: str) -> FileEntry:
    _keys(value, where, FileEntry.__slots__)
    role, sha256 = _text(value, "role", where), _text(value, "sha256", where)
    if not _SHA256.fullmatch(sha256):
        raise _bad(where, f"has sha256 {sha256!r}; it must be 64 lower-case hex digits")
    for known in get_args(Role):
        if role == known:
            return FileEntry(_text(value, "path", where), sha256, _count(value, "size", where), known)
    raise _bad(where, f"has the role {role!r}; the roles are {', '.join(get_args(Role))}")


def _spec(value: Mapping[str, Json], where: str) -> TensorSpec:
    _keys(value, where, TensorSpec.__slots__)
    shape = value["shape"]
    if not isinstance(shape, list | tuple):
        raise _bad(where, f"has shape {shape!r}; it must be a list of whole numbers")
    sizes = tuple(_whole(size, f"{where}: shape") for size in shape)
    return TensorSpec(_text(value, "name", where), sizes, _text(value, "dtype", where))


def _spec_to_json(spec: TensorSpec) -> Json:
    return {"name": spec.name, "shape": list(spec.shape), "dtype": spec.dtype}


def _keys(value: Mapping[str, Json], where: str, wanted: tuple[str, ...]) -> None:
    if missing := [key for key in wanted if key not in value]:
        raise _bad(where, f"lacks {', '.join(missing)}")
    if unknown := sorted(set(value) - set(wanted)):
        raise _bad(where, f"has the unknown key {unknown[0]!r}; it may hold {', '.join(wanted)}")


def _object(value: Json, where: str) -> Mapping[str, Json]:
    if not isinstance(value, Mapping):
        raise _bad(where, f"is {value!r}; it must be an object")
    return value


def _each(value: Json, where: str, parse: Callable[[Mapping[str, Json], str], _T]) -> tuple[_T, ...]:
    if not isinstance(value, list | tuple):
        raise _bad(where, f"is {value!r}; it must be a list")
    return tuple(parse(_object(item, f"{where}[{i}]"), f"{where}[{i}]") for i, item in enumerate(value))


def _text(value: Mapping[str, Json], key: str, where: str) -> str:
    found = value[key]
    if not isinstance(found, str) or not found:
        raise _bad(where, f"has {key} {found!r}; it must be a text that is not empty")
    return found


def _count(value: Mapping[str, Json], key: str, where: str) -> int:
    return _whole(value[key], f"{where}: {key}")


def _whole(value: Json, where: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise _bad(where, f"is {value!r}; it must be a whole number, not negative")
    return value


def _digest(value: Mapping[str, Json], key: str, where: str) -> str:
    found = _text(value, key, where)
    if not _SHA256.fullmatch(found.removeprefix("sha256:")) or not found.startswith("sha256:"):
        raise _bad(where, f"has {key} {found!r}; it must be 'sha256:' and 64 lower-case hex digits")
    return found


def _bad(where: str, fault: str) -> IntegrityError:
    return IntegrityError(
        f"{where} {fault}; it was not written by this fluxkiln or was changed: build or fetch it again"
    )
