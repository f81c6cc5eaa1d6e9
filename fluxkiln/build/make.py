"""A build: the checkpoint found or made and checked, what is fixed for the build, and the stored, verified bundle.

`build` and `plan` are the Python interface of the two commands of the same name. Heavy libraries are imported by the
stages that need them, so that a build in which nothing changed costs a few hundred milliseconds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from fluxkiln import __version__
from fluxkiln.artifacts.actions import Action, ActionCache
from fluxkiln.artifacts.bundle import heal_bundle
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.intact import read_manifest
from fluxkiln.artifacts.store import open_store
from fluxkiln.build.plan import BuildForm, check_resources, plan_build
from fluxkiln.build.prepared import (
    Prepared,
    choose_components,
    chosen_parts,
    find_root,
    model_of,
    open_memo,
    reference_steps,
    unwritten_bytes,
)
from fluxkiln.compile.plan import Plan
from fluxkiln.compile.targets import Target, find_target
from fluxkiln.compile.toolchain import toolchain_of
from fluxkiln.errors import CheckpointError, FluxkilnError, ResourceError, ShapeError, UsageError
from fluxkiln.export.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.export.fingerprint import (
    DigestMemo,
    digest_tensors,
    file_states,
    fingerprint,
    scan_finite,
    unread_bytes,
)
from fluxkiln.export.lora import measure_changes, with_loras
from fluxkiln.export.lora_file import digest_lora
from fluxkiln.export.source import find_stand_in
from fluxkiln.files import build_lock
from fluxkiln.patches.registry import all_presets
from fluxkiln.patches.sizes import parts_at_sizes
from fluxkiln.progress import STEP_BYTES, Laps, OnBytes, Progress, Silent, count_bytes
from fluxkiln.quantize.schemes import parse_scheme
from fluxkiln.settings import DEFAULT_STATISTICS, MODULATIONS, OPTIONS, VAES, Settings
from fluxkiln.types import Shapes, check_steps

if TYPE_CHECKING:
    from fluxkiln.build.finish import BuildResult

# Bytes of a checkpoint that a plan reads to say what the store has of it: some seconds.
MOST_READ = 2 << 30


def build(settings: Settings, progress: Progress | None = None) -> BuildResult:
    """Build, verify and store a bundle.

    Raises:
        UsageError: an option that is not legal. CheckpointError: a damaged checkpoint. ToolchainError: no compiler.
        CompileError: a compile failed or a cast is wrong. ResourceError: disk or memory ran out, or the same build
        runs already. ParityError: a gate was missed; bundle and report are written all the same.
    """
    from fluxkiln.build.finish import finish_bundle, finished_result, refuse_incomplete

    if settings.force and settings.verify:
        raise UsageError("--force lets --no-verify replace a bundle that was verified; leave it out, or add that")
    progress = progress or Silent()
    laps = Laps()
    prepared = prepare(settings, progress)
    laps.lap("prepare")
    with _folder_locked(prepared):
        heal_bundle(prepared.plan.bundle)
        prepared.cache.store.clean()
        done = finished_result(prepared, laps)
        if done is not None and not settings.prove:
            return done
        _keep_verified(prepared)
        check_resources(prepared)
        toolchain = toolchain_of(prepared.plan.target)
        made = toolchain.make(prepared.checkpoint, prepared.plan, prepared.cache, settings, progress, laps)
        result = finish_bundle(prepared, made, progress, laps)
        refuse_incomplete(prepared, made.missing, result)
        return result


def _keep_verified(prepared: Prepared) -> None:
    """Raise UsageError before a verified bundle is replaced by one that nobody compared with anything."""
    bundle = prepared.plan.bundle
    try:
        verified = read_manifest(bundle).parity.get("verified")
    except FluxkilnError:
        return  # there is none, or none that is worth keeping
    if verified and not prepared.settings.verify and not prepared.settings.force:
        raise UsageError(
            f"{bundle} was verified, --no-verify would replace it by one that was not; leave it out, name another "
            "--build-dir, or add --force"
        )


@contextmanager
def _folder_locked(prepared: Prepared) -> Iterator[None]:
    """The build's folder, held against a second build of the same; gone afterwards if nothing was written to it."""
    prepared.plan.folder.mkdir(parents=True, exist_ok=True)
    try:
        with build_lock(prepared.plan.folder / ".lock", f"the build {prepared.name} for {prepared.plan.target.name}"):
            yield
    finally:
        for folder in (prepared.plan.folder, prepared.plan.folder.parent):
            with suppress(OSError):  # not empty
                folder.rmdir()


def plan(
    settings: Settings, budgets: Iterable[int] = (), measure: bool = False, progress: Progress | None = None
) -> dict[str, Any]:
    """What a build needs and takes, without running any of it: see `plan_build`; and `mixtures`, see `find_mixtures`.

    Nothing is written or fetched, and no large checkpoint is read: what is not there yet, synthetic or on the Hub, is
    planned from its shapes. To `measure` what blocks lose the checkpoint is read and run.
    """
    from fluxkiln.build.mixture import find_mixtures, measure_blocks
    from fluxkiln.export.synth import synthesized_bytes

    progress = progress or Silent()
    if measure:
        measure_blocks(prepare(settings, progress), progress)
    stand_in, download = find_stand_in(settings.model), 0
    if stand_in is not None:
        settings = replace(settings, model=stand_in.name)
        download = synthesized_bytes(stand_in.name, choose_components(model_of(settings), settings))
    unread = stand_in is not None or unwritten_bytes(settings) or _unread_bytes(settings) > MOST_READ
    prepared = outline(settings) if unread else prepare(settings)
    planned = plan_build(prepared, _forms(prepared), download)
    return {**planned, "mixtures": [one.to_json() for one in find_mixtures(prepared, budgets)]}


def _unread_bytes(settings: Settings) -> int:
    """Of the settings' checkpoint, which is there."""
    chosen = choose_components(model_of(settings), settings)
    checkpoint = open_checkpoint(find_root(settings, settings.components and chosen), chosen)
    return unread_bytes(checkpoint, open_memo(settings))


def _forms(prepared: Prepared) -> Iterator[BuildForm]:
    """Each form of a build for devices that hold whole parts: with either VAE and either modulation."""
    settings, parts = prepared.settings, prepared.plan.parts
    if not prepared.plan.target.boards:
        return
    decoders = VAES if any(part.traits.convolutional for part in parts) else (settings.vae,)
    ways = MODULATIONS if any(part.traits.each_step for part in parts) else (settings.modulation,)
    for vae, modulation in itertools.product(decoders, ways):
        try:
            other = _prepared(replace(settings, vae=vae, modulation=modulation), prepared.checkpoint)
            with suppress(ResourceError):  # what does not fit is told by its figures
                toolchain_of(other.plan.target).check(other.checkpoint, other.plan, other.cache)
            yield BuildForm(vae, modulation, other)
        except FluxkilnError as error:
            yield BuildForm(vae, modulation, None, str(error))


def prepare(settings: Settings, progress: Progress | None = None) -> Prepared:
    """Check everything that can be checked before the first weight is converted; errors as `build`."""
    progress = progress or Silent()
    chosen = choose_components(model_of(settings), settings)
    if unwritten_bytes(settings):
        check_resources(outline(settings))
    report = count_bytes(progress, "synthesize", "written")
    root = find_root(settings, settings.components and chosen, report)
    memo = open_memo(settings)
    prepared = _prepared(settings, with_loras(open_checkpoint(root, chosen), settings.loras))
    checkpoint = prepared.checkpoint
    states = file_states(checkpoint)
    print_ = fingerprint(checkpoint, memo, _read_progress(progress))
    digests = {name: digest_tensors(refs.values(), memo) for name, refs in checkpoint.tensors.items()}
    memo.save()
    checkpoint = replace(checkpoint, digests=digests, states=states)
    prepared = replace(prepared, fingerprint=print_, checkpoint=checkpoint)
    prepared = replace(prepared, changes=_validate(prepared, memo, progress))
    for what, how in prepared.lora_lines().items():
        progress.note(f"{what}: {how}")
    return prepared


def _read_progress(progress: Progress) -> OnBytes:
    """Bytes of a checkpoint read, where there are enough of them to wait for."""
    report = count_bytes(progress, "read", "read")
    return lambda done, total: report(done, total) if total >= STEP_BYTES else None


def outline(settings: Settings) -> Prepared:
    """A build by its model's configs alone: no weight is read, nor written."""
    chosen = choose_components(model_of(settings), settings)
    _, preset = all_presets().get(settings.model, (None, None))
    if preset and not preset.trained:
        from fluxkiln.export.synth import unwritten_checkpoint

        checkpoint = unwritten_checkpoint(settings.model, chosen)
    else:
        checkpoint = open_checkpoint(find_root(settings, settings.components and chosen), chosen)
    return _prepared(settings, with_loras(checkpoint, settings.loras))


def _prepared(settings: Settings, checkpoint: Checkpoint) -> Prepared:
    """What is fixed for a build, but for what depends on the bytes of the checkpoint."""
    target = _target_of(settings)
    _, schemes = target.parse_schemes(settings.scheme, checkpoint.model.kinds)
    shapes, *further = sizes = choose_sizes(settings, checkpoint)
    layout = toolchain_of(target).lay_out(settings, target, checkpoint)
    _refuse_unused(settings, layout is not None, bool(toolchain_of(target).proven), bool(target.boards))
    if further and not toolchain_of(target).many_sizes:
        raise UsageError(
            f"{len(sizes)} sizes: a bundle for {target.name} is of one; give one --size and one --tokens, and build "
            "once for each"
        )
    parts = chosen_parts(settings, checkpoint, split=layout is not None)
    check_steps(parts, reference_steps(settings, checkpoint))
    if settings.recording:
        from fluxkiln.verify.carried import carried_parts

        carried_parts(parts, settings.recording)
    exceptions = target.block_schemes(settings.scheme, parts)
    folder = settings.build_dir.absolute() / target.name / _name(settings, target, checkpoint, sizes).lower()
    parts = parts_at_sizes(checkpoint.model, checkpoint.configs, parts, sizes)
    plan = Plan(target, shapes, schemes, parts, folder, layout, exceptions, tuple(further))
    if any(scheme.kept for scheme in schemes.values()):
        from fluxkiln.compile.tensors import settle_kept

        plan = settle_kept(checkpoint, plan)
    cache = ActionCache(open_store(settings.store_path.absolute()))
    return Prepared(settings, checkpoint, plan, cache, folder.name, "")


def _target_of(settings: Settings) -> Target:
    """The target on the devices that the settings name; UsageError where it has none."""
    target = find_target(settings.target)
    given = settings.board, settings.device_memory, settings.devices
    return target.on_board(*given) if target.boards and any(given) else target


def _refuse_unused(settings: Settings, cut: bool, proving: bool, boards: bool) -> None:
    """Raise UsageError for settings of targets that cut the model, where the target does not, of proofs where nothing
    is cast, and of boards where it has none."""
    rules = {} if proving else {"prove": "casts nothing"}
    if not boards:
        rules |= dict.fromkeys(("board", "device_memory", "devices"), "is not planned for boards")
    if not cut:
        names = ("instance", "tp_degree", "granularity", "flags")
        rules |= dict.fromkeys(names, "does not cut the model over cores")
    for one in fields(settings):
        if one.name in rules and (value := getattr(settings, one.name)) != one.default:
            given = f"--{OPTIONS[one.name].flag}" + ("" if value is True else f" {value}")
            raise UsageError(f"{given}: target {settings.target} {rules[one.name]}; leave it out")


def _name(settings: Settings, target: Target, checkpoint: Checkpoint, sizes: Sequence[Shapes]) -> str:
    scheme = settings.scheme or target.schemes[0]
    label = scheme.replace(",", "-").replace("=", "-")
    if not re.fullmatch(r"[\w.-]{1,100}", label):  # long, or with signs in it
        named = scheme.split(",")[0]
        base = parse_scheme(target.schemes[0].split(",")[0] if "=" in named else named).base_name
        label = f"{base}-{hashlib.sha256(scheme.encode()).hexdigest()[:10]}"
    label += toolchain_of(target).label(settings)
    forms = "-inline" * (settings.modulation == "inline") + "-tiny-vae" * (settings.vae == "tiny")
    components = choose_components(checkpoint.model, settings)
    chosen = "" if components == checkpoint.model.components else "-" + "-".join(components)
    size = "_".join(shapes.label for shapes in sizes)
    if len(size) > 100:
        size = f"{len(sizes)}-sizes-{hashlib.sha256(size.encode()).hexdigest()[:10]}"
    drawn = "" if settings.statistics == DEFAULT_STATISTICS else f"-{settings.statistics}"
    return f"{checkpoint.name}{drawn}-{label}-{size}{forms}{lora_label(settings)}{chosen}"


def lora_label(settings: Settings) -> str:
    """What a build's folder is called besides: nothing without LoRAs, else a digest of them and their strengths."""
    if not settings.loras:
        return ""
    inputs = [[digest_lora(file), strength] for file, strength in settings.loras]
    return f"-lora-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:8]}"


def choose_sizes(settings: Settings, checkpoint: Checkpoint) -> tuple[Shapes, ...]:
    """Those of the settings; what they leave open is the preset's own, else 1024 x 1024 and all the variant's tokens.

    ShapeError: more text tokens than the variant takes. CheckpointError: the tiny VAE is wanted and not there.
    """
    model, variant = checkpoint.model, checkpoint.variant
    preset, limit = model.presets.get(checkpoint.name), model.most_tokens[variant]
    sides = settings.size or (preset.size if preset else (1024, 1024),)
    tokens = settings.tokens or (preset.tokens if preset else limit,)
    if max(tokens) > limit:
        raise ShapeError(
            f"{max(tokens)} text tokens: {model.title}-{variant} was trained with at most {limit}; use TOKENS={limit}"
        )
    tiny = settings.vae == "tiny" and "vae" in choose_components(model, settings)
    if tiny and "vae_tiny" not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.name} has no folder vae_tiny, --vae tiny needs it; save taef1 there with "
            "AutoencoderTiny.save_pretrained, or leave --vae out"
        )
    return tuple(Shapes(height, width, count) for count in tokens for width, height in sides)


def _validate(prepared: Prepared, memo: DigestMemo, progress: Progress) -> dict[str, float]:
    """Groups that fit; shapes against upstream's classes and no NaN or Inf, once per checkpoint.

    Returns:
        What LoRAs change in it, see `Prepared`; told as well.
    """
    from fluxkiln.compile.tensors import check_weights, part_refs

    checkpoint, plan, cache = prepared.checkpoint, prepared.plan, prepared.cache
    action = Action(
        stage="validate",
        what=checkpoint.name,
        code_version=code_version(_read_through, model=type(checkpoint.model)),
        inputs={"checkpoint": f"sha256:{prepared.fingerprint}"},
    )
    check_weights(checkpoint, plan)
    known = cache.lookup(action.key)
    if known is None:
        started = time.perf_counter()
        progress.stage("validate", 1)
        lengths = _read_through(checkpoint, memo)
        known = cache.record(action, {}, {"version": __version__, "lengths": lengths})
        tensors = sum(map(len, checkpoint.tensors.values()))
        progress.done("validate", f"{tensors} tensors", f"checked in {time.perf_counter() - started:.1f} s")
    if not checkpoint.loras:
        return {}
    measured: Any = known.facts["lengths"]
    changes = {}
    for part in plan.parts:
        names = (f"{part.folder}/{ref.name}" for ref in part_refs(checkpoint, plan, part) if ref.change)
        if found := [measured[name] for name in names]:
            before, added = (math.hypot(*column) for column in zip(*found, strict=True))
            changes[part.name] = added / before if before else math.inf
    return changes


def _read_through(checkpoint: Checkpoint, memo: DigestMemo) -> dict[str, tuple[float, float]]:
    from fluxkiln.export.checkpoint import validate_checkpoint

    validate_checkpoint(checkpoint)
    checkpoint.model.load_sidecars(checkpoint.root, checkpoint.configs)
    for refs in checkpoint.tensors.values():
        scan_finite(refs.values(), memo)
    return measure_changes(checkpoint)
