"""A module on its way to a NEFF: its flags, and the record of what a NEFF was compiled from.

A NEFF (Neuron Executable File Format) lies at `neff/<name>.neff` of a build's folder, beside it `<name>.json` with the
module's digest, the flags, the compiler's version and its own digest, whichever machine it was compiled on.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fluxkiln.compile.targets import Target
from fluxkiln.documents import read_object_file
from fluxkiln.errors import IntegrityError, ToolchainError, UsageError
from fluxkiln.files import digest_file

COMMAND = "neuronx-cc"
SCRIPT = "compile_neff.sh"
HLO_SUFFIX = ".hlo_module.pb"
RECORD_SCHEMA = "fluxkiln.neff/1"
FlagPreset = Literal["default", "published"]
FLAG_PRESETS: tuple[FlagPreset, ...] = ("default", "published")
# what a module takes: token ids, an image or its latents [1, C, H, W], or neither
ModuleForm = Literal["text", "image", "blocks"]
FORMS: tuple[ModuleForm, ...] = ("text", "image", "blocks")
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class ModuleJob:
    """One module to compile.

    Attributes:
        name: of its files; `double`, or `double.4x` for a group. form: decides the flags.
        hlo: its canonical HLO module proto; digest: `sha256:<hex>` that this must have.
        memory: bytes that the compiler may take for it; a guess, as it is published nowhere.
    """

    name: str
    form: ModuleForm
    hlo: Path
    digest: str
    memory: int = 8 << 30

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise UsageError(f"module name {self.name!r}: files are named by it; use a-z, 0-9, '_', '.' and '-'")


@dataclass(frozen=True, slots=True)
class Neff:
    """A compiled module: what it was compiled from, by which compiler, and its own digest."""

    name: str
    hlo: str
    flags: tuple[str, ...]
    compiler: str
    digest: str
    hit: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record beside the file; as canonical JSON and a newline it is what `compile_neff.sh` writes."""
        made_of = {"compiler": self.compiler, "flags": list(self.flags), "hlo": self.hlo}
        return {**made_of, "name": self.name, "neff": self.digest, "schema": RECORD_SCHEMA}


def compile_flags(form: ModuleForm, target: Target, preset: FlagPreset = "default") -> tuple[str, ...]:
    """The flags that decide what the compiler makes of a module.

    `default`: no casts, the core optimisations (`-O1`), tuned for transformers, or for U-Nets where images are.
    `published`: what the published FLUX.1 sample for trn1 passes, the rest left to the compiler.

    `--lnc` is the target's. The CLI reference offers `--logical-nc-config` for trn2, where 2 is the default; logs of
    compiles for trn1 have `--lnc=1` all the same, and NCC_EARG001 says that it is the one legal value there. For inf2
    neither says anything, and it is left out.

    Raises:
        UsageError: no such form or preset.
    """
    if form not in FORMS:
        raise UsageError(f"no form of module is called {form!r}; there are {', '.join(FORMS)}")
    if preset not in FLAG_PRESETS:
        raise UsageError(f"no preset of compiler flags is called {preset!r}; there are {', '.join(FLAG_PRESETS)}")
    chip = f"--target={target.chip}"
    if preset == "published":
        published = "--enable-fast-loading-neuron-binaries" if form == "text" else "--model-type=unet-inference"
        return chip, published
    model_type = "unet-inference" if form == "image" else "transformer"
    lnc = (f"--lnc={target.lnc}",) if target.lnc else ()
    return chip, "--auto-cast=none", f"--model-type={model_type}", *lnc, "-O1"


def hlo_file(name: str) -> str:
    """The path of the module `name` in a bundle."""
    return f"hlo/{name}{HLO_SUFFIX}"


def neff_path(folder: Path, name: str) -> Path:
    """Where the compiled module `name` lies in a build's folder or a bundle."""
    return folder / "neff" / f"{name}.neff"


def record_path(folder: Path, name: str) -> Path:
    """The record of what it was compiled from."""
    return folder / "neff" / f"{name}.json"


def read_neffs(folder: Path, jobs: Sequence[ModuleJob], target: Target, preset: FlagPreset) -> dict[str, Neff]:
    """The compiled modules in `folder`, whoever compiled them: name -> what its record says, checked.

    Raises:
        IntegrityError: one has no record or other bytes than its record says, or is of another module or other flags.
    """
    found = {}
    for job in jobs:
        path = neff_path(folder, job.name)
        if not path.is_file() or path.is_symlink():
            continue
        neff = _read_record(folder, job.name)
        flags = compile_flags(job.form, target, preset)
        again = f"remove it and compile {job.name} again"
        if neff is None:
            raise IntegrityError(f"{path} has no record of what it was compiled from beside it; {again}")
        digest = digest_file(path)[0]
        if digest != neff.digest:
            raise IntegrityError(f"{path} has the digest {digest}, its record says {neff.digest}; {again}")
        if neff.hlo != job.digest:
            raise IntegrityError(f"{path} was compiled from the module {neff.hlo}, this one is {job.digest}; {again}")
        if neff.flags != flags:
            raise IntegrityError(f"{path} was compiled with {' '.join(neff.flags)}, not {' '.join(flags)}; {again}")
        found[job.name] = neff
    return found


def check_versions(neffs: Mapping[str, Neff], version: str | None = None) -> str:
    """The one compiler version of these modules.

    Raises:
        ToolchainError: they are of several versions, or of another than `version`; says which are which.
    """
    versions: dict[str, list[str]] = {}
    for neff in neffs.values():
        versions.setdefault(neff.compiler, []).append(neff.name)
    if set(versions) <= {version} or (version is None and len(versions) == 1):
        return version or next(iter(versions))
    found = "; ".join(f"{COMMAND} {found}: {', '.join(names)}" for found, names in sorted(versions.items()))
    wanted = f"{COMMAND} {version}" if version else "one version"
    raise ToolchainError(
        f"the compiled modules are not all of {wanted} ({found or 'there are none'}), and a NEFF of another version is "
        "never used; remove those and compile them again"
    )


def check_module(job: ModuleJob, path: Path) -> None:
    """Raise IntegrityError unless `path`, the module of `job` or a copy of it, has the digest it was lowered with."""
    try:
        found = digest_file(path)[0]
    except OSError as error:
        raise IntegrityError(f"the module {path} cannot be read ({error.strerror}); lower {job.name} again") from error
    if found != job.digest:
        raise IntegrityError(
            f"the module {path} has the digest {found}, {job.name} was lowered with {job.digest}: it was changed or "
            "damaged; lower it again"
        )


def finished_neff(job: ModuleJob, flags: tuple[str, ...], folder: Path) -> Neff | None:
    """The compiled module in `folder` and what is recorded of it, when that is just what `job` asks for."""
    neff = _read_record(folder, job.name)
    if neff is None or (neff.hlo, neff.flags) != (job.digest, flags):
        return None
    try:
        return neff if digest_file(neff_path(folder, job.name))[0] == neff.digest else None
    except OSError:
        return None


def _read_record(folder: Path, name: str) -> Neff | None:
    """The record of a compiled module, or None where there is none that can be read."""
    path = record_path(folder, name)
    try:
        record = read_object_file(path)
        neff = Neff(name, record["hlo"], tuple(record["flags"]), record["compiler"], record["neff"])
    except (FileNotFoundError, IntegrityError, KeyError, TypeError):
        return None
    return neff if record == neff.to_json() else None
