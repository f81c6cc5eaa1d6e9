"""`neuron.json`, which says what a bundle of a split model is: modules, the order of their parameters, every rank's
weights. It is written here by a build, and read where there is neither checkpoint nor compiler.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.bundle import HOST_CONSTANTS, Bundle, refuse_part
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.templates import host_constants, specs_from_json
from fluxkiln.compile.toolchains.neuron.hlo_module import entry_parameters
from fluxkiln.compile.toolchains.neuron.modules import Module, module_name
from fluxkiln.compile.toolchains.neuron.neff import FlagPreset, ModuleJob, hlo_file, neff_path, read_neffs
from fluxkiln.compile.toolchains.neuron.split import facts, shard_file
from fluxkiln.digests import Json, digest_json
from fluxkiln.documents import check_schema, read_object_file
from fluxkiln.errors import CompileError, IntegrityError, ToolchainError, UsageError
from fluxkiln.export.checkpoint import Checkpoint
from fluxkiln.settings import Settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

DESCRIPTION = "neuron.json"
_SCHEMA = "fluxkiln.neuron/1"
# safetensors' names for the dtypes of slots
_STORED = {"bfloat16": "BF16", "float32": "F32", "int32": "I32"}


_Spec = tuple[str, list[int], str]


class ModuleKeys(TypedDict):
    kind: str
    ranks: int
    hlo: str
    digest: str
    inputs: list[_Spec]
    slots: list[tuple[str, list[int], Literal["bfloat16", "float32", "int32"]]]
    outputs: list[_Spec]


class ShardKeys(TypedDict):
    file: str


class PartKeys(TypedDict):
    name: str
    module: str
    shards: list[ShardKeys]


class SplitBundleKeys(TypedDict):
    target: str
    instance: str
    tp_degree: int
    flags: FlagPreset
    modules: dict[str, ModuleKeys]
    parts: list[PartKeys]


@dataclass(frozen=True, slots=True)
class SplitBundle:
    """What `neuron.json` says. `part_modules` and `shards` are by part.

    A part's shards are in the order of ranks, the weights of each in the order of the module's slots.
    """

    folder: Path
    target: str
    instance: str
    tp_degree: int
    flags: FlagPreset
    modules: Mapping[str, Module]
    part_modules: Mapping[str, str]
    shards: Mapping[str, tuple[Path, ...]]

    def called(self, names: Mapping[str, str]) -> SplitBundle:
        """The parts that `names` gives other names: those of one of several sizes."""
        modules = {name: self.part_modules[own] for name, own in names.items()}
        return replace(self, part_modules=modules, shards={name: self.shards[own] for name, own in names.items()})

    def module_of(self, part: str) -> Module:
        """The module that runs `part`; UsageError with the parts that there are otherwise."""
        if part not in self.part_modules:
            raise UsageError(f"the bundle has no part {part!r}; it has {', '.join(self.part_modules)}")
        return self.modules[self.part_modules[part]]


def describe(
    checkpoint: Checkpoint,
    plan: Plan,
    settings: Settings,
    modules: Mapping[str, Module],
    shards: Mapping[str, Sequence[Blob]],
) -> bytes:
    """The file: modules with their parameters in order, parts in the order they run with the shards of each rank.

    A module's parameters are `inputs` and then `slots`, its result is a tuple of `outputs`. Rank r of a part runs its
    module with the tensors of `shards[r]`, which lie there in the order of `slots`.
    """
    described = {
        "schema": _SCHEMA,
        **facts(settings, plan),
        "target": plan.target.name,
        "modules": {
            name: {
                "kind": module.kind,
                "ranks": module.ranks,
                "hlo": hlo_file(name),
                "digest": module.digest,
                "neff": f"neff/{name}.neff",
                **{side: module.facts[side] for side in ("inputs", "slots", "outputs")},
                "collectives": {
                    "all-reduce": len(module.facts["all_reduce_bytes"]),
                    "all-gather": len(module.facts["all_gather_bytes"]),
                },
            }
            for name, module in modules.items()
        },
        "parts": [
            {
                "name": part.name,
                "module": module_name(part),
                "shards": [
                    {"file": shard_file(part.base, rank), "digest": blob.digest, "size": blob.size}
                    for rank, blob in enumerate(shards[part.base])
                ],
            }
            for part in plan.parts
        ],
        "modulation_rows": checkpoint.model.modulation_rows(checkpoint.configs),
        "host_constants": {"file": HOST_CONSTANTS, "names": sorted(host_constants(checkpoint, plan))},
    }
    return json.dumps(described, indent=1).encode() + b"\n"


def read_split_bundle(folder: Path) -> SplitBundle:
    """Read and check `neuron.json`; weights and modules are not opened.

    Raises:
        UsageError: the folder is no bundle of a split model, or of a schema that is not known here.
        IntegrityError: it contradicts itself: a part without a module, a module with another number of ranks than its
            part has shards, or a file that is not there.
    """
    path = folder / DESCRIPTION
    try:
        described = read_object_file(path)
    except FileNotFoundError as error:
        raise UsageError(f"{folder} has no {DESCRIPTION}, so it is no bundle for trn1 or inf2; give one") from error
    if (found := described.get("schema")) != _SCHEMA:
        raise UsageError(f"{path} has the schema {found!r:.80}, this fluxkiln reads {_SCHEMA}; build it again")
    check_schema(described, SplitBundleKeys, str(path))
    bundle = _parse(folder, described)
    _check(bundle)
    return bundle


def check_description(bundle: Bundle, fresh: Collection[str]) -> None:
    """See `compile.toolchain.Toolchain.check_parts`. A part's digest is over those of its module and its shards."""
    from fluxkiln.export.safetensors_header import read_header

    split, files = read_split_bundle(bundle.folder), {file.path: file for file in bundle.manifest.files}
    for name, here in (("target", bundle.target.name), *bundle.manifest.settings.items()):
        if getattr(split, name, here) != here:
            raise _differs(bundle, f"has the {name} {getattr(split, name)}, the manifest says {here}")
    if list(split.part_modules) != [part.name for part in bundle.parts]:
        raise _differs(bundle, f"has the parts {', '.join(split.part_modules)}, the manifest has others")
    for part, entry in zip(bundle.parts, bundle.manifest.parts, strict=True):
        module = split.module_of(part.name)
        shards = [shard_file(part.base, rank) for rank in range(module.ranks)]
        paths = [hlo_file(module.name), *shards]
        if module.name != module_name(part) or [module.hlo, *split.shards[part.name]] != [
            bundle.folder / path for path in paths
        ]:
            raise _differs(bundle, f"gives {part.name} the module {module.name} and files that are not its own")
        if odd := [path for path in paths if path not in files]:
            raise refuse_part(bundle, part.name, f"is made of {odd[0]}, which the manifest does not name")
        made_of: dict[str, Json] = {"hlo": module.digest, "shards": [files[shard].digest for shard in shards]}
        held = sum(files[shard].size for shard in shards)
        said = (entry.file, entry.net, entry.digest, entry.size, entry.inputs, entry.outputs, files[paths[0]].digest)
        if said != (paths[0], part.name, digest_json(made_of), held, module.inputs, module.outputs, module.digest):
            raise refuse_part(bundle, part.name, f"is not what {DESCRIPTION}, its module and its weights are")
        if paths[0] in fresh:
            _check_interface(bundle, module)
        slots = [(spec.name, spec.shape, _STORED[spec.dtype]) for spec in module.slots]
        for shard in shards:
            if shard in fresh:
                found = [(ref.name, ref.shape, ref.dtype) for ref in read_header(bundle.folder / shard).values()]
                if found != slots:
                    raise refuse_part(bundle, part.name, f"has other tensors in {shard} than its module has slots")
    if any(path.startswith("neff/") for path in files):
        find_compiled(split)


def _check_interface(bundle: Bundle, module: Module) -> None:
    try:
        found = [(spec.shape, spec.dtype) for spec in entry_parameters(module.hlo.read_bytes())]
    except CompileError as error:
        raise IntegrityError(f"{module.hlo}: {error}") from error
    if found != [(spec.shape, spec.dtype) for spec in (*module.inputs, *module.slots)]:
        raise _differs(bundle, f"gives the module {module.name} other inputs and slots than {module.hlo.name} has")


def _differs(bundle: Bundle, fault: str) -> IntegrityError:
    return IntegrityError(f"{bundle.folder / DESCRIPTION} {fault}; build or fetch the bundle again")


def read_module(module: Module) -> bytes:
    """The canonical HLO module proto; IntegrityError when it has another digest than the bundle says."""
    data = module.hlo.read_bytes()
    found = "sha256:" + hashlib.sha256(data).hexdigest()
    if found != module.digest:
        raise IntegrityError(
            f"{module.hlo} has the digest {found}, expected is {module.digest}; fetch the bundle again"
        )
    return data


def read_weights(bundle: SplitBundle) -> Callable[[str], list[list[NDArray[Any]]]]:
    """Reads the weights of a part: of each rank those of its module's slots, in order."""
    from fluxkiln.export.shard_files import read_shard

    return lambda part: [list(read_shard(shard).values()) for shard in bundle.shards[part]]


def bundle_jobs(bundle: SplitBundle) -> list[ModuleJob]:
    """What the compiler is to do for a bundle."""
    return [ModuleJob(name, module.form, module.hlo, module.digest) for name, module in bundle.modules.items()]


def find_compiled(bundle: SplitBundle) -> dict[str, Path]:
    """Module -> its NEFF, every one compiled from the module of this bundle.

    Raises:
        ToolchainError: not all modules are compiled. IntegrityError: as `read_neffs`.
    """
    found = read_neffs(bundle.folder, bundle_jobs(bundle), find_target(bundle.target), bundle.flags)
    if missing := [name for name in bundle.modules if name not in found]:
        raise ToolchainError(
            f"{bundle.folder} has no NEFF of {', '.join(missing)}: the bundle was made without neuronx-cc; run its "
            "compile_neff.sh or `fluxkiln compile --resume` on a machine with the Neuron SDK, or use --executor "
            "replicas, which runs the modules on XLA's CPU"
        )
    return {name: neff_path(bundle.folder, name) for name in bundle.modules}


def _parse(folder: Path, described: Mapping[str, Any]) -> SplitBundle:
    modules = {
        name: Module(
            name, one["kind"], one["ranks"], _inside(folder, one["hlo"]), one["digest"],
            specs_from_json(one["inputs"]), specs_from_json(one["slots"]), specs_from_json(one["outputs"]),
        )
        for name, one in described["modules"].items()
    }  # fmt: skip
    parts = {part["name"]: part for part in described["parts"]}
    shards = {name: tuple(_inside(folder, shard["file"]) for shard in part["shards"]) for name, part in parts.items()}
    return SplitBundle(
        folder, described["target"], described["instance"], described["tp_degree"], described["flags"], modules,
        {name: part["module"] for name, part in parts.items()}, shards,
    )  # fmt: skip


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
    modules = [module.hlo for module in bundle.modules.values()]
    for file in modules + [file for files in bundle.shards.values() for file in files]:
        if not file.is_file():
            raise IntegrityError(f"{file} does not exist, {where} names it; build or fetch the bundle again")


def _inside(folder: Path, name: str) -> Path:
    path = folder / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise IntegrityError(f"{folder / DESCRIPTION} names {name!r}, which is outside of the bundle; do not use it")
    return path
