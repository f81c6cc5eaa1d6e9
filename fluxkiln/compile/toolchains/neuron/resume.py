"""A split model's bundle completed where there is a compiler, without its checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from fluxkiln.artifacts.actions import ActionCache
from fluxkiln.artifacts.bundle import read_manifest, role_of, verify_bundle
from fluxkiln.artifacts.manifest import MANIFEST_FILE, FileEntry, Manifest, resolve_inside
from fluxkiln.artifacts.store import Store
from fluxkiln.compile.jobs import JobPool
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchain import Resumed
from fluxkiln.compile.toolchains.neuron.compilation import compile_kinds
from fluxkiln.compile.toolchains.neuron.neff import (
    COMMAND,
    Neff,
    check_versions,
    neff_path,
    read_neffs,
    record_path,
)
from fluxkiln.compile.toolchains.neuron.neuronx_cc import compiler_missing, find_neuronx_cc
from fluxkiln.compile.toolchains.neuron.split_bundle import DESCRIPTION, bundle_jobs, read_split_bundle
from fluxkiln.errors import IntegrityError, ToolchainError
from fluxkiln.files import build_lock, digest_file, write_durably
from fluxkiln.progress import Progress


def resume_compile(bundle: Path, store: Store, progress: Progress, jobs: int | None = None) -> Resumed:
    """Compile the modules of a bundle that are not compiled yet, and name the results in its manifest.

    What `compile_neff.sh` left in the bundle is checked and taken over. The manifest is replaced last: killed before,
    the bundle is what it was, and the same call goes on.

    Raises:
        UsageError: no bundle of a split model. IntegrityError: a file of it was changed, or a compiled module is not
        what its record says. ToolchainError: no compiler, or modules of several versions. CompileError: it failed.
    """
    manifest = read_manifest(bundle)
    with build_lock(bundle.parent / f".{bundle.name}.resume.lock", f"the compile of {bundle}"):
        _check_files(bundle, manifest)
        split = read_split_bundle(bundle)
        target, modules = find_target(split.target), split.modules
        wanted = bundle_jobs(split)
        found = read_neffs(bundle, wanted, target, split.flags)
        if found.keys() != modules.keys():
            try:
                compiler = find_neuronx_cc()
            except ToolchainError as error:
                raise compiler_missing(str(error), bundle) from None
            if found:
                check_versions(found, compiler.version)
            missing = [job for job in wanted if job.name not in found]
            with JobPool[Neff](jobs) as pool:
                made = compile_kinds(pool, missing, compiler, target, ActionCache(store), bundle, split.flags, progress)
            compiled = {neff.name: neff for neff in made}
        else:
            compiled = {}
        version = check_versions({**found, **compiled})
        for log in (bundle / "neff").glob("*.log*"):  # of a failure that is mended now
            log.unlink()
        _rewrite(bundle, manifest, modules)
        verify_bundle(bundle)
    return Resumed(bundle, COMMAND, version, tuple(compiled), tuple(found))


def _check_files(bundle: Path, manifest: Manifest) -> None:
    """The modules and their description are what the manifest says; weights are not read for this."""
    for file in manifest.files:
        if file.path == DESCRIPTION or file.path.startswith("hlo/"):
            digest, _ = digest_file(resolve_inside(bundle, file.path))
            if digest != file.digest:
                raise IntegrityError(
                    f"{bundle / file.path} has the digest {digest}, the manifest says {file.digest}: it was changed; "
                    "build or fetch the bundle again"
                )


def _rewrite(bundle: Path, manifest: Manifest, modules: Iterable[str]) -> None:
    entries = {file.path: file for file in manifest.files if not file.path.startswith("neff/")}
    for name in modules:
        for path in (neff_path(bundle, name), record_path(bundle, name)):
            digest, size = digest_file(path)
            label = path.relative_to(bundle).as_posix()
            entries[label] = FileEntry(label, role_of(label), digest.removeprefix("sha256:"), size)
    files = tuple(entries[path] for path in sorted(entries))
    write_durably(bundle / MANIFEST_FILE, replace(manifest, files=files).to_bytes())
