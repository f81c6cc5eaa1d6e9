"""Reading a split model's bundle back: its modules, the order of their parameters, every rank's weights.

No checkpoint and no compiler is needed for it. The runtime that executes what is read is `executors.neuron`, written
from the documentation of AWS's nrtpy, or `executors.replicas` where there is no device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxkiln.compile.toolchains.neuron.neff import Preset, neff_path, record_path
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.types import TensorSpec

DESCRIPTION = "neuron.json"
SCHEMA = "fluxkiln.neuron/1"


@dataclass(frozen=True, slots=True)
class SplitModule:
    """A module of a bundle. Its parameters are `inputs` and then `slots`, its result is a tuple of `outputs`."""

    name: str
    kind: str
    ranks: int
    hlo: Path
    digest: str
    inputs: tuple[TensorSpec, ...]
    slots: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def parameters(self) -> tuple[TensorSpec, ...]:
        return self.inputs + self.slots


@dataclass(frozen=True, slots=True)
class ShardRef:
    """The weights of one rank of one part, in the order of its module's slots; `sha256` is bare hex."""

    path: Path
    sha256: str


@dataclass(frozen=True, slots=True)
class SplitBundle:
    """What `neuron.json` says. `part_modules` and `shards` are by part, shards of a part in the order of ranks."""

    folder: Path
    target: str
    instance: str
    tp_degree: int
    flags: Preset
    modules: Mapping[str, SplitModule]
    part_modules: Mapping[str, str]
    shards: Mapping[str, tuple[ShardRef, ...]]

    def module_of(self, part: str) -> SplitModule:
        """The module that runs `part`; UsageError with the parts that there are otherwise."""
        if part not in self.part_modules:
            raise UsageError(f"the bundle has no part {part!r}; it has {', '.join(self.part_modules)}")
        return self.modules[self.part_modules[part]]


def read_split_bundle(folder: Path) -> SplitBundle:
    """Read and check `neuron.json`; weights and modules are not opened.

    Raises:
        UsageError: the folder is no bundle of a split model, or of a schema that is not known here.
        IntegrityError: it contradicts itself: a part without a module, a module with another number of ranks than its
            part has shards, or a file that is not there.
    """
    path = folder / DESCRIPTION
    try:
        described = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise UsageError(f"{folder} has no {DESCRIPTION}, so it is no bundle for trn1 or inf2; give one") from error
    except ValueError as error:
        raise IntegrityError(f"{path} is no JSON ({error}); build or fetch the bundle again") from error
    if not isinstance(described, dict) or described.get("schema") != SCHEMA:
        found = described.get("schema") if isinstance(described, dict) else described
        raise UsageError(f"{path} has the schema {found!r}, this fluxkiln reads {SCHEMA}; build it again")
    try:
        bundle = _parse(folder, described)
    except (KeyError, TypeError, ValueError) as error:
        raise IntegrityError(
            f"{path} lacks {error} or has it in another form; it was not written by this fluxkiln or was changed: "
            "build or fetch it again"
        ) from error
    _check(bundle)
    return bundle


def read_module(module: SplitModule) -> bytes:
    """The canonical HLO module proto; IntegrityError when it has another digest than the bundle says."""
    data = module.hlo.read_bytes()
    found = "sha256:" + hashlib.sha256(data).hexdigest()
    if found != module.digest:
        raise IntegrityError(
            f"{module.hlo} has the digest {found}, expected is {module.digest}; fetch the bundle again"
        )
    return data


def find_compiled(bundle: SplitBundle) -> dict[str, Path]:
    """Module -> its NEFF, every one compiled from the module of this bundle.

    Raises:
        ToolchainError: not all modules are compiled.
        IntegrityError: a NEFF is not what its record says, or was compiled from another module.
    """
    missing = [name for name in bundle.modules if not neff_path(bundle.folder, name).is_file()]
    if missing:
        raise ToolchainError(
            f"{bundle.folder} has no NEFF of {', '.join(missing)}: the bundle was made without neuronx-cc; run its "
            "compile_neff.sh or `fluxkiln compile --resume` on a machine with the Neuron SDK, or use --executor "
            "replicas, which runs the modules on XLA's CPU"
        )
    found = {}
    for name, module in bundle.modules.items():
        path = neff_path(bundle.folder, name)
        try:
            record = json.loads(record_path(bundle.folder, name).read_bytes())
            source, digest = record["hlo"], record["neff"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"{path} has no readable record beside it ({error}); compile it again") from error
        with path.open("rb") as file:
            own = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        if own != digest or source != module.digest:
            what = f"has the digest {own}, its record says {digest}" if own != digest else f"was compiled from {source}"
            raise IntegrityError(f"{path} {what}, this bundle's module is {module.digest}; compile it again")
        found[name] = path
    return found


def _parse(folder: Path, described: Mapping[str, Any]) -> SplitBundle:
    modules = {
        name: SplitModule(
            name, one["kind"], int(one["ranks"]), _inside(folder, one["hlo"]), one["digest"],
            _specs(one["inputs"]), _specs(one["slots"]), _specs(one["outputs"]),
        )
        for name, one in described["modules"].items()
    }  # fmt: skip
    parts = {part["name"]: part for part in described["parts"]}
    return SplitBundle(
        folder,
        described["target"],
        described["instance"],
        int(described["tp_degree"]),
        described["flags"],
        modules,
        {name: part["module"] for name, part in parts.items()},
        {
            name: tuple(
                ShardRef(_inside(folder, shard["file"]), shard["digest"].removeprefix("sha256:"))
                for shard in part["shards"]
            )
            for name, part in parts.items()
        },
    )


def _check(bundle: SplitBundle) -> None:
    where = bundle.folder / DESCRIPTION
    for part, name in bundle.part_modules.items():
        if name not in bundle.modules:
            raise IntegrityError(f"{where} has no module {name!r} for part {part}; build or fetch the bundle again")
        ranks, shards = bundle.modules[name].ranks, len(bundle.shards[part])
        if ranks != shards:
            raise IntegrityError(
                f"{where}: part {part} has {shards} shards, its module {name} runs on {ranks} ranks; fetch it again"
            )
    files = [module.hlo for module in bundle.modules.values()]
    for file in files + [shard.path for refs in bundle.shards.values() for shard in refs]:
        if not file.is_file():
            raise IntegrityError(f"{file} does not exist, {where} names it; build or fetch the bundle again")


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise IntegrityError(f"{folder / DESCRIPTION} names {name!r}, which is outside of the bundle; do not use it")
    return path


def _specs(entries: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, tuple(shape), dtype) for name, shape, dtype in entries)
