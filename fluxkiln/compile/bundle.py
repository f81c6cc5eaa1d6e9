"""A bundle opened to be run: checked, its configs and constants read."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.bundle import read_manifest
from fluxkiln.artifacts.manifest import MANIFEST_FILE, FileEntry, Manifest, resolve_inside
from fluxkiln.compile.executor import Net
from fluxkiln.compile.targets import Target, find_target
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import digest_file
from fluxkiln.patches.model import Model
from fluxkiln.patches.registry import model_of_configs
from fluxkiln.progress import Progress, Silent
from fluxkiln.types import Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIGS = "configs.json"
HOST_CONSTANTS = "host/constants.safetensors"


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle that can be run without its checkpoint.

    Attributes:
        digest: `sha256:<hex>` of its manifest, which covers all files.
        configs: each component's `config.json`, keyed by its folder name.
        constants: what the host hands to the parts, by name.
    """

    folder: Path
    manifest: Manifest
    digest: str
    target: Target
    model: Model
    configs: Mapping[str, Mapping[str, Any]]
    constants: Mapping[str, NDArray[Any]]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All parts in the order they run."""
        return tuple(Part(entry.name, self.model.kinds[entry.kind]) for entry in self.manifest.parts)

    @property
    def nets(self) -> dict[str, Net]:
        """Part -> its net."""
        return {
            entry.name: Net(
                entry.name, self.model.kinds[entry.kind], resolve_inside(self.folder, entry.file), entry.net,
                entry.inputs, entry.outputs, entry.size,
            )
            for entry in self.manifest.parts
        }  # fmt: skip

    @property
    def takes_guidance(self) -> bool:
        return bool(self.configs["transformer"].get("guidance_embeds", False))


def open_bundle(folder: Path, progress: Progress | None = None) -> Bundle:
    """Check every file of a bundle against its manifest, and read what the host needs of it.

    Files that were found whole before, and have not been touched since, are not read again.

    Raises:
        UsageError: no bundle, or one without all components of a pipeline. IntegrityError: a file is missing or has
        other bytes than the manifest says.
    """
    from safetensors.numpy import load_file

    folder = folder.absolute()
    manifest = read_manifest(folder)
    digest = digest_file(folder / MANIFEST_FILE)[0]
    check_files(folder, manifest, digest, progress or Silent())
    configs = json.loads((folder / CONFIGS).read_bytes())
    model = model_of_configs(configs)
    check_kinds(manifest, model, folder)
    built = {model.kinds[entry.kind].component for entry in manifest.parts}
    if missing := [component for component in model.components if component not in built]:
        raise UsageError(
            f"{folder} has no {', '.join(missing)}: it was built with --components, and an image needs all of "
            f"{', '.join(model.components)}; build the whole model"
        )
    return Bundle(
        folder, manifest, digest, find_target(manifest.target), model, configs, load_file(folder / HOST_CONSTANTS)
    )


def check_kinds(manifest: Manifest, model: Model, folder: Path) -> None:
    """Raise IntegrityError when the variant or a part's kind is one that the model has not."""
    said = [("the model", "variant", manifest.variant, tuple(model.steps))]
    said += [(f"part {entry.name}", "kind", entry.kind, tuple(model.kinds)) for entry in manifest.parts]
    for what, key, value, known in said:
        if value not in known:
            raise IntegrityError(
                f"{folder / MANIFEST_FILE}: {what} is of the {key} {value!r}; {model.title} has the {key}s "
                f"{', '.join(known)}: build or fetch the bundle again"
            )


def check_files(folder: Path, manifest: Manifest, digest: str, progress: Progress) -> None:
    """Raise IntegrityError unless every file that the manifest names is there with the bytes it says."""
    known = _read_memo(folder, digest)
    states = {entry.path: _state(folder, entry) for entry in manifest.files}
    todo = [entry for entry in manifest.files if known.get(entry.path) != states[entry.path]]
    if not todo:
        return
    progress.stage("check", len(todo))
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1), "check") as threads:
        # largest first: no thread is left alone with it at the end
        ordered = sorted(todo, key=lambda entry: -entry.size)
        for entry, fault in zip(ordered, threads.map(partial(_fault, folder), ordered), strict=True):
            if fault:
                threads.shutdown(cancel_futures=True)
                raise IntegrityError(f"{folder / entry.path} {fault}; build or fetch the bundle again")
            progress.done("check", entry.path, "as the manifest says")
    _write_memo(folder, digest, states)


def _state(folder: Path, entry: FileEntry) -> list[int]:
    path = resolve_inside(folder, entry.path)
    try:
        found = path.lstat()
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}; build or fetch the bundle again") from error
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _fault(folder: Path, entry: FileEntry) -> str:
    path = folder / entry.path
    if path.is_symlink() or not path.is_file():
        return "is not a regular file"
    size = path.stat().st_size
    if size != entry.size:
        return f"has {size} bytes, the manifest says {entry.size}"
    found = digest_file(path)[0]
    return "" if found == entry.digest else f"has the digest {found}, the manifest says {entry.digest}"


def _memo(folder: Path, digest: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(f"{folder}\n{digest}".encode()).hexdigest()[:32]
    return cache / "fluxkiln" / "checked" / f"{name}.json"


def _read_memo(folder: Path, digest: str) -> dict[str, list[int]]:
    try:
        found = json.loads(_memo(folder, digest).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write_memo(folder: Path, digest: str, states: Mapping[str, list[int]]) -> None:
    path = _memo(folder, digest)
    # without a cache the next call reads the files again
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{os.getpid()}")
        partial_path.write_text(json.dumps(states))
        partial_path.replace(path)
