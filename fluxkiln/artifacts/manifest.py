"""`manifest.json`: what a bundle is made of. Strict in both directions, and the same bytes for the same contents.

It holds no time, host or folder, so that an interrupted build ends with the same digests; those facts go into
`build.json`. Its paths come from other machines and are joined to a folder of this one. `digest` is over all its other
keys in their canonical form: a manifest that says something else is another one, and no bit of it flips unnoticed.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args, get_origin, get_type_hints

from fluxkiln.digests import DIGEST, Json, digest_json, digest_parsed, plain_json
from fluxkiln.documents import read_object
from fluxkiln.errors import IntegrityError, ShapeError, UsageError
from fluxkiln.types import Shapes, TensorSpec

SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
BUILD_FILE = "build.json"
MAX_NAME_BYTES = 255
MAX_PATH_BYTES = 1024

Role = Literal["binary", "weights", "tokenizer", "config", "constants", "licence", "doc"]

# First rule that fits decides.
_LICENCE_NAMES = ("license", "licence", "notice")
_ROLE_BY_FOLDER: Mapping[str, Role] = {"host": "constants"}
_ROLE_BY_SUFFIX: Mapping[str, Role] = {
    ".bmodel": "binary",
    ".neff": "binary",
    ".onnx": "binary",
    ".pb": "binary",
    ".gguf": "weights",
    ".safetensors": "weights",
    ".data": "weights",
    ".bin": "weights",
    ".npz": "constants",
    ".npy": "constants",
    ".md": "doc",
    ".html": "doc",
}

_DIGEST = (DIGEST, "'sha256:' and 64 lower-case hex digits")
# Fields whose texts have a form.
_HEX = (re.compile(r"[0-9a-f]{64}"), "64 lower-case hex digits")
_FORMS = {"digest": _DIGEST, "fingerprint": _DIGEST, "sha256": _HEX}


@dataclass(frozen=True, slots=True)
class PartEntry:
    """One compiled part: which net of which file it is, and the digest of its own binary before nets were combined."""

    name: str
    kind: str
    scheme: str
    file: str
    net: str
    digest: str
    size: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of the bundle; `sha256` is bare hex, as `sha256sum` prints it."""

    path: str
    role: Role
    sha256: str
    size: int

    @property
    def digest(self) -> str:
        return f"sha256:{self.sha256}"


@dataclass(frozen=True, slots=True)
class CheckpointEntry:
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
    """All of `manifest.json` but for its digest, which follows from the rest.

    `model` is the name of the model whose `variant` it is. `parts` are in the order they run; `settings` and `parity`
    are free JSON objects.
    """

    schema_version: int
    name: str
    target: str
    model: str
    variant: str
    shapes: Shapes
    checkpoint: CheckpointEntry
    licence: Licence
    settings: Mapping[str, Json]
    parity: Mapping[str, Json]
    tools: Mapping[str, str]
    parts: tuple[PartEntry, ...]
    files: tuple[FileEntry, ...]

    @property
    def digest(self) -> str:
        """`sha256:<hex>` over everything it says, whatever its spelling."""
        return digest_json(self._plain())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `parse_manifest` of its bytes gives an equal value."""
        plain: dict[str, Any] = json.loads(self.to_bytes())
        return plain

    def to_bytes(self) -> bytes:
        """The bytes of `manifest.json`: indented for people, one spelling for digests."""
        sealed = {"digest": self.digest, **self._plain()}
        return json.dumps(sealed, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n"

    def _plain(self) -> dict[str, Any]:
        free = {name: plain_json(getattr(self, name), name) for name in ("settings", "parity", "tools")}
        return {**asdict(self), **free}


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The manifest in the bytes of a `manifest.json`; errors as `parse_sealed`."""
    return parse_sealed(data, where)[0]


def parse_sealed(data: bytes, where: str) -> tuple[Manifest, str]:
    """Parse the bytes of a `manifest.json`: what it says, and its digest.

    Raises:
        UsageError: a schema version that this fluxkiln does not read.
        IntegrityError: no JSON, another digest than its own, a missing or unknown key, a value of the wrong type, an
            illegal path, a file whose role is not that of its name, a part or a licence in a file that is not listed.
    """
    value = read_object(data, where)
    _check_version(value, where)
    found = value.pop("digest", None)
    if found != (digest := digest_parsed(value)):
        raise _bad(where, f"says that its digest is {str(found)[:80]!r}, and what it says has {digest}")
    return manifest_from_json(value, where), digest


def manifest_from_json(value: Mapping[str, Json], where: str = "manifest") -> Manifest:
    """The manifest that a JSON object without `digest` describes; same errors as `parse_manifest`."""
    _check_version(value, where)
    manifest: Manifest = _read(Manifest, value, where)
    _check_references(manifest, where)
    return manifest


def _check_version(value: Mapping[str, Json], where: str) -> None:
    version = value.get("schema_version")
    if not isinstance(version, int) or isinstance(version, bool):
        raise _bad(where, f"has schema_version {version!r}; it must be a whole number")
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{where} has schema_version {version}, this fluxkiln reads {SCHEMA_VERSION}; use the fluxkiln that wrote "
            "it, or build the bundle again"
        )


def role_of(path: str) -> Role:
    """The role that a file's name and folder tell."""
    pure = PurePosixPath(path)
    if pure.name.lower().startswith(_LICENCE_NAMES):
        return "licence"
    if found := _ROLE_BY_FOLDER.get(pure.parts[0]) or _ROLE_BY_SUFFIX.get(pure.suffix):
        return found
    return "tokenizer" if any(name.startswith("tokenizer") for name in pure.parts) else "config"


def describe_manifest(manifest: Manifest, component_of: Callable[[str], str]) -> dict[str, Any]:
    """The summary that `fluxkiln inspect` shows: per kind and scheme how many parts and bytes, per role how many.

    Args:
        component_of: kind -> its component.
    """
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    known: set[tuple[str, str]] = set()
    for part in manifest.parts:
        empty = {"component": component_of(part.kind), "kind": part.kind, "scheme": part.scheme, "parts": 0, "size": 0}
        group = kinds.setdefault((part.kind, part.scheme), empty)
        group["parts"] += 1
        group["size"] += part.size * ((part.file, part.digest) not in known)  # those of several sizes share it
        known.add((part.file, part.digest))
    roles: dict[str, dict[str, int]] = {}
    for file in sorted(manifest.files, key=lambda file: file.role):
        role = roles.setdefault(file.role, {"files": 0, "size": 0})
        role["files"] += 1
        role["size"] += file.size
    return {"size": sum(file.size for file in manifest.files), "kinds": list(kinds.values()), "roles": roles}


def compare_manifests(one: Manifest, other: Manifest) -> dict[str, dict[str, Json]]:
    """The differences, grouped; a group is empty where nothing differs.

    Returns:
        `facts`: name, target, variant, shapes, checkpoint, licence. `settings`, `tools`, `parity`: by key. Each maps a
        name to {"from", "to"}; None stands for "not there". `parts`: {"added", "removed": names, "changed": name ->
        {what: {"from", "to"}}}. `files`: likewise, with sizes.
    """
    before, after = _comparable(one), _comparable(other)
    found = {group: _changes(before[group], after[group]) for group in ("facts", "settings", "tools", "parity")}
    for group in ("parts", "files"):
        old, new = before[group], after[group]
        found[group] = {
            "added": [name for name in new if name not in old],
            "removed": [name for name in old if name not in new],
            "changed": {n: _changes(old[n], new[n]) for n in old if n in new and old[n] != new[n]},
        }
    return found


def is_same(differences: Mapping[str, Mapping[str, Json]]) -> bool:
    """Whether `compare_manifests` found nothing."""
    return not any(any(group.values()) for group in differences.values())


def _comparable(manifest: Manifest) -> dict[str, dict[str, Any]]:
    shapes, checkpoint = manifest.shapes, manifest.checkpoint
    return {
        **manifest.to_json(),
        "facts": {
            "name": manifest.name,
            "target": manifest.target,
            "model": manifest.model,
            "variant": manifest.variant,
            "shapes": f"{shapes.width}x{shapes.height}, {shapes.tokens} tokens",
            "checkpoint": f"{checkpoint.source} {checkpoint.fingerprint}",
            "licence": manifest.licence.spdx,
        },
        "parts": {
            part.name: {"scheme": part.scheme, "digest": part.digest, "size": part.size, "file": part.file}
            for part in manifest.parts
        },
        "files": {file.path: {"digest": file.digest, "size": file.size, "role": file.role} for file in manifest.files},
    }


def _changes(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Json]:
    return {
        name: {"from": one.get(name), "to": other.get(name)} for name in one | other if one.get(name) != other.get(name)
    }


def validate_manifest_path(path: str) -> PurePosixPath:
    """The path as a relative POSIX path in its one spelling.

    Raises:
        IntegrityError: absolute, `..` or `.` in it, an empty name, a backslash, NUL or control character, a drive
            letter, a name too long, or one of the names the bundle keeps for itself.
    """
    if not path:
        raise _illegal(path, "is empty")
    if any(unicodedata.category(char) in ("Cc", "Cs") for char in path):
        raise _illegal(path, "holds a NUL, a control character or half a surrogate pair")
    if "\\" in path:
        raise _illegal(path, "holds a backslash")
    if path.startswith("/") or path[1:2] == ":":
        raise _illegal(path, "is absolute")
    names = path.split("/")
    if any(name in ("", ".", "..") for name in names):
        raise _illegal(path, "holds '..', '.' or an empty name")
    if len(path.encode()) > MAX_PATH_BYTES or any(len(name.encode()) > MAX_NAME_BYTES for name in names):
        raise _illegal(path, f"is longer than {MAX_PATH_BYTES} bytes, or a name in it longer than {MAX_NAME_BYTES}")
    if _folded(names[0]) in (MANIFEST_FILE, BUILD_FILE):
        raise _illegal(path, f"is a name the bundle keeps for itself ({MANIFEST_FILE}, {BUILD_FILE})")
    return PurePosixPath(path)


def validate_manifest_paths(paths: Iterable[str]) -> None:
    """Validate all paths; no two of them may be the same file on any file system.

    Raises IntegrityError: a path is not legal, two differ in case or Unicode form only, or one is a folder of another.
    """
    seen: dict[str, str] = {}
    for path in paths:
        validate_manifest_path(path)
        if (folded := _folded(path)) in seen:
            raise _illegal(path, f"is the same file as {seen[folded]!r} where case or Unicode form does not count")
        seen[folded] = path
    for path in seen.values():
        for parent in PurePosixPath(_folded(path)).parents:
            if str(parent) in seen:
                raise _illegal(path, f"lies in {seen[str(parent)]!r}, which is a file")


def resolve_inside(root: Path, path: str) -> Path:
    """`root / path` after validation; IntegrityError when a symbolic link on the way leads out of `root`."""
    joined = root / validate_manifest_path(path)
    if not joined.resolve().is_relative_to(root.resolve()):
        raise _illegal(path, f"leads out of {root} through a symbolic link")
    return joined


def _folded(path: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", path).casefold())


def _illegal(path: str, rule: str) -> IntegrityError:
    return IntegrityError(
        f"path {path!r} in a manifest {rule}; paths are relative, use '/', and stay inside the bundle. "
        "Do not use this manifest: fetch or build it again"
    )


def _check_references(manifest: Manifest, where: str) -> None:
    validate_manifest_paths(file.path for file in manifest.files)
    for file in manifest.files:
        if file.role != role_of(file.path):
            raise _bad(where, f"gives {file.path!r} the role {file.role}, its name is that of {role_of(file.path)}")
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


_hints = cache(get_type_hints)


def _read(kind: Any, value: Json, where: str, name: str = "") -> Any:
    """`value` as a `kind` of this module's annotations; `name` is its key in the object at `where`."""
    place = f"{where}: {name}" if name else where
    inner = get_args(kind)
    if kind is str:
        form, rule = _FORMS.get(name, (None, ""))
        if not isinstance(value, str) or not value:
            raise _bad(where, f"has {name} {value!r}; it must be a text that is not empty")
        if form and not form.fullmatch(value):
            raise _bad(where, f"has {name} {value!r}; it must be {rule}")
        return value
    if kind is int:
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise _bad(place, f"is {value!r}; it must be a whole number, not negative")
        return value
    if get_origin(kind) is Literal:
        if value not in inner:
            raise _bad(where, f"has the {name} {value!r}; the {name}s are {', '.join(inner)}")
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise _bad(place, f"is {value!r}; it must be a list{' of whole numbers' if inner[0] is int else ''}")
        return tuple(_read(inner[0], item, where, f"{name}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, Mapping):
        raise _bad(place, f"is {value!r}; it must be an object")
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return {key: _read(str, item, place, key) if inner[1] is str else item for key, item in value.items()}
    wanted = _hints(kind)
    if missing := [key for key in wanted if key not in value]:
        raise _bad(place, f"lacks {', '.join(missing)}")
    if unknown := sorted(set(value) - set(wanted)):
        raise _bad(place, f"has the unknown key {unknown[0]!r}; it may hold {', '.join(wanted)}")
    try:
        return kind(**{key: _read(hint, value[key], place, key) for key, hint in wanted.items()})
    except ShapeError as error:
        raise _bad(where, f"has illegal {name}: {error}") from error


def _bad(where: str, fault: str) -> IntegrityError:
    return IntegrityError(
        f"{where} {fault}; it was not written by this fluxkiln or was changed: build or fetch it again"
    )
