"""Before a build: the checkpoint found or made, opened and checked, and everything that is fixed for the build."""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

from fluxkiln import __version__
from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import open_store
from fluxkiln.build.plan import check_resources
from fluxkiln.build.prepared import (
    Prepared,
    Read,
    choose_components,
    chosen_parts,
    model_of,
    models_folder,
    unwritten_bytes,
)
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.targets import Target, find_target
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import CheckpointError, ShapeError
from fluxkiln.export.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.export.fingerprint import DigestMemo, digest_tensors, file_states, fingerprint, scan_finite
from fluxkiln.export.lora import fuse_once, fused_folder
from fluxkiln.export.lora_file import digest_lora
from fluxkiln.export.source import resolve_model
from fluxkiln.patches.registry import all_presets
from fluxkiln.progress import STEP_BYTES, Progress, Silent, count_bytes
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import Settings
from fluxkiln.types import Shapes, check_steps


def prepare(settings: Settings, progress: Progress | None = None) -> Prepared:
    """Check everything that can be checked before the first weight is converted.

    Raises: as `build`, but for what happens while compiling.
    """
    progress = progress or Silent()
    chosen = choose_components(model_of(settings), settings)
    if unwritten_bytes(settings, _read_progress(progress)):
        check_resources(outline(settings))
    report = count_bytes(progress, "synthesize", "written")
    root = resolve_model(settings.model, models_folder(settings), report, settings.components and chosen)
    memo = DigestMemo(settings.store_path.absolute() / "memo" / "tensors.json")
    root = fused_root(root, settings, models_folder(settings), memo, progress, _read_progress(progress))
    checkpoint = open_checkpoint(root, chosen)
    prepared = _prepared(settings, checkpoint)
    toolchain_of(prepared.plan.target).check(checkpoint, prepared.plan, prepared.cache)
    states = file_states(checkpoint)
    print_ = fingerprint(checkpoint, memo, _read_progress(progress))
    digests = {name: digest_tensors(refs.values(), memo) for name, refs in checkpoint.tensors.items()}
    memo.save()
    read = replace(checkpoint, digests=digests, states=states)
    prepared = replace(prepared, fingerprint=print_, checkpoint=read)
    _validate(prepared.checkpoint, prepared.plan, prepared.cache, print_, memo, progress)
    return prepared


def outline(settings: Settings) -> Prepared:
    """A build by its model's configs alone: no weight is read, nor written."""
    chosen = choose_components(model_of(settings), settings)
    if settings.model in all_presets():
        from fluxkiln.export.synth.checkpoint import unwritten_checkpoint

        return _prepared(settings, unwritten_checkpoint(settings.model, chosen))
    root = resolve_model(settings.model, models_folder(settings), None, settings.components and chosen)
    return _prepared(settings, open_checkpoint(root, chosen))


def _prepared(settings: Settings, checkpoint: Checkpoint) -> Prepared:
    """What is fixed for a build, but for what depends on the bytes of the checkpoint."""
    target = find_target(settings.target)
    _, schemes = target.parse_schemes(settings.scheme, checkpoint.model.kinds)
    width, height = settings.size or default_size(checkpoint)
    shapes = Shapes(height, width, settings.tokens or default_tokens(checkpoint))
    check_tokens(shapes, checkpoint)
    check_vae(checkpoint, settings)
    layout = toolchain_of(target).lay_out(settings, target, checkpoint)
    parts = chosen_parts(settings, checkpoint, split=layout is not None)
    check_steps(parts, settings.steps)
    folder = settings.build_dir.absolute() / target.name / _name(settings, target, checkpoint, shapes).lower()
    cache = ActionCache(open_store(settings.store_path.absolute()))
    plan = Plan(target, shapes, schemes, parts, folder, layout)
    if any(scheme.kept for scheme in schemes.values()):
        from fluxkiln.compile.tensors import settle_kept

        plan = settle_kept(checkpoint, plan)
    return Prepared(settings, checkpoint, plan, cache, folder.name, "", folder)


def _name(settings: Settings, target: Target, checkpoint: Checkpoint, shapes: Shapes) -> str:
    label = _label(settings.scheme or target.schemes[0], target)
    components = choose_components(checkpoint.model, settings)
    chosen = "" if components == checkpoint.model.components else "-" + "-".join(components)
    label += toolchain_of(target).label(settings)
    forms = "-inline" * (settings.modulation == "inline") + "-tiny-vae" * (settings.vae == "tiny")
    return (
        f"{checkpoint.name}-{label}-{shapes.width}x{shapes.height}-{shapes.tokens}{forms}{lora_label(settings)}{chosen}"
    )


def _label(scheme: str, target: Target) -> str:
    """A scheme's text as part of a folder's name; where it is long or has signs in it, a digest instead."""
    label = scheme.replace(",", "-").replace("=", "-")
    if re.fullmatch(r"[\w.-]{1,100}", label):
        return label
    base = parse_scheme((scheme if "=" not in scheme.split(",")[0] else target.schemes[0]).split(",")[0]).base_name
    return f"{base}-{hashlib.sha256(scheme.encode()).hexdigest()[:10]}"


def check_vae(checkpoint: Checkpoint, settings: Settings) -> None:
    """Raise CheckpointError when the tiny VAE is asked for and not there."""
    if (
        settings.vae == "tiny"
        and "vae" in choose_components(checkpoint.model, settings)
        and "vae_tiny" not in checkpoint.tensors
    ):
        raise CheckpointError(
            f"{checkpoint.name} has no folder vae_tiny, --vae tiny needs it; save taef1 there with "
            "AutoencoderTiny.save_pretrained, or leave --vae out"
        )


def default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and height: the preset's own for a synthetic model, 1024 x 1024 otherwise."""
    preset = checkpoint.model.presets.get(checkpoint.name)
    return preset.size if preset else (1024, 1024)


def default_tokens(checkpoint: Checkpoint) -> int:
    """Text tokens: the preset's own for a synthetic model, else the most that the variant takes."""
    preset = checkpoint.model.presets.get(checkpoint.name)
    return preset.tokens if preset else checkpoint.model.most_tokens[checkpoint.variant]


def check_tokens(shapes: Shapes, checkpoint: Checkpoint) -> None:
    """Raise ShapeError when the variant cannot take this many text tokens."""
    limit = checkpoint.model.most_tokens[checkpoint.variant]
    if shapes.tokens > limit:
        raise ShapeError(
            f"{shapes.tokens} text tokens: {checkpoint.model.title}-{checkpoint.variant} was trained with at most "
            f"{limit}; use TOKENS={limit}"
        )


def _read_progress(progress: Progress) -> Read:
    """Bytes of a checkpoint read, where there are enough of them to wait for."""
    report = count_bytes(progress, "read", "read")
    return lambda done, total: report(done, total) if total >= STEP_BYTES else None


def _validate(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, print_: str, memo: DigestMemo, progress: Progress
) -> None:
    """Groups that fit; shapes against upstream's classes and no NaN or Inf, once per checkpoint."""
    from fluxkiln.compile.tensors import check_weights

    action = Action(
        stage="validate",
        what=checkpoint.name,
        code_version=code_version(_read_through, model=type(checkpoint.model)),
        inputs={"checkpoint": f"sha256:{print_}"},
    )
    check_weights(checkpoint, plan)
    if cache.lookup(action.key) is None:
        started = time.perf_counter()
        progress.stage("validate", 1)
        _read_through(checkpoint, memo)
        cache.record(action, {}, {"version": __version__})
        tensors = sum(map(len, checkpoint.tensors.values()))
        progress.done("validate", f"{tensors} tensors", f"checked in {time.perf_counter() - started:.1f} s")


def _read_through(checkpoint: Checkpoint, memo: DigestMemo) -> None:
    from fluxkiln.export.validate import validate_checkpoint

    validate_checkpoint(checkpoint)
    for refs in checkpoint.tensors.values():
        scan_finite(refs.values(), memo)


def fused_root(root: Path, settings: Settings, models: Path, memo: DigestMemo, progress: Progress, read: Read) -> Path:
    """The folder that a build is made from: `root` itself, or with the settings' LoRAs fused in.

    Args:
        models: where fused checkpoints are kept. read: told of the bytes read to find out whether there is one.

    Raises: as `fuse_lora`.
    """
    if not settings.loras:
        return root
    folder = fused_folder(root, settings.loras, models, memo, read)
    return fuse_once(root, settings.loras, folder, count_bytes(progress, "fuse", "written"))


def lora_label(settings: Settings) -> str:
    """What a build's folder is called besides: nothing without LoRAs, else a digest of them and their strengths."""
    if not settings.loras:
        return ""
    inputs = [[digest_lora(file), strength] for file, strength in settings.loras]
    return f"-lora-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]}"
