"""Bundles opened: the one way by which every command gets at one, so that none takes what another refuses."""

from __future__ import annotations

from pathlib import Path

from fluxkiln.artifacts.intact import read_bundle, read_listed
from fluxkiln.artifacts.manifest import Manifest
from fluxkiln.compile.bundle import CONFIGS, Bundle, check_own_parts, require_pipeline
from fluxkiln.compile.targets import find_target
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.documents import read_object
from fluxkiln.patches.registry import model_named
from fluxkiln.progress import Progress

# what its compiler adds to a bundle is not named by the manifest until it was looked at
_RESUME = "; what its compiler made is looked at and taken over by `fluxkiln compile --resume`"


def open_bundle(folder: Path, progress: Progress | None = None, *, again: bool = False, whole: bool = False) -> Bundle:
    """Check a bundle against its manifest, and the manifest against model, configs and files.

    Args:
        again: read every file. Otherwise those are not read that were found whole before and are the same since.
        whole: it must have all components of a pipeline.

    Raises:
        UsageError: no bundle, one of a target or model that is not installed, or not a whole one.
        IntegrityError: the manifest was changed; a file is missing, one too many, or has other bytes than it says; its
        parts are not the model's, or not what their files hold.
    """
    folder = folder.absolute()
    found = read_bundle(folder, again=again, progress=progress, hint=_hint)
    manifest = found.manifest
    target = find_target(manifest.target)
    configs = read_object(read_listed(folder, CONFIGS), str(folder / CONFIGS))
    model = model_named(manifest.model, configs)
    parts = check_own_parts(manifest, model, configs, folder)
    bundle = Bundle(folder, manifest, found.digest, target, model, parts, configs)
    if whole:
        require_pipeline(bundle)
    if found.fresh:
        toolchain_of(target).check_parts(bundle, found.fresh)
        found.remember()
    return bundle


def _hint(manifest: Manifest) -> str:
    return _RESUME if toolchain_of(find_target(manifest.target)).resumable else ""
