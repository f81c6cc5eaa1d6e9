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

from fluxkiln.artifacts.actions import Action, run_action
from fluxkiln.artifacts.code import code_version
from fluxkiln.artifacts.store import Blob
from fluxkiln.compile.corrections import part_weights, rounding_key
from fluxkiln.compile.templates import BinaryPart, CombinedFile, Kiln, make_template, weights_digest
from fluxkiln.compile.toolchains.tpu_mlir.environment import TPU_MLIR_VERSION
from fluxkiln.compile.toolchains.tpu_mlir.moulds import require_compiler
from fluxkiln.compile.weights import part_rounders
from fluxkiln.export.bindings import bind_part, binding_refs
from fluxkiln.export.checkpoint import expect_tensors
from fluxkiln.export.fingerprint import check_shards
from fluxkiln.files import disk_full_named
from fluxkiln.progress import FROM_STORE, Progress

# of one thread: the largest weight that is stored transposed, in float32
CAST_MEMORY = 256 << 20
_BLOCK = 4 << 20


def combine_shells(kiln: Kiln, name: str, binaries: list[BinaryPart]) -> Path:
    """One bmodel with every part's net in order, each with a page in place of its weights."""
    from fluxkiln.compile.toolchains.tpu_mlir.compiler import combine
    from fluxkiln.compile.toolchains.tpu_mlir.shell import make_shell

    def produce(folder: Path) -> tuple[dict[str, Path], dict[str, Any]]:
        env = require_compiler(kiln, f"the combined shell of {name}")
        shells = []
        for binary in binaries:
            shells.append(folder / f"{binary.net}.bmodel")
            make_shell(kiln.path(binary.shell), binary.net, shells[-1])
        target = folder / "combined" / name
        target.parent.mkdir()
        combine(env, kiln.target.chip, shells, target, kiln.logs / f"{name}.log")
        return {"shell": target}, {}

    return kiln.path(run_action(kiln.cache, combine_action(kiln, name, binaries), produce).outputs["shell"])


def combine_action(kiln: Kiln, name: str, binaries: list[BinaryPart]) -> Action:
    """The key of a combined shell: its nets in order. No checkpoint is in it where all of them are cast."""
    return Action(
        stage="combine",
        what=f"shell of {name}",
        code_version=code_version(combine_shells),
        inputs={binary.net: binary.shell.digest for binary in binaries if binary.shell is not None},
        settings={"chip": kiln.target.chip, "order": [binary.net for binary in binaries]},
        tools={"tpu_mlir": TPU_MLIR_VERSION},
    )


def cast_file(
    kiln: Kiln, name: str, binaries: list[BinaryPart], progress: Progress, jobs: int | None = None
) -> tuple[CombinedFile, list[BinaryPart]]:
    """The file `name` with all these parts, and the parts with their digests.

    Killed at any moment, the next call goes on with the part it was at: finished ones are read back and kept.

    Raises:
        IntegrityError: a weight in the file is not what was written there. ToolchainError: no combined shell in the
        store, and no compiler. ResourceError: the disk is full.
    """
    from fluxkiln.compile.toolchains.tpu_mlir.bmodel import read_bmodel

    shell = combine_shells(kiln, name, binaries)
    keys = {binary.net: part_action(kiln, binary).key for binary in binaries}
    action = Action(
        stage="file",
        what=name,
        code_version=code_version(cast_file),
        inputs={"shell": "sha256:" + shell.name, **keys},
    )

    def produce(folder: Path) -> tuple[dict[str, Path | Blob], dict[str, Any]]:
        place = kiln.logs.parent / "casting" / name
        made = _fill(kiln, shell, binaries, keys, place, action.key, progress, jobs)
        check_shards(kiln.checkpoint, kiln.checkpoint.states)
        nets = {net.name: net.coefficients for net in read_bmodel(place).nets}
        blob = kiln.cache.store.add_file(place, move=True)
        facts = {net: [made[net], nets[net].start, nets[net].size] for net in made}
        for binary in binaries:
            digest, start, size = facts[binary.net]
            where: dict[str, Any] = {"digest": digest, "start": start, "size": size}
            kiln.cache.record(part_action(kiln, binary), {"file": blob}, where)
        _journal(place).unlink()
        with suppress(OSError):  # other files are still being cast there
            place.parent.rmdir()
        return {"bmodel": blob}, {"nets": facts}

    result = run_action(kiln.cache, action, produce)
    nets: Any = result.facts["nets"]
    if result.hit:
        for binary in binaries:
            kiln.cache.count("cast", hit=True)
            progress.done("cast", binary.part.name, FROM_STORE)
    finished = [
        replace(binary, digest="sha256:" + nets[binary.net][0], size=nets[binary.net][2], hit=result.hit)
        for binary in binaries
    ]
    file = CombinedFile(name, result.outputs["bmodel"], tuple(b.part.name for b in binaries), result.hit)
    return file, finished


def part_action(kiln: Kiln, binary: BinaryPart) -> Action:
    """The key of one part's stored weights, whatever file they are in."""
    if binary.coefficients is None:
        assert binary.bmodel is not None
        inputs = {"bmodel": binary.bmodel.digest}
    else:
        template = make_template(kiln, binary.part.kind, kiln.target.graph_format)
        binding = bind_part(binary.part, template.slots, kiln.checkpoint)
        inputs = {"map": binary.coefficients.digest, "weights": weights_digest(kiln, binding)}
    settings: dict[str, Any] = {}
    if binary.coefficients is not None:
        settings, calibration = rounding_key(kiln, binary.part)
        inputs |= calibration
    return Action("cast", f"{binary.part.name} {binary.scheme.name}", code_version(_fill_part), inputs, settings)


def _fill(
    kiln: Kiln,
    shell: Path,
    binaries: list[BinaryPart],
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

        def fill(binary: BinaryPart) -> tuple[str, str]:
            net, started = binary.net, time.perf_counter()
            digest = finished.get(net, "")
            if digest and hash_span(place, spans[net]).hex() == digest:
                how = "was finished before"
            else:
                digest, how = _fill_part(kiln, binary, keys[net], place, spans[net])
                how = how or f"cast in {time.perf_counter() - started:.1f} s"
            write_check_code(place, net, bytes.fromhex(digest))
            with written, journal.open("a") as file:
                file.write(json.dumps([net, digest]) + "\n")
            progress.done("cast", binary.part.name, how)
            return net, digest

        # What was hashed last is in memory still, so the last parts come first; the system reads ahead of the threads.
        order, threads = binaries[::-1], jobs or os.cpu_count() or 1
        following = dict(zip((binary.net for binary in order), order[threads:], strict=False))

        def fill_next(binary: BinaryPart) -> tuple[str, str]:
            if binary.net in following:
                _expect(kiln, following[binary.net])
            return fill(binary)

        with ThreadPoolExecutor(threads, "cast") as pool:
            futures = [pool.submit(fill_next, binary) for binary in order]
            try:
                return dict(future.result() for future in futures)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _expect(kiln: Kiln, binary: BinaryPart) -> None:
    """Have the system read what a part is cast of."""
    if binary.coefficients is not None:
        template = make_template(kiln, binary.part.kind, kiln.target.graph_format)
        expect_tensors(binding_refs(bind_part(binary.part, template.slots, kiln.checkpoint), kiln.checkpoint))


def _fill_part(kiln: Kiln, binary: BinaryPart, key: str, place: Path, span: Any) -> tuple[str, str]:
    """One part's weights: copied from a file of the store that has them, or from its own bmodel, or else cast."""
    from fluxkiln.compile.toolchains.tpu_mlir.cast import cast_region
    from fluxkiln.compile.toolchains.tpu_mlir.coefficients import CoefficientMap
    from fluxkiln.compile.toolchains.tpu_mlir.shell import copy_region

    known = kiln.cache.lookup(key)
    if known is not None:
        facts: Any = known.facts
        digest = _copy(kiln.path(known.outputs["file"]), int(facts["start"]), place, span)
        if digest == facts["digest"]:
            kiln.cache.count("cast", hit=True)
            return digest, FROM_STORE
    kiln.cache.count("cast", hit=False)
    if binary.coefficients is None:
        return copy_region(kiln.path(binary.bmodel), place, span).hex(), "copied from its own bmodel"
    template = make_template(kiln, binary.part.kind, kiln.target.graph_format)
    coefficients = CoefficientMap.from_json(json.loads(kiln.path(binary.coefficients).read_text()))
    reader = part_weights(kiln, binary.part, template)
    return cast_region(place, span, coefficients, reader, part_rounders(kiln, binary.part)).hex(), ""


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
