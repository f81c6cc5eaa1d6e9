"""A build: from what the user asked for to a stored, verified bundle.

`build` and `plan` are the Python interface of the two commands of the same name. Heavy libraries are imported by the
stages that need them, so that a build in which nothing changed costs a few hundred milliseconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fluxkiln import __version__
from fluxkiln.artifacts.actions import Action, ActionCache, stage_code_version
from fluxkiln.artifacts.bundle import heal_bundle
from fluxkiln.artifacts.locks import build_lock
from fluxkiln.artifacts.store import open_store
from fluxkiln.artifacts.types import Template
from fluxkiln.combining import combine_components
from fluxkiln.compile.pool import JobPool
from fluxkiln.compile.target import Target
from fluxkiln.compile.targets import find_target
from fluxkiln.components import KINDS, Part, Shapes, list_parts
from fluxkiln.errors import CheckpointError, ToolchainError
from fluxkiln.export.checkpoint import Checkpoint, open_checkpoint
from fluxkiln.export.fingerprint import DigestMemo, digest_tensors, fingerprint, scan_finite
from fluxkiln.export.source import resolve_model
from fluxkiln.linking import link_components
from fluxkiln.progress import FROM_STORE, STEP_BYTES, Progress, Silent, count_bytes
from fluxkiln.proving import needs_proof, proof_part, prove_cast
from fluxkiln.settings import Settings
from fluxkiln.stages import (
    CAST_MEMORY,
    BinaryPart,
    Kiln,
    Mould,
    cast_part,
    compile_action,
    compile_memory,
    compile_part,
    count_elements,
    find_mould,
    make_mould,
    mould_action,
    tell_template,
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
    from fluxkiln.planning import check_disk

    progress = progress or Silent()
    started = time.perf_counter()
    prepared = prepare(settings, progress)
    with _folder_locked(prepared):
        heal_bundle(prepared.bundle)
        prepared.kiln.cache.store.clean()
        done = _already_done(prepared, started)
        if done is not None and not settings.prove:
            return done
        check_disk(prepared)
        graphs: dict[str, Path] = {}
        if prepared.kiln.target.toolchain == "tpu_mlir":
            binaries = build_binaries(prepared.kiln, settings, progress)
            files = combine_components(prepared.kiln, binaries, progress)
        else:
            binaries, files, graphs = link_components(prepared.kiln, prepared.folder / "work", progress)
        return finish_bundle(prepared, binaries, files, graphs, progress, started)


@contextmanager
def _folder_locked(prepared: Prepared) -> Iterator[None]:
    """The build's folder, held against a second build of the same; gone afterwards if nothing was written to it."""
    what = f"the build {prepared.name} for {prepared.kiln.target.name}"
    prepared.folder.mkdir(parents=True, exist_ok=True)
    try:
        with build_lock(prepared.folder / ".lock", what):
            yield
    finally:
        for folder in (prepared.folder, prepared.folder.parent):
            with suppress(OSError):  # not empty
                folder.rmdir()


def prepare(settings: Settings, progress: Progress | None = None) -> Prepared:
    """Check everything that can be checked before the first weight is converted.

    Raises: as `build`, but for what happens while compiling.
    """
    progress = progress or Silent()
    target = find_target(settings.target)
    _, schemes = target.parse_schemes(settings.scheme)
    root = resolve_model(settings.model, settings.build_dir / "models", count_bytes(progress, "synthesize", "written"))
    checkpoint = open_checkpoint(root)
    width, height = settings.size or default_size(checkpoint)
    shapes = Shapes(height, width, settings.tokens or default_tokens(checkpoint))
    shapes.check_variant(checkpoint.variant)
    store_root = settings.store_path.absolute()
    store = open_store(store_root)
    memo = DigestMemo(store_root / "memo" / "tensors.json")
    cache = ActionCache(store)
    check_vae(checkpoint, settings.vae)
    print_ = fingerprint(checkpoint, memo, _read_progress(progress))
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
    _validate(kiln, print_, memo, progress)
    return Prepared(settings, kiln, folder.name, print_, folder)


def check_vae(checkpoint: Checkpoint, vae: str) -> None:
    """Raise CheckpointError when the tiny VAE is asked for and not there."""
    if vae == "tiny" and "vae_tiny" not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.name} has no folder vae_tiny, --vae tiny needs it; save taef1 there with "
            "AutoencoderTiny.save_pretrained, or leave --vae out"
        )


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

    One part of each cast kind, chosen by seed, is compiled as well and must come out identical. That proves the mould,
    not the checkpoint: it is not repeated for a mould of the store, unless `settings.prove` asks for it.
    """
    by_kind: dict[str, list[Part]] = {}
    for part in kiln.parts:
        by_kind.setdefault(part.kind, []).append(part)
    casts = [kind for kind in by_kind if kind in kiln.target.cast_kinds]
    announced = {"compile": len(by_kind) + len(casts), "cast": sum(len(by_kind[kind]) for kind in casts)}
    for stage, total in {"template": len(by_kind), **announced}.items():
        progress.stage(stage, total)
    templates: dict[str, Template] = {}
    compiled: dict[str, Future[Any]] = {}
    moulds: dict[str, Future[Any]] = {}
    proofs: list[Part] = []
    with JobPool[Any](settings.jobs) as pool:
        # the slowest first, so that the others fill the gaps
        for kind in sorted(by_kind, key=lambda kind: (KINDS[kind].component != "vae", kind not in casts)):
            template = templates[kind] = tell_template(kiln, kind, kiln.target.graph_format, progress, "template")
            proof = proof_part(by_kind[kind], settings.seed)
            unproven = kind not in casts or needs_proof(kiln, find_mould(kiln, template))
            if kind in casts:
                claim = _claim(kiln, mould_action(kiln, template), template)
                moulds[kind] = pool.submit(f"mould {kind}", claim, _told(progress, make_mould, kiln, template))
            if not (settings.prove or unproven):
                progress.done("compile", proof.name, f"{FROM_STORE}: proven when its mould was made")
            elif kind in casts:
                proofs.append(proof)
            else:
                compiled[kind] = _submit_compile(pool, kiln, progress, proof, template)
            pool.check()
        # behind the moulds, so that the two compiles of the largest kind do not need their memory at once
        for proof in proofs:
            compiled[proof.kind] = _submit_compile(pool, kiln, progress, proof, templates[proof.kind])
        pending: list[tuple[Part, Future[Any]]] = []
        for kind in casts:
            mould: Mould = moulds[kind].result()
            if not mould.castable:
                progress.note(f"{kind}: {mould.why}")
                extra = len(by_kind[kind]) - (kind in compiled)
                announced = {"compile": announced["compile"] + extra, "cast": announced["cast"] - len(by_kind[kind])}
                for stage, total in announced.items():
                    progress.stage(stage, total)
            for part in by_kind[kind]:
                if mould.castable:
                    job = _told(progress, cast_part, kiln, part, templates[kind], mould)
                    pending.append((part, pool.submit(part.name, CAST_MEMORY, job)))
                elif kind in compiled and part == proof_part(by_kind[kind], settings.seed):
                    pending.append((part, compiled[kind]))
                else:
                    pending.append((part, _submit_compile(pool, kiln, progress, part, templates[kind])))
        binaries: dict[str, BinaryPart] = {}
        for part, future in pending:
            made = future.result()
            direct = compiled[part.kind].result() if part.kind in compiled else None
            if made.made == "cast" and direct is not None and direct.part == part:
                made = prove_cast(made, direct, kiln, moulds[part.kind].result())
            binaries[part.name] = made
        binaries |= {
            compiled[kind].result().part.name: compiled[kind].result() for kind in by_kind if kind not in casts
        }
    _tell_casts(binaries, compiled, progress)
    return tuple(binaries[part.name] for part in kiln.parts)


def _tell_casts(binaries: Mapping[str, BinaryPart], compiled: Collection[str], progress: Progress) -> None:
    """Say how many parts of this checkpoint needed no compiler."""
    made = [binary for binary in binaries.values() if not binary.hit]
    cast = [binary for binary in made if binary.made == "cast" and binary.part.kind not in compiled]
    if cast:
        rest = [binary.part.name for binary in made if binary.made == "compiled"]
        one = "1 part was cast from a mould" if len(cast) == 1 else f"{len(cast)} parts were cast from moulds"
        progress.note(f"{one} of the store, without a compiler; compiled: {', '.join(rest) or 'nothing'}")


def _submit_compile(pool: JobPool[Any], kiln: Kiln, progress: Progress, part: Part, template: Template) -> Future[Any]:
    claim = _claim(kiln, compile_action(kiln, part, template), template)
    return pool.submit(part.name, claim, _told(progress, compile_part, kiln, part, template))


def _claim(kiln: Kiln, action: Action, template: Template) -> int:
    """The memory of a compile; nothing for what the store has, so that it is never refused."""
    return 0 if kiln.cache.lookup(action.key) else compile_memory(count_elements(template.slots))


def _told(progress: Progress, stage: Any, kiln: Kiln, *arguments: Any) -> Any:
    """`stage` as a job that reports what it did."""

    def run() -> Any:
        started = time.perf_counter()
        made = stage(kiln, *arguments)
        took = f"in {time.perf_counter() - started:.1f} s"
        if isinstance(made, Mould):
            what = f"mould {made.kind} {kiln.schemes[made.kind].name}"
            progress.done("compile", what, FROM_STORE if made.result.hit else f"compiled {took}")
        else:
            how = FROM_STORE if made.hit else f"{made.made} {took}"
            progress.done("cast" if made.made == "cast" else "compile", made.part.name, how)
        return made

    return run


def _read_progress(progress: Progress) -> Callable[[int, int], None] | None:
    """Bytes of a checkpoint read, where there are enough of them to wait for."""
    report = count_bytes(progress, "read", "read")
    return lambda done, total: report(done, total) if total >= STEP_BYTES else None


def _validate(kiln: Kiln, print_: str, memo: DigestMemo, progress: Progress) -> None:
    """Groups that fit; shapes against upstream's classes and no NaN or Inf, once per checkpoint."""
    from fluxkiln.export.validate import validate_checkpoint
    from fluxkiln.planning import check_weights

    action = Action(
        stage="validate",
        what=kiln.checkpoint.name,
        code_version=stage_code_version("fluxkiln.export.validate", "fluxkiln.export.fingerprint"),
        inputs={"checkpoint": f"sha256:{print_}"},
    )
    check_weights(kiln)
    if kiln.cache.lookup(action.key) is None:
        started = time.perf_counter()
        progress.stage("validate", 1)
        validate_checkpoint(kiln.checkpoint)
        for refs in kiln.checkpoint.tensors.values():
            scan_finite(refs.values(), memo)
        kiln.cache.record(action, {}, {"version": __version__})
        tensors = sum(map(len, kiln.checkpoint.tensors.values()))
        progress.done("validate", f"{tensors} tensors", f"checked in {time.perf_counter() - started:.1f} s")


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


def plan(settings: Settings) -> dict[str, Any]:
    """The jobs of a build without running them, with memory estimates and which of them the store has already."""
    from fluxkiln.planning import plan_build

    return plan_build(prepare(settings))
