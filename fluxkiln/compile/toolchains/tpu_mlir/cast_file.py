"""The stages behind the moulds: shells combined into the file of a component, and every part's weights cast into it.

A part is never a file of its own. The combined shell says where each part's weights belong; they are cast, or copied
from where the store has them already, straight to that place, several parts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from fluxkiln.artifacts.actions import Action, ActionCache, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.plan import Binary, BundleFile, Plan
from fluxkiln.compile.templates import make_template, weights_digest
from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_VERSION
from fluxkiln.compile.toolchains.tpu_mlir.moulds import require_compiler
from fluxkiln.compile.weights import part_rounders, part_weights, rounding_key
from fluxkiln.export.bindings import bind_part, binding_refs
from fluxkiln.export.checkpoint import Checkpoint, expect_tensors
from fluxkiln.export.fingerprint import check_states
from fluxkiln.files import disk_full_named
from fluxkiln.progress import FROM_STORE, Progress

# of one thread: the largest weight that is stored transposed, in float32
CAST_MEMORY = 256 << 20
_BLOCK = 4 << 20


def combine_shells(plan: Plan, cache: ActionCache, name: str, binaries: list[Binary]) -> Path:
    """One bmodel with every part's net in order, each with a page in place of its weights."""
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import combine
    from fluxkiln.compile.toolchains.tpu_mlir.shell import make_shell

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        env = require_compiler(f"the combined shell of {name}")
        shells = []
        for binary in binaries:
            shells.append(folder / f"{binary.net}.bmodel")
            make_shell(cache.path(binary.blobs["shell"]), binary.net, shells[-1])
        target = folder / "combined" / name
        target.parent.mkdir()
        combine(env, plan.target.chip, shells, target, plan.logs / f"{name}.log")
        return {"shell": target}, {}

    return cache.path(run_action(cache, combine_action(plan, name, binaries), produce).outputs["shell"])


def combine_action(plan: Plan, name: str, binaries: list[Binary]) -> Action:
    """The key of a combined shell: its nets in order. No checkpoint is in it where all of them are cast."""
    return Action(
        stage="combine",
        what=f"shell of {name}",
        code_version=code_version(combine_shells),
        inputs={binary.net: binary.blobs["shell"].digest for binary in binaries if binary.blobs["shell"] is not None},
        settings={"chip": plan.target.chip, "order": [binary.net for binary in binaries]},
        tools={"tpu_mlir": TPU_MLIR_VERSION},
    )


def cast_file(
    checkpoint: Checkpoint,
    plan: Plan,
    cache: ActionCache,
    name: str,
    binaries: list[Binary],
    progress: Progress,
    jobs: int | None = None,
) -> tuple[BundleFile, list[Binary]]:
    """The file `name` with all these parts, and the parts with their digests.

    Killed at any moment, the next call goes on with the part it was at: finished ones are read back and kept.

    Raises:
        IntegrityError: a weight in the file is not what was written there. ToolchainError: no combined shell in the
        store, and no compiler. ResourceError: the disk is full.
    """
    from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel

    shell = combine_shells(plan, cache, name, binaries)
    keys = {binary.net: part_action(checkpoint, plan, cache, binary).key for binary in binaries}
    action = Action(
        stage="file",
        what=name,
        code_version=code_version(cast_file),
        inputs={"shell": "sha256:" + shell.name, **keys},
    )

    def produce(folder: Path) -> tuple[dict[str, Path | Blob], dict[str, Any]]:
        place = plan.logs.parent / "casting" / name
        made = _fill((checkpoint, plan, cache), shell, binaries, keys, place, action.key, progress, jobs)
        check_states(checkpoint)
        nets = {net.name: net.coefficients for net in read_bmodel(place).nets}
        blob = cache.store.add_file(place, move=True)
        facts = {net: [made[net], nets[net].start, nets[net].size] for net in made}
        for binary in binaries:
            digest, start, size = facts[binary.net]
            where: dict[str, Any] = {"digest": digest, "start": start, "size": size}
            cache.record(part_action(checkpoint, plan, cache, binary), {"file": blob}, where)
        _journal(place).unlink()
        with suppress(OSError):  # other files are still being cast there
            place.parent.rmdir()
        return {"bmodel": blob}, {"nets": facts}

    result = run_action(cache, action, produce)
    nets: Any = result.facts["nets"]
    if result.hit:
        for binary in binaries:
            cache.count("cast", hit=True)
            progress.done("cast", binary.part.name, FROM_STORE)
    finished = [
        replace(binary, digest="sha256:" + nets[binary.net][0], size=nets[binary.net][2], hit=result.hit)
        for binary in binaries
    ]
    file = BundleFile(name, result.outputs["bmodel"], tuple(b.part.name for b in binaries), result.hit)
    return file, finished


def part_action(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary) -> Action:
    """The key of one part's stored weights, whatever file they are in."""
    if "map" not in binary.blobs:
        assert binary.blobs["bmodel"] is not None
        inputs = {"bmodel": binary.blobs["bmodel"].digest}
    else:
        template = make_template(checkpoint, plan, cache, binary.part.kind, plan.target.graph_format)
        binding = bind_part(binary.part, template.slots, checkpoint)
        inputs = {"map": binary.blobs["map"].digest, "weights": weights_digest(checkpoint, binding)}
    settings: dict[str, Any] = {}
    if "map" in binary.blobs:
        settings, calibration = rounding_key(checkpoint, plan, cache, binary.part)
        inputs |= calibration
    return Action("cast", f"{binary.part.name} {binary.scheme.name}", code_version(_fill_part), inputs, settings)


def _fill(
    context: tuple[Checkpoint, Plan, ActionCache],
    shell: Path,
    binaries: list[Binary],
    keys: Mapping[str, str],
    place: Path,
    file_key: str,
    progress: Progress,
    jobs: int | None,
) -> dict[str, str]:
    """Write the file at `place`, going on where an earlier call was killed; net -> sha256 of its weights."""
    from fluxkiln.compile.toolchains.tpu_mlir.bmodel import hash_span, read_bmodel
    from fluxkiln.compile.toolchains.tpu_mlir.shell import lay_out, write_check_code

    journal = _journal(place)
    finished = _read_journal(journal, file_key) if place.is_file() else {}
    sizes = {binary.net: int(binary.facts["weight_bytes"]) for binary in binaries}
    with disk_full_named(place.parent, sum(sizes.values())):
        if not finished:
            place.parent.mkdir(parents=True, exist_ok=True)
            journal.unlink(missing_ok=True)
            lay_out(shell, sizes, place)
            journal.write_text(json.dumps(["file", file_key]) + "\n")
        spans = {net.name: net.coefficients for net in read_bmodel(place).nets}
        written = threading.Lock()

        def fill(binary: Binary) -> tuple[str, str]:
            net, started = binary.net, time.perf_counter()
            digest = finished.get(net, "")
            if digest and hash_span(place, spans[net]).hex() == digest:
                how = "was finished before"
            else:
                digest, how = _fill_part(*context, binary, keys[net], place, spans[net])
                how = how or f"cast in {time.perf_counter() - started:.1f} s"
            write_check_code(place, net, bytes.fromhex(digest))
            with written, journal.open("a") as file:
                file.write(json.dumps([net, digest]) + "\n")
            progress.done("cast", binary.part.name, how)
            return net, digest

        # What was hashed last is in memory still, so the last parts come first; the system reads ahead of the threads.
        order, threads = binaries[::-1], jobs or os.cpu_count() or 1
        following = dict(zip((binary.net for binary in order), order[threads:], strict=False))

        def fill_next(binary: Binary) -> tuple[str, str]:
            if binary.net in following:
                _expect(*context, following[binary.net])
            return fill(binary)

        with ThreadPoolExecutor(threads, "cast") as pool:
            futures = [pool.submit(fill_next, binary) for binary in order]
            try:
                return dict(future.result() for future in futures)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _expect(checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary) -> None:
    """Have the system read what a part is cast of."""
    if "map" in binary.blobs:
        template = make_template(checkpoint, plan, cache, binary.part.kind, plan.target.graph_format)
        expect_tensors(binding_refs(bind_part(binary.part, template.slots, checkpoint), checkpoint))


def _fill_part(
    checkpoint: Checkpoint, plan: Plan, cache: ActionCache, binary: Binary, key: str, place: Path, span: Any
) -> tuple[str, str]:
    """One part's weights: copied from a file of the store that has them, or from its own bmodel, or else cast."""
    from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
    from fluxkiln.compile.toolchains.tpu_mlir.shell import copy_region

    known = cache.lookup(key)
    if known is not None:
        facts: Any = known.facts
        digest = _copy(cache.path(known.outputs["file"]), int(facts["start"]), place, span)
        if digest == facts["digest"]:
            cache.count("cast", hit=True)
            return digest, FROM_STORE
    cache.count("cast", hit=False)
    if "map" not in binary.blobs:
        return copy_region(cache.path(binary.blobs["bmodel"]), place, span).hex(), "copied from its own bmodel"
    template = make_template(checkpoint, plan, cache, binary.part.kind, plan.target.graph_format)
    coefficients = CoefficientMap.from_json(json.loads(cache.path(binary.blobs["map"]).read_text()))
    reader = part_weights(checkpoint, plan, cache, binary.part, template)
    return cast_region(place, span, coefficients, reader, part_rounders(checkpoint, plan, cache, binary.part)).hex(), ""


def _copy(source: Path, start: int, place: Path, span: Any) -> str:
    """Copy bytes from `start` of another file to a span of this one; their sha256."""
    digest = hashlib.sha256()
    with source.open("rb", buffering=0) as file, place.open("r+b", buffering=0) as target:
        file.seek(start)
        target.seek(span.start)
        for done in range(0, span.size, _BLOCK):
            block = file.read(min(_BLOCK, span.size - done))
            digest.update(block)
            target.write(block)
    return digest.hexdigest()


def _journal(place: Path) -> Path:
    return place.with_name(place.name + ".journal")


def _read_journal(journal: Path, file_key: str) -> dict[str, str]:
    """Net -> sha256 of what an earlier call finished in the same file; nothing when it was another file."""
    lines = []
    with suppress(OSError, ValueError):  # no journal, or its last line is cut short
        for line in journal.read_text().splitlines():
            lines.append(json.loads(line))
    if not lines or lines[0] != ["file", file_key]:
        return {}
    return {str(net): str(digest) for net, digest in lines[1:]}
