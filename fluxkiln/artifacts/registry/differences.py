"""What differs between two bundles, from their manifests alone."""

from __future__ import annotations

from collections.abc import Mapping

from fluxkiln.artifacts.manifest import Manifest
from fluxkiln.digests import Json, plain_json


def compare_manifests(one: Manifest, other: Manifest) -> dict[str, Json]:
    """The differences, grouped; a group is empty where nothing differs.

    Returns:
        `facts`: name, target, variant, shapes, checkpoint, licence. `settings`, `tools`, `parity`: by key. Each maps a
        name to {"from", "to"}; None stands for "not there". `parts`: {"added", "removed": names, "changed": name ->
        {what: {"from", "to"}}}. `files`: likewise, with sizes.
    """
    return {
        "facts": _changes(_facts(one), _facts(other)),
        "settings": _changes(one.settings, other.settings),
        "tools": _changes(dict(one.tools), dict(other.tools)),
        "parity": _changes(one.parity, other.parity),
        "parts": _items(_parts(one), _parts(other)),
        "files": _items(_files(one), _files(other)),
    }


def is_same(differences: Mapping[str, Json]) -> bool:
    """Whether `compare_manifests` found nothing."""
    groups = [differences[name] for name in ("facts", "settings", "tools", "parity")]
    for name in ("parts", "files"):
        group = differences[name]
        assert isinstance(group, Mapping)
        groups += group.values()
    return not any(groups)


def _facts(manifest: Manifest) -> dict[str, Json]:
    shapes = manifest.shapes
    return {
        "name": manifest.name,
        "target": manifest.target,
        "variant": manifest.variant,
        "shapes": f"{shapes.width}x{shapes.height}, {shapes.tokens} tokens",
        "checkpoint": f"{manifest.checkpoint.source} {manifest.checkpoint.fingerprint}",
        "licence": manifest.licence.spdx,
    }


def _parts(manifest: Manifest) -> dict[str, dict[str, Json]]:
    return {
        part.name: {"scheme": part.scheme, "digest": part.digest, "size": part.size, "file": part.file}
        for part in manifest.parts
    }


def _files(manifest: Manifest) -> dict[str, dict[str, Json]]:
    return {file.path: {"digest": file.digest, "size": file.size, "role": file.role} for file in manifest.files}


def _changes(one: Mapping[str, Json], other: Mapping[str, Json]) -> dict[str, Json]:
    plain, plain_other = plain_json(one), plain_json(other)
    assert isinstance(plain, dict)
    assert isinstance(plain_other, dict)
    return {
        name: {"from": plain.get(name), "to": plain_other.get(name)}
        for name in [*plain, *(name for name in plain_other if name not in plain)]
        if plain.get(name) != plain_other.get(name)
    }


def _items(one: Mapping[str, Mapping[str, Json]], other: Mapping[str, Mapping[str, Json]]) -> dict[str, Json]:
    return {
        "added": [name for name in other if name not in one],
        "removed": [name for name in one if name not in other],
        "changed": {
            name: _changes(one[name], other[name]) for name in one if name in other and one[name] != other[name]
        },
    }
