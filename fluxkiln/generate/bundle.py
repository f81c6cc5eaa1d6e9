"""A bundle opened to be run: checked, its configs and constants read, and an executor for its target."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fluxkiln.artifacts.bundle import read_manifest
from fluxkiln.artifacts.manifest import FileEntry, Manifest
from fluxkiln.artifacts.paths import HOST_CONSTANTS, MANIFEST_FILE, resolve_inside
from fluxkiln.compile.executor import Executor, Net
from fluxkiln.compile.target import Target
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchain import Opened, find_toolchain
from fluxkiln.errors import IntegrityError, UsageError
from fluxkiln.files import digest_file
from fluxkiln.patches.model import Model
from fluxkiln.patches.registry import model_of_configs
from fluxkiln.progress import Progress, Silent
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.types import Kind, Part

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIGS = "configs.json"
# toolchain -> its executors, the default first
EXECUTORS: Mapping[str, tuple[str, ...]] = {
    "onnxruntime": ("ort",),
    "tpu_mlir": ("cmodel", "sail"),
    "neuron": ("neuron", "replicas"),
}


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
    check_kinds(manifest, model.kinds, folder)
    built = {model.kinds[entry.kind].component for entry in manifest.parts}
    if missing := [component for component in model.components if component not in built]:
        raise UsageError(
            f"{folder} has no {', '.join(missing)}: it was built with --components, and an image needs all of "
            f"{', '.join(model.components)}; build the whole model"
        )
    return Bundle(
        folder, manifest, digest, find_target(manifest.target), model, configs, load_file(folder / HOST_CONSTANTS)
    )


def check_kinds(manifest: Manifest, kinds: Mapping[str, Kind], folder: Path) -> None:
    """Raise IntegrityError when a part is of a kind that the model has not."""
    for entry in manifest.parts:
        if entry.kind not in kinds:
            raise IntegrityError(
                f"{folder / MANIFEST_FILE}: part {entry.name} is of the kind {entry.kind!r}; the kinds are "
                f"{', '.join(kinds)}: build or fetch the bundle again"
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


def choose_executor(bundle: Bundle, name: str | None = None) -> str:
    """The executor called `name`, or the default for the bundle: what it is compiled for, else what can stand in.

    Raises:
        UsageError: no such executor, or it cannot run this target.
    """
    legal = EXECUTORS[bundle.target.toolchain]
    if name is None:
        compiled = bundle.target.toolchain != "neuron" or (bundle.folder / "neff").is_dir()
        return legal[0] if compiled else "replicas"
    if name not in legal:
        known = [one for names in EXECUTORS.values() for one in names]
        rule = f"a bundle for {bundle.target.name} is run by {' or '.join(legal)}"
        raise UsageError(
            f"executor {name}: {rule}" + ("" if name in known else f"; there are {', '.join(known)} in all")
        )
    return name


def open_executor(
    bundle: Bundle, name: str | None = None, *, threads: int = 0, device: int = 0, fast: bool = False
) -> Executor:
    """What runs a bundle's parts.

    Args:
        name: of EXECUTORS; by default as `choose_executor`.
        threads: of `ort`; 0 leaves it to ONNX Runtime. device: of `sail`.
        fast: of `ort` with packed weights; activations are rounded to 8 bits (see `compile/onnx/fast.py`).

    Raises:
        UsageError: it cannot run this bundle, or not so. ToolchainError: its library, device or compiled files are
        missing.
    """
    chosen = choose_executor(bundle, name)
    nets = list_nets(bundle)
    manifest = bundle.manifest
    packed = sorted({entry.scheme for entry in manifest.parts if parse_scheme(entry.scheme).weight_bits})
    if fast and (chosen != "ort" or not packed):
        raise UsageError(
            f"--fast: it is for packed weights (W4BF16) on ort, and this is {chosen} with "
            f"{', '.join(packed) or 'no packed weights'}; leave it out"
        )
    if chosen == "ort":
        from fluxkiln.compile.toolchains.onnxruntime.executor import OrtExecutor

        return OrtExecutor(nets, threads=threads, fast=fast)
    if chosen == "cmodel":
        from fluxkiln.compile.toolchains.tpu_mlir.cmodel import CmodelExecutor

        schemes = {entry.name: entry.scheme for entry in manifest.parts}
        return CmodelExecutor(nets, bundle.target.chip, bundle.model, manifest.shapes, schemes)
    if chosen == "sail":
        from fluxkiln.compile.toolchains.tpu_mlir.sail import SailExecutor

        return SailExecutor(nets, device)
    opened = Opened(bundle.folder, manifest, bundle.target, bundle.model, bundle.parts, nets)
    return find_toolchain("neuron").open_executor(opened, chosen, {"fast": fast})


def list_nets(bundle: Bundle) -> dict[str, Net]:
    """Part -> its net."""
    return {
        entry.name: Net(
            entry.name, bundle.model.kinds[entry.kind], resolve_inside(bundle.folder, entry.file), entry.net,
            entry.inputs, entry.outputs, entry.size,
        )
        for entry in bundle.manifest.parts
    }  # fmt: skip


def components_to_release(bundle: Bundle) -> tuple[str, ...]:
    """The text encoders: nothing of them is needed once the prompts are encoded."""
    return tuple(bundle.model.tokenizers)


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
    import hashlib

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = path.with_suffix(f".{os.getpid()}")
        partial_path.write_text(json.dumps(states))
        partial_path.replace(path)
    except OSError:
        return  # without a cache the next call reads the files again
