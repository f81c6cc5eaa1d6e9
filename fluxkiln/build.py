"""A build: from what the user asked for to a stored, verified bundle.

`build` and `plan` are the Python interface of the two commands of the same name. Heavy libraries are imported by the
stages that need them, so that a build in which nothing changed costs a few hundred milliseconds.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxkiln import __version__
from fluxkiln.artifacts.actions import Action, ActionCache, stage_code_version
from fluxkiln.artifacts.bundle import heal_bundle
from fluxkiln.artifacts.locks import build_lock
from fluxkiln.artifacts.store import Store, open_store
from fluxkiln.artifacts.types import Template
from fluxkiln.compile.pool import JobPool
from fluxkiln.compile.target import Target
from fluxkiln.compile.targets import find_target
from fluxkiln.components import KINDS, Part, Shapes, list_parts
from fluxkiln.errors import ToolchainError
from fluxkiln.export.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.export.fingerprint import DigestMemo, digest_tensors, fingerprint, scan_finite
from fluxkiln.export.source import resolve_model
from fluxkiln.linking import link_components
from fluxkiln.progress import Progress, Silent
from fluxkiln.settings import Settings
from fluxkiln.stages import (
    BinaryPart,
    CombinedFile,
    Kiln,
    Mould,
    cast_part,
    combine_parts,
    compile_memory,
    compile_part,
    make_mould,
    make_template,
    prove_cast,
)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A build that has been checked and may start. `name` is that of its folder."""

    settings: Settings
    kiln: Kiln
    name: str
    fingerprint: str
    folder: Path

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"


@dataclass(frozen=True, slots=True)
class BuildResult:
    """What a build did and where it is."""

    name: str
    target: str
    bundle: Path
    report: Path | None
    digest: str
    nothing_to_do: bool
    seconds: float
    compiler_runs: int
    cache: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, str] = field(default_factory=dict)
    parity: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The result as plain JSON."""
        return {
            "name": self.name,
            "target": self.target,
            "bundle": str(self.bundle),
            "manifest": str(self.bundle / "manifest.json"),
            "report": str(self.report) if self.report else None,
            "digest": self.digest,
            "nothing_to_do": self.nothing_to_do,
            "seconds": round(self.seconds, 3),
            "compiler_runs": self.compiler_runs,
            "cache": dict(self.cache),
            "parts": dict(self.parts),
            "parity": dict(self.parity),
        }


def build(settings: Settings, progress: Progress | None = None) -> BuildResult:
    """Build, verify and store a bundle.

    Raises:
        UsageError: an option that is not legal. CheckpointError: a damaged checkpoint. ToolchainError: no compiler.
        CompileError: a compile failed or a cast is wrong. ResourceError: disk or memory ran out, or the same build
        runs already. ParityError: a gate was missed; bundle and report are written all the same.
    """
    from fluxkiln.bundling import finish_bundle

    progress = progress or Silent()
    started = time.perf_counter()
    prepared = prepare(settings, progress)
    prepared.folder.mkdir(parents=True, exist_ok=True)
    with build_lock(prepared.folder / ".lock", f"the build {prepared.name} for {settings.target}"):
        heal_bundle(prepared.bundle)
        prepared.kiln.cache.store.clean()
        done = _already_done(prepared, started)
        if done is not None:
            return done
        graphs: dict[str, Path] = {}
        if prepared.kiln.target.toolchain == "tpu_mlir":
            binaries = build_binaries(prepared.kiln, settings, progress)
            files = combine_components(prepared.kiln, binaries, progress)
        else:
            binaries, files, graphs = link_components(prepared.kiln, prepared.folder / "work", progress)
        return finish_bundle(prepared, binaries, files, graphs, progress, started)


def prepare(settings: Settings, progress: Progress | None = None) -> Prepared:
    """Check everything that can be checked before the first weight is converted.

    Raises: as `build`, but for what happens while compiling.
    """
    progress = progress or Silent()
    target = find_target(settings.target)
    _, schemes = target.parse_schemes(settings.scheme)
    root = resolve_model(settings.model, settings.build_dir / "models", _synth_progress(progress))
    checkpoint = open_checkpoint(root)
    width, height = settings.size or default_size(checkpoint)
    shapes = Shapes(height, width, settings.tokens or default_tokens(checkpoint))
    shapes.check_variant(checkpoint.variant)
    store_root = settings.store_path.absolute()
    store = open_store(store_root)
    memo = DigestMemo(store_root / "memo" / "tensors.json")
    cache = ActionCache(store)
    print_ = fingerprint(checkpoint, memo)
    digests = {name: digest_tensors(refs.values(), memo) for name, refs in checkpoint.tensors.items()}
    memo.save()
    label = (settings.scheme or target.schemes[0]).replace(",", "-").replace("=", "-")
    name = f"{checkpoint.name}-{label}-{width}x{height}-{shapes.tokens}" + "-tiny-vae" * (settings.vae == "tiny")
    folder = settings.build_dir.absolute() / target.name / name.lower()
    kiln = Kiln(
        target=target,
        shapes=shapes,
        schemes=schemes,
        parts=list_parts(checkpoint.configs, settings.vae),
        checkpoint=checkpoint,
        digests=digests,
        cache=cache,
        logs=folder / "logs",
        tpu_mlir=_tpu_mlir(target),
    )
    _validate(kiln, store, print_, memo)
    return Prepared(settings, kiln, folder.name, print_, folder)


def default_size(checkpoint: Checkpoint) -> tuple[int, int]:
    """Width and height: the preset's own for a synthetic model, 1024 x 1024 otherwise."""
    from fluxkiln.export.synth_presets import PRESETS

    return PRESETS[checkpoint.name].size if checkpoint.name in PRESETS else (1024, 1024)


def default_tokens(checkpoint: Checkpoint) -> int:
    """Text tokens: the preset's own for a synthetic model, else the most that the variant takes."""
    from fluxkiln.components import MAX_TOKENS
    from fluxkiln.export.synth_presets import PRESETS

    return PRESETS[checkpoint.name].tokens if checkpoint.name in PRESETS else MAX_TOKENS[checkpoint.variant]


def build_binaries(kiln: Kiln, settings: Settings, progress: Progress) -> tuple[BinaryPart, ...]:
    """Every part's binary: moulds first, casts as soon as their mould is there, everything else compiled.

    One part of each cast kind, chosen by seed, is compiled as well and must come out identical.
    """
    by_kind: dict[str, list[Part]] = {}
    for part in kiln.parts:
        by_kind.setdefault(part.kind, []).append(part)
    casts = [kind for kind in by_kind if kind in kiln.target.cast_kinds]
    progress.stage("compile", len(by_kind) + len(casts))
    progress.stage("cast", sum(len(by_kind[kind]) for kind in casts))
    templates: dict[str, Template] = {}
    compiled: dict[str, Future[Any]] = {}
    moulds: dict[str, Future[Any]] = {}
    with JobPool[Any](settings.jobs) as pool:
        # the slowest first, so that the others fill the gaps
        for kind in sorted(by_kind, key=lambda kind: (KINDS[kind].component != "vae", kind not in casts)):
            template = templates[kind] = make_template(kiln, kind, "onnx17")
            proof = proof_part(by_kind[kind], settings.seed)
            memory = compile_memory(template)
            if kind in casts:
                moulds[kind] = pool.submit(f"mould {kind}", memory, _told(progress, make_mould, kiln, template))
            compiled[kind] = pool.submit(proof.name, memory, _told(progress, compile_part, kiln, proof, template))
            pool.check()
        binaries: dict[str, BinaryPart] = {}
        pending: list[tuple[Part, Future[Any]]] = []
        for kind in by_kind:
            direct = compiled[kind].result()
            if kind not in casts:
                binaries[direct.part.name] = direct
                continue
            mould: Mould = moulds[kind].result()
            for part in by_kind[kind]:
                pending.append((part, _submit_part(pool, kiln, progress, part, templates[kind], mould, direct)))
            if not mould.castable:
                progress.note(f"{kind}: {mould.why}")
        for part, future in pending:
            made = future.result()
            direct = compiled[part.kind].result()
            is_proof = made.made == "cast" and direct.part.name == part.name
            binaries[part.name] = prove_cast(made, direct, kiln) if is_proof else made
    return tuple(binaries[part.name] for part in kiln.parts)


def proof_part(parts: list[Part], seed: int) -> Part:
    """The part of a kind that is compiled as well as cast: any of them, but the same for the same seed."""
    key = hashlib.sha256(f"{seed}/{parts[0].kind}".encode()).digest()
    return parts[int.from_bytes(key[:4], "little") % len(parts)]


def combine_components(kiln: Kiln, binaries: tuple[BinaryPart, ...], progress: Progress) -> tuple[CombinedFile, ...]:
    """One bmodel per component; an unquantized transformer is cut into a file per device."""
    groups: dict[str, list[BinaryPart]] = {}
    for binary in binaries:
        component = binary.part.component
        groups.setdefault("vae_decoder" if component == "vae" else component, []).append(binary)
    whole = groups["transformer"]
    if not kiln.schemes["double"].weight_bits:
        del groups["transformer"]
        for index, chunk in enumerate(split_devices(whole, UNQUANTIZED_DEVICES)):
            groups[f"transformer.{index}"] = chunk
    progress.stage("combine", len(groups))
    files = []
    for name, parts in groups.items():
        files.append(combine_parts(kiln, f"{name}.bmodel", parts))
        progress.done("combine", f"{name}.bmodel", f"{len(parts)} nets")
    return tuple(files)


# 23.8 GB of 16-bit weights on chips of 16 GB, of which the runtime and activations need a part
UNQUANTIZED_DEVICES = 3


def split_devices(parts: list[BinaryPart], devices: int) -> list[list[BinaryPart]]:
    """Cut a chain of parts into at most `devices` runs whose largest is as small as possible, by measured bytes."""
    sizes = [int(part.facts["weight_bytes"]) + int(part.facts["instruction_bytes"]) for part in parts]
    low, high = max(sizes), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_runs(sizes, middle)) <= devices else (middle + 1, high)
    return [[parts[index] for index in run] for run in _runs(sizes, low)]


def _runs(sizes: list[int], limit: int) -> list[list[int]]:
    runs: list[list[int]] = [[]]
    used = 0
    for index, size in enumerate(sizes):
        if runs[-1] and used + size > limit:
            runs.append([])
            used = 0
        runs[-1].append(index)
        used += size
    return runs


def _submit_part(
    pool: JobPool[Any], kiln: Kiln, progress: Progress, part: Part, template: Template, mould: Mould, direct: BinaryPart
) -> Future[Any]:
    if mould.castable:
        return pool.submit(part.name, 512 << 20, _told(progress, cast_part, kiln, part, template, mould))
    return pool.submit(part.name, compile_memory(template), _told(progress, compile_part, kiln, part, template))


def _told(progress: Progress, stage: Any, kiln: Kiln, *arguments: Any) -> Any:
    """`stage` as a job that reports what it did."""

    def run() -> Any:
        started = time.perf_counter()
        made = stage(kiln, *arguments)
        seconds = time.perf_counter() - started
        if isinstance(made, Mould):
            how = "from the store" if made.result.hit else f"compiled in {seconds:.1f} s"
            progress.done("compile", f"mould {made.kind} {kiln.schemes[made.kind].name}", how)
        else:
            progress.done(
                "cast" if made.made == "cast" else "compile", made.part.name, f"{made.made} in {seconds:.1f} s"
            )
        return made

    return run


def _validate(kiln: Kiln, store: Store, print_: str, memo: DigestMemo) -> None:
    """Shapes against upstream's classes and no NaN or Inf, once per checkpoint: the result is remembered."""
    from fluxkiln.export.validate import validate_checkpoint

    action = Action(
        stage="validate",
        what=kiln.checkpoint.name,
        code_version=stage_code_version("fluxkiln.export.validate", "fluxkiln.export.fingerprint"),
        inputs={"checkpoint": f"sha256:{print_}"},
    )
    if kiln.cache.lookup(action.key) is None:
        validate_checkpoint(kiln.checkpoint)
        for refs in kiln.checkpoint.tensors.values():
            scan_finite(refs.values(), memo)
        kiln.cache.record(action, {}, {"version": __version__})


def _tpu_mlir(target: Target) -> Any:
    if target.toolchain != "tpu_mlir":
        return None
    from fluxkiln.compile.tpu_mlir_env import default_tpu_mlir_root, find_tpu_mlir

    root = default_tpu_mlir_root()
    found = find_tpu_mlir(root)
    if found is None:
        raise ToolchainError(
            f"TPU-MLIR is not installed in {root}, target {target.name} needs it; run make env-tpu-mlir, or python -m "
            "fluxkiln.compile.tpu_mlir_env, or name a finished environment with FLUXKILN_TPU_MLIR"
        )
    return found


def _already_done(prepared: Prepared, started: float) -> BuildResult | None:
    from fluxkiln.bundling import finished_result

    return finished_result(prepared, started)


def _synth_progress(progress: Progress) -> Any:
    def report(done: int, total: int) -> None:
        if done == 0:
            progress.stage("synthesize", 1)
        if done == total:
            progress.done("synthesize", "checkpoint", f"{total / 1e6:.0f} MB")

    return report


def plan(settings: Settings) -> dict[str, Any]:
    """The jobs of a build without running them, with memory estimates and which of them the store has already."""
    from fluxkiln.planning import plan_build

    return plan_build(prepare(settings))
